"""The folder that pairs are made in: one run at a time, each continuing what the earlier ones finished.

A shard, and the manifest that says it is finished, appear under their names only when they are complete. So a run can
be killed at any moment.
"""

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.files import write_whole
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

LOCK_NAME = ".lock"


@contextlib.contextmanager
def reserved(folder: Path, process: PartialState) -> Iterator[None]:
    """Make the folder, and keep other runs out of it. The operating system releases the lock of a killed run.

    Raises:
        ReflowError: it holds something else than pairs, another run is using it, or it cannot be written.
    """
    lock = None
    if process.is_main_process:
        if folder.exists() and not _is_for_pairs(folder):
            raise ReflowError(f"--output_dir={folder} exists and holds no pairs; name a new folder.")
        with explained_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK_NAME)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ReflowError(f"Another smolvla-reflow-pairs is at work in {folder}; wait for it to end.") from None
    try:
        process.wait_for_everyone()
        yield
    finally:
        if lock is not None:
            lock.release()


def _is_for_pairs(folder: Path) -> bool:
    """Whether it is empty, or this command has written to it, even if that run was killed before its first manifest."""
    if not folder.is_dir():
        return False
    before_the_manifest = {LOCK_NAME, MANIFEST_NAME + ".partial"}
    return (folder / MANIFEST_NAME).is_file() or {path.name for path in folder.iterdir()} <= before_the_manifest


def begin(folder: Path, wanted: Manifest, process: PartialState, *, repair: bool) -> Manifest:
    """Find out what an earlier run of the same command has finished, or write the manifest of a new set.

    Args:
        folder: reserved for this run.
        wanted: what is to be made.
        process: this one.
        repair: whether damaged shards count as unfinished.

    Returns:
        `wanted`, or the manifest of the earlier run, with the checksums of its finished shards.

    Raises:
        ReflowError: the folder holds other pairs, or damaged ones and `repair` is false; or nothing, and it is true.
    """
    if not (folder / MANIFEST_NAME).is_file():
        if repair:
            raise ReflowError(f"--repair=true: there are no pairs in {folder} to repair.")
        process.wait_for_everyone()  # every process has looked for a manifest before one writes it
        if process.is_main_process:
            write_manifest(folder, wanted)
        process.wait_for_everyone()
        return wanted

    found = read_manifest(folder)
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
