"""The frames to measure on: evenly spaced over the dataset, each with the chunk that was recorded from it on."""

from collections.abc import Iterator, Sequence
from typing import Any

from lerobot.configs.default import DatasetConfig
from torch.utils.data import DataLoader, Subset

from smolvla_reflow.dataset import open_dataset


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` positions from 0 to `total - 1`, both included; every position if there are fewer."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def load_frames(
    dataset: DatasetConfig, positions: Sequence[int], *, chunk_size: int, fps: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Raw batches of the frames at these positions, each with its recorded chunk of actions."""
    frames = open_dataset(dataset, delta_timestamps={"action": [i / fps for i in range(chunk_size)]})
    yield from DataLoader(Subset(frames, list(positions)), batch_size=batch_size)
