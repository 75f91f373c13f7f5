"""The manifest of a set of stored couplings: what they depend on, which frames they cover, and which files are whole.

    DIR/manifest.json              all of that
    DIR/pairs-00000.safetensors    "actions" (frames, couplings_per_frame, chunk_size, max_action_dim)

Only the actions are stored; the noise they belong to is drawn again (`smolvla_reflow.noise`). The frames of the
set are put in ascending order and cut into shards of equal length, so a frame's place follows from its index.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smolvla_reflow.errors import ReflowError, sha256, write_whole
from smolvla_reflow.solver import Solver

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"
TENSOR_NAME = "actions"
SOLVER_VALUES = tuple(field.name for field in dataclasses.fields(Solver) if field.name != "method")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Provenance:
    """Everything that the pairs depend on. Two sets of equal provenance hold equal pairs, up to rounding.

    Attributes:
        teacher: SHA-256 of its weights, its configuration and its statistics.
        dataset: its repo_id.
        total_frames: of the whole dataset.
        statistics: SHA-256 of the dataset's statistics, in whose normalised space the actions are.
        solver: of the teacher's ODE, with every value filled in.
        chunk_size, max_action_dim: of one pair.
        seed: of the noise.
        couplings_per_frame: stored for each frame.
        dtype: in which actions are stored.
        rename_map: from the dataset's names to the teacher's; None in a set that was made before this was noted.
    """

    teacher: str
    dataset: str
    total_frames: int
    statistics: str
    solver: Solver
    chunk_size: int
    max_action_dim: int
    seed: int
    couplings_per_frame: int
    dtype: str
    rename_map: dict[str, str] | None = None


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
    """Read `folder/manifest.json`, of this format version or an earlier one.

    Raises:
        ReflowError: there is none, it is of a later version, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ReflowError(f"{folder} holds no pairs: there is no {MANIFEST_NAME}. Make them with smolvla-reflow-pairs.")
    try:
        values = json.loads(path.read_text())
        version = values.pop("format_version")
        manifest = _parsed(values, version) if version in READABLE_VERSIONS else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReflowError(f"{path} is damaged ({type(error).__name__}: {error}); make the pairs again.") from None
    if manifest is None:
        raise ReflowError(
            f"{path} has format version {version}, this package reads {' and '.join(map(str, READABLE_VERSIONS))}; "
            "install a newer smolvla-reflow, or make the pairs again."
        )
    return manifest


def _parsed(values: dict[str, Any], version: int) -> Manifest:
    """The manifest of these JSON values. Raises ValueError, TypeError, KeyError or AttributeError if it is not one."""
    provenance = values.pop("provenance")
    if version == 1:
        provenance = _from_version_1(provenance)
    provenance = Provenance(**{**provenance, "solver": Solver(**provenance["solver"])})
    checksums = {int(shard): str(checksum) for shard, checksum in values.pop("checksums").items()}
    manifest = Manifest(provenance=provenance, checksums=checksums, **values)
    _check_values(manifest)
    return manifest


def _from_version_1(provenance: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had the solver's values beside the others, its method as `solver`, and another name for the count."""
    fields = dict(provenance)
    solver = {"method": fields.pop("solver"), **{name: fields.pop(name) for name in SOLVER_VALUES}}
    count = fields.pop("pairs_per_frame")
    return {**fields, "solver": solver, "couplings_per_frame": count}


def _check_values(manifest: Manifest) -> None:
    p = manifest.provenance
    counts = [p.total_frames, p.chunk_size, p.max_action_dim, p.couplings_per_frame, manifest.frames_per_shard]
    if p.solver.num_steps is not None:
        counts.append(p.solver.num_steps)
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
        raise ValueError("a checksum without a shard")
    if not isinstance(manifest.made_from, dict):
        raise ValueError("made_from is not an object")
    if not isinstance(manifest.made_from.get("rename_map") or {}, dict):
        raise ValueError("made_from.rename_map is not an object")


def shard_path(folder: Path, shard: int) -> Path:
    """A shard's file. It follows from the number alone, so that no manifest can lead out of its folder."""
    return folder / f"pairs-{shard:05d}.safetensors"


def check_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the finished shards whose file is missing or is not the one that was written."""
    return [shard for shard, checksum in manifest.checksums.items() if _checksum(shard_path(folder, shard)) != checksum]


def _checksum(path: Path) -> str | None:
    try:
        return sha256(path).hexdigest()
    except OSError:
        return None


def not_as_written(shards: list[int]) -> str:
    """A clause that names damaged shards, the first three of them."""
    names = [shard_path(Path(), shard).name for shard in shards[:3]]
    if len(shards) == 1:
        return f"{names[0]} is not the file that was written"
    others = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
    return f"{', '.join(names)}{others} are not the files that were written"


def differences(here: Provenance, in_the_pairs: Provenance) -> list[str]:
    """The values in which the two differ, each as a text with its name and both values."""
    now, then = _by_flag(here), _by_flag(in_the_pairs)
    if in_the_pairs.rename_map is None:
        now["rename_map"] = None
    return [f"{name} is {then[name]} in the pairs and {now[name]} here" for name in now if now[name] != then[name]]


def _by_flag(provenance: Provenance) -> dict[str, Any]:
    """Its values, the solver's too, by the names of the flags that set them."""
    fields = dict(vars(provenance))
    solver = fields.pop("solver")
    return {**fields, "solver": solver.method, **{name: getattr(solver, name) for name in SOLVER_VALUES}}
