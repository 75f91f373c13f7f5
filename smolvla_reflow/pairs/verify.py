"""Verify stored pairs: every file is the one that was written, and the teacher, asked again, gives the same actions."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.configs.default import DatasetConfig
from torch import Tensor

from smolvla_reflow.checkpoint.read import Checkpoint, open_checkpoint
from smolvla_reflow.compat import dataset_to_policy_features, renamed_statistics
from smolvla_reflow.dataset import TOLERANCE_S, dataset_statistics, load_batches, open_dataset, open_metadata
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs.config import VerifyConfig
from smolvla_reflow.pairs.maker import PairMaker, load_pair_maker
from smolvla_reflow.pairs.manifest import DTYPES, Manifest
from smolvla_reflow.pairs.plan import SEEN_THROUGH
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.features import fitted, saved_rename_map
from smolvla_reflow.smolvla.normalization import space_maps

SAMPLED_FRAMES = 32


@dataclass(frozen=True)
class Verification:
    """How near the stored pairs are to those that the teacher gives now.

    Attributes:
        folder: of the pairs.
        num_pairs: in the folder.
        num_solved: of them, solved again.
        largest_difference: between a stored and a new value, in normalised units.
        dtype: in which the pairs are stored.
        rounding: the largest error of storing these values in that dtype.
    """

    folder: Path
    num_pairs: int
    num_solved: int
    largest_difference: float
    dtype: str
    rounding: float

    def in_words(self) -> str:
        return (
            f"{self.num_pairs} pairs in {self.folder}: every file is the one that was written. Of {self.num_solved} "
            f"pairs solved again, the largest difference is {self.largest_difference:.2g} in normalised units "
            f"({self.dtype} rounds by up to {self.rounding:.2g})."
        )


def verify(cfg: VerifyConfig) -> Verification:
    """Check every file, and solve a random sample of the pairs again.

    Raises:
        ReflowError: the pairs are unfinished or damaged, the user has not named their teacher and dataset, or what
            was named cannot be opened or is another teacher.
    """
    pairs = Pairs(cfg.verify)
    pairs.check()
    made = pairs.manifest.provenance
    check_named(cfg, pairs.manifest.made_from)
    teacher = open_checkpoint(cfg.teacher_path or "", _revision(cfg, pairs), cfg.policy.vlm_model_name)
    found = teacher.fingerprint()
    if found != made.teacher:
        raise ReflowError(
            f"{teacher.source} is not the teacher of these pairs: its fingerprint is {found}, and the "
            f"one in their manifest is {made.teacher}. Name the teacher with --teacher_path."
        )
    where, tolerance_s = as_it_was_opened(cfg, pairs.manifest)
    maker = _pair_maker(cfg, pairs, teacher, where)
    dataset = open_dataset(where, tolerance_s=tolerance_s)
    every = [frame for start, stop in pairs.manifest.frames for frame in range(start, stop)]
    frames = sorted(random.Random(cfg.seed).sample(every, min(SAMPLED_FRAMES, len(every))))
    again = maker(next(load_batches(dataset, [frames])))
    stored = torch.stack(
        [
            torch.stack([pairs.lookup(frame, pair).actions for pair in range(made.couplings_per_frame)])
            for frame in frames
        ]
    )
    return Verification(
        folder=cfg.verify,
        num_pairs=len(pairs),
        num_solved=len(frames) * made.couplings_per_frame,
        largest_difference=(again - stored).abs().max().item(),
        dtype=made.dtype,
        rounding=rounding(stored, made.dtype),
    )


def _revision(cfg: VerifyConfig, pairs: Pairs) -> str | None:
    """Of a teacher on the hub: what was asked for, or else the commit that the pairs were made with."""
    if cfg.teacher_revision or Path(cfg.teacher_path or "").expanduser().exists():
        return cfg.teacher_revision
    return pairs.manifest.made_from.get("teacher_commit")


def check_named(cfg: VerifyConfig, origin: dict[str, Any]) -> None:
    """Raise ReflowError if the user has not said what to open: a manifest is not followed out of its folder."""
    recorded = {name: origin.get(name) for name in ("teacher_path", "dataset_root", "dataset_revision")}
    missing = [f"--{name}={value}" for name, value in recorded.items() if value and not getattr(cfg, name)]
    if not cfg.teacher_path or missing:
        raise ReflowError(
            f"Say where to find what the pairs in {cfg.verify} were made from; their manifest has it at "
            f"{' '.join(missing) or '--teacher_path=...'}"
        )


class Opened(NamedTuple):
    """Which dataset to open, and by how many seconds a video's frame may be off its time."""

    dataset: DatasetConfig
    tolerance_s: float


def as_it_was_opened(cfg: VerifyConfig, manifest: Manifest) -> Opened:
    """The dataset of the pairs where the user says it is, with the settings with which they were made.

    Raises:
        ReflowError: the manifest holds other settings than this command writes.
    """
    origin = manifest.made_from
    try:
        recorded = {name: value for name, value in origin.get("dataset", {}).items() if name in SEEN_THROUGH}
        made_with = float(origin.get("tolerance_s", TOLERANCE_S))
        dataset = DatasetConfig(
            repo_id=manifest.provenance.dataset, root=cfg.dataset_root, revision=cfg.dataset_revision, **recorded
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ReflowError(f"The manifest in {cfg.verify} is damaged ({error}); make the pairs again.") from None
    if cfg.video_backend:
        dataset.video_backend = cfg.video_backend
    return Opened(dataset, made_with if cfg.tolerance_s is None else cfg.tolerance_s)


def rounding(actions: Tensor, dtype: str) -> float:
    """The largest error of storing actions of this size in `dtype`."""
    return (actions.abs().max() * torch.finfo(DTYPES[dtype]).eps / 2).item()


def _pair_maker(cfg: VerifyConfig, pairs: Pairs, teacher: Checkpoint, where: DatasetConfig) -> PairMaker:
    device = cfg.policy.on(cfg.policy.this_process())
    manifest = pairs.manifest
    rename_map = manifest.provenance.rename_map or manifest.made_from.get("rename_map") or saved_rename_map(teacher)
    metadata = open_metadata(where, teacher.config)
    teacher = fitted(teacher, dataset_to_policy_features(metadata.features), rename_map)
    space = space_maps(teacher, renamed_statistics(dataset_statistics(metadata, where), rename_map))
    return load_pair_maker(teacher, pairs.manifest.provenance, space, device, rename_map)
