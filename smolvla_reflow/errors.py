"""The one error this package raises on purpose, and what words its messages."""

import difflib
from collections.abc import Collection


class ReflowError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do."""


def known_are(known: Collection[str], instead_of: object) -> str:
    """The end of a message about an unknown name: those there are, and the one that was probably meant."""
    close = difflib.get_close_matches(str(instead_of), known, n=1)
    return f"known are: {', '.join(known)}." + (f" Did you mean '{close[0]}'?" if close else "")


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line: its first one that is not blank, or else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def in_one_line(error: object) -> str:
    """All that another library's error says, in one line."""
    return " ".join(str(error).split())
