"""The one error this package raises on purpose."""


class ReflowError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do."""
