"""Pairs read where the images are: in the processes of the data loader, ahead of the step that trains on them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from lerobot.utils.constants import INFO
from torch.utils.data import DataLoader

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs.store import Pairs


def read_in_loader(loader: DataLoader, pairs: Pairs, per_frame: int) -> None:
    """Let a loader of a LeRobotDataset's frames put `per_frame` of each frame's pairs into its batches."""
    loader.collate_fn = CollateWithPairs(loader.collate_fn, pairs, per_frame, PartialState().process_index)


@dataclass(frozen=True)
class CollateWithPairs:
    """A loader's own way to make a batch of frames, followed by `per_frame` pairs of each frame.

    LeRobot seeds all training processes alike; `process`, the number of this one, makes each choose its own pairs.
    """

    collate: Callable[[list[Any]], Any]
    pairs: Pairs
    per_frame: int
    process: int

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        if isinstance(batch, dict) and "index" in batch and INFO not in batch:
            # The step reads pairs that are missing from the batch; an error there reaches the user as it is.
            with contextlib.suppress(ReflowError):
                self.pairs.bring(batch, self.per_frame, self.generator)
        return batch

    @cached_property
    def generator(self) -> torch.Generator:
        """Seeded once in each process of the loader, from torch's seed in that process."""
        seed = np.random.SeedSequence([torch.initial_seed(), self.process]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed[0]))
