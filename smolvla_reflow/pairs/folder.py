"""The folder that pairs are made in: one run at a time, and each continues what the earlier ones have finished.

A shard, and the manifest that lists it as finished, appear under their names only when they are complete. So a run can
be killed at any moment.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from smolvla_reflow.errors import LOCK_NAME, ReflowError, doing, sole_use, write_whole
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

WRITING = "writing to {} (finished files are kept: make room, and the same command goes on)"


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock. A run that fails before its first shard is finished leaves nothing."""
    if folder.exists() and not _is_for_pairs(folder):
        raise ReflowError(f"--output_dir={folder} exists and holds no pairs; name a new folder.")
    busy = f"Another smolvla-reflow-pairs is at work in {folder}; wait for it to end."
    with contextlib.ExitStack() as held:
        with doing(WRITING.format(folder)):
            held.enter_context(sole_use(folder, busy))
        try:
            yield
        except (Exception, KeyboardInterrupt):
            _clear_unless_begun(folder)
            raise


def _is_for_pairs(folder: Path) -> bool:
    """True for an empty folder, and for one that this command has written to, if only the beginning of a manifest."""
    if not folder.is_dir():
        return False
    before_the_manifest = {LOCK_NAME, MANIFEST_NAME + ".partial"}
    return (folder / MANIFEST_NAME).is_file() or {path.name for path in folder.iterdir()} <= before_the_manifest


def _clear_unless_begun(folder: Path) -> None:
    """Remove the files of a run that has not finished a shard."""
    manifest = folder / MANIFEST_NAME
    if manifest.exists() and read_manifest(folder).checksums:
        return
    for path in (manifest, folder / f"{MANIFEST_NAME}.partial", *folder.glob("pairs-*.safetensors*")):
        path.unlink(missing_ok=True)


def begin(folder: Path, wanted: Manifest, *, repair: bool) -> None:
    """Write the manifest of a new set, or check that the folder holds an earlier run of the same command.

    `repair` counts damaged shards as unfinished; without `repair` they are refused.
    """
    found = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    if found is None or not found.checksums:
        if repair:
            raise ReflowError(f"--repair=true: there are no pairs in {folder} to repair.")
        write_manifest(folder, wanted)
        return
    unlike = differences(wanted.provenance, found.provenance)
    if found.frames != wanted.frames:
        unlike.append(f"frames are {found.frames} in the pairs and {wanted.frames} here")
    if unlike:
        raise ReflowError(
            f"--output_dir={folder} holds other pairs: {'; '.join(unlike)}. Name a new folder, or give the same flags."
        )
    damaged = check_shards(folder, found)
    if damaged and not repair:
        what = "it" if len(damaged) == 1 else "them"
        raise ReflowError(
            f"The pairs in {folder} are damaged: {not_as_written(damaged)}; add --repair to make {what} again."
        )
    if damaged:
        intact = {shard: checksum for shard, checksum in found.checksums.items() if shard not in damaged}
        write_manifest(folder, replace(found, checksums=intact))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest. Raises ReflowError if it cannot be written."""
    with doing(WRITING.format(folder)):
        manifest.write(folder)


def write_shard(folder: Path, shard: int, actions: Tensor, dtype: str) -> str:
    """Write (frames, couplings_per_frame, chunk_size, max_action_dim), complete or not at all; returns a checksum."""
    content = save({TENSOR_NAME: actions.to(DTYPES[dtype]).contiguous()})
    with doing(WRITING.format(folder)):
        write_whole(shard_path(folder, shard), content)
    return hashlib.sha256(content).hexdigest()
