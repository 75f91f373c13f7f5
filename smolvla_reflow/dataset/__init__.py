"""A LeRobotDataset as LeRobot's own training opens it, or in a sentence what is wrong with its files."""

from smolvla_reflow.dataset.batches import evenly_spaced, frame_error, load_batches
from smolvla_reflow.dataset.opening import (
    TOLERANCE_S,
    check_as_recorded,
    chosen_episodes,
    dataset_statistics,
    frame_ranges,
    in_home,
    is_downloaded,
    open_configured,
    open_dataset,
    open_metadata,
)

__all__ = [
    "TOLERANCE_S",
    "check_as_recorded",
    "chosen_episodes",
    "dataset_statistics",
    "evenly_spaced",
    "frame_error",
    "frame_ranges",
    "in_home",
    "is_downloaded",
    "load_batches",
    "open_configured",
    "open_dataset",
    "open_metadata",
]
