"""Couplings on disk: made once by `smolvla-reflow-pairs`, then trained on at the cost of standard training.

    DIR/manifest.json              what the pairs depend on, which frames they cover, a checksum per shard
    DIR/pairs-00000.safetensors    "actions" (frames, pairs_per_frame, chunk_size, max_action_dim)

Only the actions are stored; the noise they belong to is regenerated (`smolvla_reflow.noise`). The frames of the
set are put in ascending order and cut into shards of equal length, so a frame's place follows from its index.
"""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smolvla_reflow.coupling import Coupling
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.files import sha256, write_whole
from smolvla_reflow.noise import pair_noise

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TENSOR_NAME = "actions"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Provenance:
    """Everything the pairs depend on. Two sets of equal provenance hold equal pairs, up to rounding.

    Attributes:
        teacher: SHA-256 of its weights, its configuration and its statistics.
        dataset: its repo_id.
        total_frames: of the whole dataset.
        statistics: SHA-256 of the dataset's statistics, in whose normalised space the actions are.
        solver, num_steps, rtol, atol: of the teacher's ODE; `num_steps` is resolved.
        chunk_size, max_action_dim: of one pair.
        seed: of the noise.
        pairs_per_frame: couplings per frame.
        dtype: in which actions are stored.
    """

    teacher: str
    dataset: str
    total_frames: int
    statistics: str
    solver: str
    num_steps: int | None
    rtol: float | None
    atol: float | None
    chunk_size: int
    max_action_dim: int
    seed: int
    pairs_per_frame: int
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
        provenance: what the pairs depend on.
        made_from: where teacher and dataset were found, for people and for `--verify`.
        package_version: of smolvla-reflow, when the set was begun.
        frames: ascending, non-overlapping [first, last + 1) ranges of frame indices.
        frames_per_shard: all shards but the last have so many.
        checksums: SHA-256 of each finished shard's file, by shard number.
        bytes_per_pair: on disk.
        format_version: of this layout.
    """

    provenance: Provenance
    made_from: dict[str, Any]
    package_version: str
    frames: list[list[int]]
    frames_per_shard: int
    checksums: dict[int, str] = field(default_factory=dict)
    bytes_per_pair: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def num_frames(self) -> int:
        return sum(stop - start for start, stop in self.frames)

    @property
    def num_shards(self) -> int:
        return -(-self.num_frames // self.frames_per_shard)

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [shard for shard in range(self.num_shards) if shard not in self.checksums]

    def frames_of(self, shard: int) -> list[int]:
        """Frame indices of one shard, ascending."""
        first = shard * self.frames_per_shard
        last = first + self.frames_per_shard
        found: list[int] = []
        offset = 0
        for start, stop in self.frames:
            found += range(start + max(0, first - offset), start + min(stop - start, last - offset))
            offset += stop - start
        return found

    def write(self, folder: Path) -> None:
        """Write it so that at any moment either the old or the new one is there, whole."""
        values = dataclasses.asdict(self)
        values["checksums"] = {str(shard): self.checksums[shard] for shard in sorted(self.checksums)}
        write_whole(folder / MANIFEST_NAME, (json.dumps(values, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        ReflowError: there is none, or it is not one this version writes.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ReflowError(f"{folder} holds no pairs: there is no {MANIFEST_NAME}. Make them with smolvla-reflow-pairs.")
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ReflowError(
                f"{path} has format version {version}, this package reads {FORMAT_VERSION}; make the pairs again."
            )
        provenance = Provenance(**values.pop("provenance"))
        checksums = {int(shard): str(checksum) for shard, checksum in values.pop("checksums").items()}
        manifest = Manifest(provenance=provenance, checksums=checksums, **values)
        _check_types(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReflowError(f"{path} is damaged ({type(error).__name__}: {error}); make the pairs again.") from None
    return manifest


def _check_types(manifest: Manifest) -> None:
    p = manifest.provenance
    counts = (p.total_frames, p.chunk_size, p.max_action_dim, p.pairs_per_frame, manifest.frames_per_shard)
    if not all(isinstance(count, int) and count > 0 for count in counts) or not isinstance(p.seed, int):
        raise ValueError("a count is not a positive integer")
    if p.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {p.dtype}")
    bounds = list(itertools.chain.from_iterable(manifest.frames))
    if not bounds or not all(isinstance(b, int) for b in bounds) or bounds[0] < 0:
        raise ValueError("no frames")
    if any(len(frames) != 2 or frames[0] >= frames[1] for frames in manifest.frames) or bounds != sorted(bounds):
        raise ValueError("frames are not ascending ranges")
    if bounds[-1] > p.total_frames:
        raise ValueError("more frames than the dataset has")
    if any(not 0 <= shard < manifest.num_shards for shard in manifest.checksums):
        raise ValueError("a checksum of no shard")
    if not isinstance(manifest.made_from, dict):
        raise ValueError("made_from is no object")


def shard_path(folder: Path, shard: int) -> Path:
    """Follows from the number alone, so that no manifest can lead out of its folder."""
    return folder / f"pairs-{shard:05d}.safetensors"


def check_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the finished shards whose file is missing or is not the one that was written."""
    return [shard for shard, checksum in manifest.checksums.items() if _checksum(shard_path(folder, shard)) != checksum]


def _checksum(path: Path) -> str | None:
    try:
        return sha256(path).hexdigest()
    except OSError:
        return None


def differences(ours: Provenance, theirs: Provenance) -> list[str]:
    """The fields in which the two differ, as text with both values."""
    return [
        f"{name} is {getattr(theirs, name)} in the pairs and {getattr(ours, name)} here"
        for name in vars(ours)
        if getattr(ours, name) != getattr(theirs, name)
    ]


class Pairs:
    """A finished set of pairs, read from disk as they are asked for; nothing of it stays in memory.

    Attributes:
        folder: where it is.
        manifest: what it holds.
    """

    def __init__(self, folder: str | Path):
        """Open a folder that `smolvla-reflow-pairs` wrote.

        Raises:
            ReflowError: it holds no pairs, or not all of them yet.
        """
        self.folder = Path(folder).expanduser().resolve()
        self.manifest = read_manifest(self.folder)
        unfinished = self.manifest.num_shards - len(self.manifest.checksums)
        if unfinished:
            raise ReflowError(
                f"The pairs in {self.folder} are unfinished: {unfinished} of "
                f"{self.manifest.num_shards} shards are missing. Run smolvla-reflow-pairs again with the same "
                "flags."
            )
        starts = [start for start, _ in self.manifest.frames]
        lengths = [stop - start for start, stop in self.manifest.frames]
        self._starts, self._offsets = starts, [0, *itertools.accumulate(lengths)]

    def __len__(self) -> int:
        """Number of pairs."""
        return self.manifest.num_frames * self.manifest.provenance.pairs_per_frame

    def check(self) -> None:
        """Raise ReflowError if a shard is missing, damaged or foreign. Reads every byte."""
        damaged = check_shards(self.folder, self.manifest)
        if damaged:
            names = ", ".join(shard_path(self.folder, shard).name for shard in damaged[:3])
            raise ReflowError(
                f"The pairs in {self.folder} are damaged: {names}{' and others' if len(damaged) > 3 else ''} "
                "is not the file that was written. Run smolvla-reflow-pairs again with the same flags and "
                "--repair."
            )

    def missing(self, frames: Iterable[range]) -> int:
        """How many of these frames have no pairs."""
        return sum(
            len(wanted)
            - sum(len(range(max(wanted.start, start), min(wanted.stop, stop))) for start, stop in self.manifest.frames)
            for wanted in frames
        )

    def lookup(self, frame: int, pair: int) -> Coupling:
        """One coupling, each tensor (chunk_size, max_action_dim) float32 on the CPU.

        Raises:
            ReflowError: the frame has no pairs, or its shard cannot be read.
        """
        provenance = self.manifest.provenance
        position = self._position(frame)
        shard, row = divmod(position, self.manifest.frames_per_shard)
        path = shard_path(self.folder, shard)
        try:
            # Opened for this one row: the pages of a mapped file count as memory until it is closed.
            with safe_open(path, framework="pt") as file:
                actions = file.get_slice(TENSOR_NAME)[row, pair]
        except (SafetensorError, OSError, IndexError) as error:
            raise ReflowError(f"The pairs in {path} cannot be read ({error}).") from None
        shape = (provenance.chunk_size, provenance.max_action_dim)
        return Coupling(pair_noise(provenance.seed, frame, pair, shape), actions.to(torch.float32))

    def draw(self, frames: Sequence[int], device: torch.device, per_frame: int = 1) -> Coupling:
        """`per_frame` = K of each frame's pairs at random, (B * K, chunk_size, max_action_dim) float32 on `device`.

        No pair of a frame comes twice before each has come once.
        """
        stored = self.manifest.provenance.pairs_per_frame
        rounds = -(-per_frame // stored)
        couplings = [
            self.lookup(frame, pair)
            for frame in frames
            for pair in torch.randperm(stored).repeat(rounds)[:per_frame].tolist()
        ]
        return Coupling(
            noise=torch.stack([c.noise for c in couplings]).to(device),
            actions=torch.stack([c.actions for c in couplings]).to(device),
        )

    def _position(self, frame: int) -> int:
        i = bisect.bisect_right(self._starts, frame) - 1
        if i < 0 or frame >= self.manifest.frames[i][1]:
            raise ReflowError(f"Frame {frame} has no pairs in {self.folder}.")
        return self._offsets[i] + frame - self._starts[i]
