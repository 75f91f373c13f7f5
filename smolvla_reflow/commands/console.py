"""How the commands speak to their user: one sentence for a user's error, exit code 2, no traceback."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence

import draccus

from smolvla_reflow.errors import ReflowError

USER_ERROR = 2
INTERRUPTED = 130


@contextlib.contextmanager
def reported_errors(program: str) -> Iterator[None]:
    """Turn a ReflowError into a message and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except ReflowError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@contextlib.contextmanager
def command_line(program: str, flags: Sequence[str]) -> Iterator[None]:
    """Let LeRobot's parser, which reads `sys.argv`, see these flags."""
    before = sys.argv
    sys.argv = [program, *flags]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def parse_errors() -> Iterator[None]:
    """Turn a parser's usage dump and exit into a ReflowError with its last line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as exit:
        if not exit.code:
            raise
        lines = [line for line in errors.getvalue().splitlines() if line.strip()]
        message = lines[-1].partition("error: ")[2] if lines else ""
        raise ReflowError(f"{message or 'the command line cannot be read'}. See --help.") from None
    except draccus.utils.DraccusException as error:
        raise ReflowError(f"{str(error).strip()}. See --help.") from None
