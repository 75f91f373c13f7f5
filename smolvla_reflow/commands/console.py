"""The console side of all commands: parse, and report an error in one sentence with exit code 2."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import draccus
import yaml
from draccus.argparsing import ArgumentParser
from lerobot.configs import parser

from smolvla_reflow.errors import ReflowError, doing, first_line, in_one_line

T = TypeVar("T")
USER_ERROR = 2
INTERRUPTED = 130
DEBUG = "--debug"


@contextlib.contextmanager
def reported_errors(program: str, argv: Sequence[str] | None) -> Iterator[list[str]]:
    """Turn any error into one sentence and exit code 2, and Ctrl-C into exit code 130.

    Yields:
        The arguments, by default the process's own, without `--debug`, which shows where an error came from.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    debug = DEBUG in given
    try:
        with one_interrupt():
            yield [word for word in given if word != DEBUG]
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = str(error) if isinstance(error, ReflowError) else f"{type(error).__name__}: {first_line(error)}"
        unforeseen = error.__cause__ is not None or not isinstance(error, ReflowError)
        hint = f" ({DEBUG} shows the traceback)" if unforeseen and not debug else ""
        print(f"{program}: error: {said}{hint}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    except KeyboardInterrupt as interrupt:
        print(f"\n{program}: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C interrupt, and ignore every other until the process ends, so that nothing is left half-done.

    An error on the way out of the first, such as that of a file that was being written, stays an interruption.
    Python drops what is raised in a finalizer or in a callback of a fork; a KeyboardInterrupt is then raised again.
    """
    on_its_way, report = False, sys.unraisablehook

    def interrupt(*signal_and_frame: object) -> None:
        nonlocal on_its_way
        if not on_its_way:
            on_its_way = True
            signal.siginterrupt(signal.SIGINT, False)  # a file that is being written is not cut off by the next one
            raise KeyboardInterrupt

    def again() -> None:
        nonlocal on_its_way
        on_its_way = False
        signal.siginterrupt(signal.SIGINT, True)
        os.kill(os.getpid(), signal.SIGINT)

    def dropped(error: Any) -> None:
        if error.exc_type is KeyboardInterrupt:
            timer = threading.Timer(0.05, again)
            timer.daemon = True
            timer.start()
        elif not on_its_way:  # else it may come from what was left half-done
            report(error)

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread, which signals interrupt
        yield
        return
    sys.unraisablehook = dropped
    try:
        yield
    except Exception as error:
        if on_its_way:
            raise KeyboardInterrupt(str(error)) from error
        raise
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, signal.SIG_IGN if on_its_way else before)


def asks_for_help(argv: Sequence[str], about: str | None) -> bool:
    """Print the command's description if `--help` is given; True if it is."""
    asked = "-h" in argv or "--help" in argv
    if asked:
        print(f"{about}\n{DEBUG} shows the traceback of an error.\n")
    return asked


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
    """Turn a parser's usage text and exit into a ReflowError with the parser's last line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ReflowError(f"{_one_line(errors.getvalue().rpartition('error: ')[2])}. See --help.") from None
    except yaml.YAMLError as error:
        raise ReflowError(f"A flag's value cannot be read: {_one_line(str(error))}. See --help.") from None
    except draccus.utils.DraccusException as error:
        cause = f" ({_one_line(str(error.__cause__))})" if error.__cause__ else ""
        raise ReflowError(f"{_one_line(str(error))}{cause}. See --help.") from None


def parsed(config: type[T], argv: Sequence[str]) -> T:
    """Parse these flags, without abbreviations. Raises ReflowError for an unknown flag or an unreadable value."""
    with parse_errors():
        return ArgumentParser(config, allow_abbrev=False).parse_args(argv)


@contextlib.contextmanager
def own_log(shown: bool) -> Iterator[None]:
    """Show this package's log, for commands that do not set up logging as LeRobot's training does."""
    logger, handler = logging.getLogger("smolvla_reflow"), logging.StreamHandler()
    before = logger.level
    if shown:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def load_plugins(argv: Sequence[str]) -> list[str]:
    """Load the packages that --env.discover_packages_path names, as LeRobot's commands do, and drop that flag."""
    argv = list(argv)
    for flag, package in parser.parse_plugin_args(parser.PLUGIN_DISCOVERY_SUFFIX, argv).items():
        with doing(f"importing --{flag}={package}, the name of a package"):
            parser.load_plugin(package)
        argv = list(parser.filter_arg(flag, argv))
    return argv


def with_values(argv: Sequence[str], switch: str) -> list[str]:
    """Let `--switch` alone mean `--switch=true`."""
    following = [*argv, "--"][1:]
    return [
        f"--{switch}=true" if word == f"--{switch}" and after.startswith("--") else word
        for word, after in zip(argv, following, strict=True)
    ]


def is_given(argv: Sequence[str], flag: str) -> bool:
    """True if `--flag` is on the command line, with or without `=value`."""
    return any(word.partition("=")[0] == f"--{flag}" for word in argv)


def _one_line(text: str) -> str:
    return in_one_line(text).rstrip(".")
