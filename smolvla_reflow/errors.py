"""The error that this package raises on purpose, the wording of its messages, and files and folders written safely."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"


class ReflowError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do."""


def known_are(known: Collection[str], instead_of: object) -> str:
    """The end of a message about an unknown name: the known names, and the likely intention."""
    close = difflib.get_close_matches(str(instead_of), known, n=1)
    return f"known are: {', '.join(known)}." + (f" Did you mean '{close[0]}'?" if close else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's type if the message is empty.

    An error from a data loader's process quotes a traceback, whose last error is the one that was raised.
    """
    _, quoted, traceback = str(error).partition("Original Traceback")
    if quoted:
        return re.findall(r"^[\w.]+: (.*)", traceback, re.MULTILINE)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # as in "Error(s) in loading state_dict for SmolVLAPolicy:"
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """Kind and first line of an error, after kind and first line of its first cause, which may name the file."""
    *_, first = causes(error)
    lines = [f"{type(each).__name__}: {first_line(each)}".rstrip(".") for each in (first, error)]
    return ", and then ".join(dict.fromkeys(lines))


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause, that error's cause, and so on."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Translate any error within the block into a ReflowError: what was being done, the error's kind and first line.

    `what` completes "While", such as "opening the dataset me/robot". Only silent faults need a check beforehand.
    """
    try:
        yield
    except ReflowError as error:
        if str(error) != (line := first_line(error)):  # quoted from another process
            raise ReflowError(line) from error
        raise
    except Exception as error:
        raise ReflowError(f"While {what}: {kind_and_line(error)}") from error


def in_one_line(error: object) -> str:
    """Another library's whole message, in one line."""
    return " ".join(str(error).split())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def sole_use(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder and hold its lock. Folders that were made for it, and are empty at the end, disappear.

    Raises:
        ReflowError: another process holds the lock; `busy` is the message.
        OSError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK_NAME)  # the operating system releases it if the process is killed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ReflowError(busy) from None
        yield
    finally:
        if lock.is_locked:
            # Removed while it is held: another process that has opened the file meanwhile locks a file that is gone,
            # and FileLock then asks anew.
            with contextlib.suppress(OSError):
                (folder / LOCK_NAME).unlink()
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


@contextlib.contextmanager
def whole_folder(new: Path) -> Iterator[Path]:
    """A folder to be filled, which appears as `new` once that is done, and not at all if it breaks off."""
    partial = new.with_name(f".{new.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(new)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(new: Path, old: Path) -> None:
    """Raise ReflowError if what is made of one folder, which is left as it is, cannot go into this new one."""
    if new.exists():
        raise ReflowError(f"{new} exists already; name a new folder.")
    if new.resolve().is_relative_to(old.resolve()):
        raise ReflowError(f"{new} lies within {old}, which is left as it is; name a folder elsewhere.")


def sha256(path: Path) -> "hashlib._Hash":
    """The hash of the file's content, to be read off or added to. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole; dataclasses become objects."""
    write_whole(path, (json.dumps(content, indent=4, default=dataclasses.asdict) + "\n").encode())
