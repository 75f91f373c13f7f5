"""Verify stored pairs: every file is the one that was written, and the teacher, asked again, gives the same actions."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig
from torch import Tensor
from torch.utils.data import DataLoader

from smolvla_reflow.dataset import dataset_statistics, open_dataset, open_metadata
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs.config import VerifyConfig
from smolvla_reflow.pairs.maker import PairMaker, load_pair_maker
from smolvla_reflow.pairs.manifest import DTYPES
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.checkpoint import Checkpoint, open_checkpoint
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
    teacher = open_checkpoint(cfg.teacher_path or "")
    if teacher.fingerprint() != made.teacher:
        raise ReflowError(
            f"{teacher.source} is not the teacher of these pairs: its fingerprint is {teacher.fingerprint()}, and the "
            f"one in their manifest is {made.teacher}. Name the teacher with --teacher_path."
        )
    where = DatasetConfig(repo_id=made.dataset, root=cfg.dataset_root, revision=cfg.dataset_revision)
    maker = _pair_maker(cfg, pairs, teacher, where)
    every = [frame for start, stop in pairs.manifest.frames for frame in range(start, stop)]
    frames = sorted(random.Random(cfg.seed).sample(every, min(SAMPLED_FRAMES, len(every))))
    again = maker(next(iter(DataLoader(open_dataset(where), batch_sampler=[frames]))))
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


def check_named(cfg: VerifyConfig, origin: dict[str, Any]) -> None:
    """Raise ReflowError if the user has not said what to open: a manifest is not followed out of its folder."""
    recorded = {name: origin.get(name) for name in ("teacher_path", "dataset_root", "dataset_revision")}
    missing = [f"--{name}={value}" for name, value in recorded.items() if value and not getattr(cfg, name)]
    if not cfg.teacher_path or missing:
        raise ReflowError(
            f"Say where to find what the pairs in {cfg.verify} were made from; their manifest has it at "
            f"{' '.join(missing) or '--teacher_path=...'}"
        )


def rounding(actions: Tensor, dtype: str) -> float:
    """The largest error of storing actions of this size in `dtype`."""
    return (actions.abs().max() * torch.finfo(DTYPES[dtype]).eps / 2).item()


def _pair_maker(cfg: VerifyConfig, pairs: Pairs, teacher: Checkpoint, where: DatasetConfig) -> PairMaker:
    device = cfg.policy.on(cfg.policy.this_process())
    space = space_maps(teacher, dataset_statistics(open_metadata(where), where))
    rename_map = pairs.manifest.made_from.get("rename_map") or {}
    return load_pair_maker(teacher, pairs.manifest.provenance, space, device, rename_map)
