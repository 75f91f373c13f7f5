"""The folder that pairs are made in: one run at a time, each continuing what the earlier ones finished.

A shard, and the manifest that says it is finished, appear under their names only when they are complete. So a run can
be killed at any moment.
"""

import contextlib
import errno
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from smolvla_reflow.errors import ReflowError, write_whole
from smolvla_reflow.pairs.manifest import (
    DTYPES,
    MANIFEST_NAME,
    TENSOR_NAME,
    Manifest,
    check_shards,
    differences,
    not_as_written,
    read_manifest,
    shard_path,
)
from smolvla_reflow.pairs.processes import together

LOCK_NAME = ".lock"
# Seconds until another node's file shows on a network file system, which may have cached that it was not there.
PATIENCE = 60.0


@contextlib.contextmanager
def reserved(folder: Path, process: PartialState) -> Iterator[None]:
    """Make the folder, and keep other runs out of it. What fails before its first shard is finished leaves nothing.

    Raises:
        ReflowError: it holds something else than pairs, another run is using it, it cannot be written, or another
            process does not see it.
    """
    with contextlib.ExitStack() as held:
        together(lambda: held.enter_context(_locked(folder)) if process.is_main_process else None)
        together(lambda: _check_seen(folder))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system releases if the run is killed."""
    if folder.exists() and not _is_for_pairs(folder):
        raise ReflowError(f"--output_dir={folder} exists and holds no pairs; name a new folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK_NAME)
    try:
        with explained_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ReflowError(f"Another smolvla-reflow-pairs is at work in {folder}; wait for it to end.") from None
        try:
            yield
        except (Exception, KeyboardInterrupt):
            _clear_unless_begun(folder)
            raise
    finally:
        if lock.is_locked:
            # Removed while it is held: whoever has opened it meanwhile gets a lock on a file that is gone, and
            # FileLock does not take that for a lock.
            with contextlib.suppress(OSError):
                (folder / LOCK_NAME).unlink()
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def _is_for_pairs(folder: Path) -> bool:
    """Whether it is empty, or this command has written to it, even if that run was killed before its first manifest."""
    if not folder.is_dir():
        return False
    before_the_manifest = {LOCK_NAME, MANIFEST_NAME + ".partial"}
    return (folder / MANIFEST_NAME).is_file() or {path.name for path in folder.iterdir()} <= before_the_manifest


def _clear_unless_begun(folder: Path) -> None:
    """Remove what a run has written that has not finished a shard."""
    manifest = folder / MANIFEST_NAME
    if manifest.exists() and read_manifest(folder).checksums:
        return
    for path in (manifest, folder / f"{MANIFEST_NAME}.partial", *folder.glob("pairs-*.safetensors*")):
        path.unlink(missing_ok=True)


def _check_seen(folder: Path) -> None:
    if not folder.is_dir():
        raise ReflowError(not_shared(folder, "some do not see the one that the main process made"))


def not_shared(folder: Path, sign: str) -> str:
    """The sentence about processes that have different folders of one name, and how that showed."""
    return (
        f"--output_dir={folder} is not one folder for all processes: {sign}. Name a folder on a file system that all "
        "nodes share, or run it on one node."
    )


def begin(folder: Path, wanted: Manifest, process: PartialState, *, repair: bool) -> Manifest:
    """Find out what an earlier run of the same command has finished, or write the manifest of a new set.

    Args:
        folder: reserved for this run.
        wanted: what is to be made.
        process: this one. The main process looks, and every one gets what it found.
        repair: whether damaged shards count as unfinished.

    Returns:
        `wanted`, or the manifest of the earlier run, with the checksums of its finished shards.

    Raises:
        ReflowError: the folder holds other pairs, or damaged ones and `repair` is false; or nothing, and it is true.
    """
    found = together(lambda: [_begun(folder, wanted, repair)] if process.is_main_process else [])
    (manifest,) = gather_object(found)
    return manifest


def _begun(folder: Path, wanted: Manifest, repair: bool) -> Manifest:
    found = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    if found is None or not found.checksums:
        if repair:
            raise ReflowError(f"--repair=true: there are no pairs in {folder} to repair.")
        write_manifest(folder, wanted)
        return wanted

    _check_same(folder, found, wanted)
    damaged = check_shards(folder, found)
    if damaged and not repair:
        what = "it" if len(damaged) == 1 else "them"
        raise ReflowError(
            f"The pairs in {folder} are damaged: {not_as_written(damaged)}; add --repair to make {what} again."
        )
    whole = {shard: checksum for shard, checksum in found.checksums.items() if shard not in damaged}
    return replace(found, checksums=whole)


def _check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    unlike = differences(wanted.provenance, found.provenance)
    if found.frames != wanted.frames:
        unlike.append(f"frames are {found.frames} in the pairs and {wanted.frames} here")
    if unlike:
        raise ReflowError(
            f"--output_dir={folder} holds other pairs: {'; '.join(unlike)}. Name a new folder, or give the same flags."
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest. Raises ReflowError if the disk is full or read-only."""
    with explained_write_errors(folder):
        manifest.write(folder)


def record(folder: Path, manifest: Manifest, finished: dict[int, str], process: PartialState) -> Manifest:
    """Add finished shards to the folder's manifest, and return it.

    Args:
        folder: of the pairs.
        manifest: as it was.
        finished: checksums of the shards that the processes have finished since.
        process: this one. The main process writes the manifest.

    Raises:
        ReflowError: the main process does not see some of them, so that not all processes write to the same folder;
            those that it sees are in the manifest. Or the disk is full or read-only.
    """
    if not finished:
        return manifest

    def seen_and_written() -> None:
        new = replace(manifest, checksums=finished)
        deadline = time.monotonic() + PATIENCE
        while (unseen := check_shards(folder, new)) and time.monotonic() < deadline:
            time.sleep(1)
        seen = {shard: checksum for shard, checksum in finished.items() if shard not in unseen}
        write_manifest(folder, replace(manifest, checksums={**manifest.checksums, **seen}))
        if unseen:
            raise ReflowError(not_shared(folder, "of some the main process does not see the files that they wrote"))

    together(seen_and_written if process.is_main_process else lambda: None)
    return replace(manifest, checksums={**manifest.checksums, **finished})


def write_shard(folder: Path, shard: int, actions: Tensor, dtype: str) -> str:
    """Write one shard, complete or not at all.

    Args:
        folder: to write it to.
        shard: its number.
        actions: (frames, couplings_per_frame, chunk_size, max_action_dim).
        dtype: to store them in, one of `DTYPES`.

    Returns:
        The checksum of the file.

    Raises:
        ReflowError: the disk is full or read-only.
    """
    content = save({TENSOR_NAME: actions.to(DTYPES[dtype]).contiguous()})
    with explained_write_errors(folder):
        write_whole(shard_path(folder, shard), content)
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ReflowError that says why nothing can be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ReflowError(
            f"{folder} cannot be written ({reason}). What is finished is kept; make room and run the same command "
            "again to go on."
        ) from None
