"""Several processes at one piece of work: where one fails, all of them stop, each with the reason; none waits for it.

Every process has to make these calls, in the same order.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from smolvla_reflow.errors import ReflowError, first_line

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """What `action` gives in this process, once it has succeeded in every one.

    Raises:
        Exception: what it raised here.
        ReflowError: what it raised in another process.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    agree(failure)
    return result


def agree(failure: Exception | None) -> None:
    """Raise this process's failure; or, if it has none, a ReflowError with another's."""
    said = []
    if failure is not None:
        named = f"Another process failed: {type(failure).__name__}: {first_line(failure)}"
        said = [str(failure) if isinstance(failure, ReflowError) else named]
    reasons = gather_object(said)
    if failure is not None:
        raise failure
    if reasons:
        raise ReflowError(reasons[0])
