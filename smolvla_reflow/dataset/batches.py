"""Batches of a dataset's frames, collated and converted as LeRobot's training loop does it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import FrameTimestampError
from torch.utils.data import DataLoader

from smolvla_reflow.compat import collate_function
from smolvla_reflow.errors import ReflowError, first_line


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` positions from 0 to `total - 1`, both included; every position if there are fewer."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def load_batches(
    dataset: LeRobotDataset, batches: Sequence[Sequence[int]], num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Load batches of frames, each named by the positions of its frames in the dataset.

    Args:
        dataset: with the frames.
        batches: which of them.
        num_workers: processes that load frames.

    Raises:
        ReflowError: a frame cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=collate_function(dataset.meta),
    )
    loaded = iter(loader)
    for _ in batches:
        try:
            batch = next(loaded)
        except Exception as error:  # whatever a broken file leads a decoder to
            raise frame_error(error, dataset.tolerance_s) from error
        yield {name: _as_training_sees(value, name in dataset.meta.camera_keys) for name, value in batch.items()}


def _as_training_sees(value: Any, is_image: bool) -> Any:
    """Training converts images that were loaded as uint8, which LeRobot does from 0.5 on."""
    return value.to(torch.float32) / 255.0 if is_image and value.dtype == torch.uint8 else value


def frame_error(error: Exception, tolerance_s: float) -> ReflowError:
    """The sentence about an error that LeRobot raised while it opened a dataset or read a frame."""
    said = _said(error)
    if isinstance(error, FrameTimestampError):
        return ReflowError(
            f"The dataset's timestamps are not those of its videos: {said} Allow for more with --tolerance_s, here "
            f"{tolerance_s:g} seconds; half the time between two frames is the most that makes sense."
        )
    return ReflowError(
        f"The dataset's frames cannot be read: {type(error).__name__}: {said} If a video cannot be decoded, try "
        "another --dataset.video_backend (pyav needs nothing installed); otherwise download the dataset again."
    )


def _said(error: Exception) -> str:
    """What an error says first, also if it was raised in a process that loads frames."""
    in_another_process = re.search(r"^Original Traceback.*?^[\w.]+: ([^\n]*)", str(error), re.DOTALL | re.MULTILINE)
    said = in_another_process[1] if in_another_process else first_line(error)
    return said if said.endswith(".") else f"{said}."
