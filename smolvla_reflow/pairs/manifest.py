"""The manifest of a set of stored couplings: what they depend on, the frames that they cover, and the finished files.

    DIR/manifest.json              all of that
    DIR/pairs-00000.safetensors    "actions" (frames, couplings_per_frame, chunk_size, max_action_dim)

Only actions are stored; their noise is drawn again (`smolvla_reflow.noise`). The frames of the set are put in ascending
order and cut into shards of equal length, so a frame's place follows from its index.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smolvla_reflow.errors import ReflowError, first_line, sha256, write_whole
from smolvla_reflow.solver import Solver

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TENSOR_NAME = "actions"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Provenance:
    """Everything that the pairs depend on. Two sets of equal provenance hold equal pairs, up to rounding."""

    teacher: str  # SHA-256 of its weights, its configuration and its statistics
    dataset: str  # its repo_id
    total_frames: int  # of the whole dataset
    statistics: str  # SHA-256 of the dataset's statistics; the actions are in their normalised space
    solver: Solver  # of the teacher's ODE, with every value filled in
    chunk_size: int  # of one pair
    max_action_dim: int
    seed: int  # of the noise
    couplings_per_frame: int  # stored for each frame
    dtype: str  # of the stored actions
    scaled_noise: float = 0.0  # share of the pairs whose noise is scaled (`smolvla_reflow.noise.scaled`)
    rename_map: dict[str, str] = field(default_factory=dict)  # from the dataset's names to the teacher's


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`."""

    provenance: Provenance  # what the pairs depend on
    made_from: dict[str, Any]  # where teacher and dataset were found, for people
    package_version: str  # of smolvla-reflow, when the set was begun
    frames: list[list[int]]  # ascending [first, last + 1) ranges of frame indices with gaps between them
    frames_per_shard: int  # frames in each shard but the last, which may have fewer
    checksums: dict[int, str] = field(default_factory=dict)  # SHA-256 of each finished shard's file, by shard number
    bytes_per_pair: int = 0  # on disk
    format_version: int = FORMAT_VERSION  # of this layout

    @property
    def num_frames(self) -> int:
        return sum(stop - start for start, stop in self.frames)

    @property
    def num_shards(self) -> int:
        return -(-self.num_frames // self.frames_per_shard)

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the missing shards."""
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
        """Write the file so that at any moment either the old or the new one is complete."""
        values = dataclasses.asdict(self)
        values["checksums"] = {str(shard): self.checksums[shard] for shard in sorted(self.checksums)}
        write_whole(folder / MANIFEST_NAME, (json.dumps(values, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ReflowError(f"{folder} holds no pairs: there is no {MANIFEST_NAME}. Make them with smolvla-reflow-pairs.")
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version == FORMAT_VERSION:
            return _parsed(values)
    except Exception as error:  # any value may be of any kind
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ReflowError(f"{path} is damaged ({said}); make the pairs again.") from None
    raise ReflowError(
        f"{path} has format version {version}, this package reads {FORMAT_VERSION}; install the smolvla-reflow that "
        "wrote it, or make the pairs again."
    )


def _parsed(values: dict[str, Any]) -> Manifest:
    """The manifest of these JSON values. Raises an exception of any kind if they are damaged."""
    provenance, checksums = values.pop("provenance"), values.pop("checksums")
    provenance["solver"] = Solver(**provenance["solver"])
    checksums = {int(shard): str(checksum) for shard, checksum in checksums.items()}
    manifest = Manifest(provenance=Provenance(**provenance), checksums=checksums, **values)
    p = manifest.provenance
    counts = [p.total_frames, p.chunk_size, p.max_action_dim, p.couplings_per_frame, manifest.frames_per_shard]
    counts += [p.solver.num_steps] if p.solver.num_steps is not None else []
    bounds = [bound for start, stop in manifest.frames for bound in (start, stop)]
    if not all(type(number) is int for number in (*counts, *bounds, p.seed)) or min(*counts, p.seed + 1) < 1:
        raise ValueError("a count is no positive integer")
    if p.seed >= 2**128:  # the largest key of Philox
        raise ValueError(f"seed {p.seed} is too large")
    if p.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {p.dtype}")
    if not 0 <= p.scaled_noise <= 1:
        raise ValueError(f"scaled_noise {p.scaled_noise} is no share")
    if bounds[0] < 0 or bounds != sorted(set(bounds)) or bounds[-1] > p.total_frames:
        raise ValueError("frames are not ascending ranges of the dataset's")
    if not set(checksums) <= set(range(manifest.num_shards)):
        raise ValueError("a checksum without a shard")
    return manifest


def shard_path(folder: Path, shard: int) -> Path:
    """A shard's file. Its name follows from the number alone, so no manifest can lead out of its folder."""
    return folder / f"pairs-{shard:05d}.safetensors"


def check_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the finished shards with a file that is missing or was changed."""
    return [shard for shard, checksum in manifest.checksums.items() if _checksum(shard_path(folder, shard)) != checksum]


def _checksum(path: Path) -> str | None:
    try:
        return sha256(path).hexdigest()
    except OSError:
        return None


def not_as_written(shards: list[int]) -> str:
    """A clause that names up to three damaged shards."""
    names = [shard_path(Path(), shard).name for shard in shards[:3]]
    if len(shards) == 1:
        return f"{names[0]} is not the file that was written"
    others = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
    return f"{', '.join(names)}{others} are not the files that were written"


def differences(here: Provenance, in_the_pairs: Provenance) -> list[str]:
    """The values that differ, each as a text with its name and both values."""
    now, then = by_flag(here), by_flag(in_the_pairs)
    return [f"{name} is {then[name]} in the pairs and {now[name]} here" for name in now if now[name] != then[name]]


def by_flag(provenance: Provenance) -> dict[str, Any]:
    """The values, the solver's too, by the names of their flags."""
    fields = dict(vars(provenance))
    solver = dict(vars(fields.pop("solver")))
    return {**fields, "solver": solver.pop("method"), **solver}
