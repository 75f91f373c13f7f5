"""The frames to measure on: evenly spaced over the dataset, each with the chunk that was recorded from it on."""

from collections.abc import Iterator, Sequence
from typing import Any

from lerobot.configs.default import DatasetConfig

from smolvla_reflow.dataset import TOLERANCE_S, load_batches, open_dataset


def load_frames(
    dataset: DatasetConfig,
    positions: Sequence[int],
    *,
    chunk_size: int,
    batch_size: int,
    tolerance_s: float = TOLERANCE_S,
) -> Iterator[dict[str, Any]]:
    """Raw batches of the frames at these positions, each with its recorded chunk of actions.

    Args:
        dataset: whose frames they are. If it has a share of episodes held out from training, the frames are of those.
        positions: of the frames among all that are chosen.
        chunk_size: how many actions.
        batch_size: frames at once.
        tolerance_s: by how many seconds a video's frame may be off its time.

    Raises:
        ReflowError: a frame cannot be read.
    """
    frames = open_dataset(dataset, chunk_size=chunk_size, tolerance_s=tolerance_s, held_out=True)
    return load_batches(frames, [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)])
