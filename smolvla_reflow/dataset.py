"""A LeRobotDataset as LeRobot itself opens it: metadata, frames and statistics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot.configs.default import DatasetConfig
from lerobot.datasets.factory import IMAGENET_STATS
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import INFO_PATH

from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.smolvla.checkpoint import read_json
from smolvla_reflow.smolvla.normalization import Statistics


def open_metadata(dataset: DatasetConfig) -> LeRobotDatasetMetadata:
    """The dataset's metadata, from its folder or from the hub.

    Raises:
        ReflowError: there is no such dataset.
    """
    try:
        return LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision)
    except Exception as error:  # the hub client's and LeRobot's errors share no base class
        where = f"--dataset.root={dataset.root}" if dataset.root else f"--dataset.repo_id={dataset.repo_id}"
        if dataset.root and _is_empty(Path(dataset.root)):
            raise ReflowError(f"The episodes at {where} hold 0 frames; record some.") from None
        raise ReflowError(
            f"There is no LeRobotDataset at {where}, nor could it be downloaded ({first_line(error)})."
        ) from None


def _is_empty(root: Path) -> bool:
    """Whether nothing was recorded into this dataset; LeRobot 0.4 reports such a dataset as missing."""
    try:
        return read_json(root / INFO_PATH).get("total_frames") == 0
    except ReflowError:
        return False


def open_dataset(dataset: DatasetConfig, **options: Any) -> LeRobotDataset:
    """The frames themselves, as they were recorded; `options` are LeRobotDataset's own."""
    return LeRobotDataset(
        dataset.repo_id,
        root=dataset.root,
        episodes=dataset.episodes,
        revision=dataset.revision,
        video_backend=dataset.video_backend,
        **options,
    )


def dataset_statistics(metadata: LeRobotDatasetMetadata, dataset: DatasetConfig) -> Statistics:
    """The statistics by which LeRobot normalises this dataset's batches."""
    stats = dict(metadata.stats)
    if dataset.use_imagenet_stats:
        stats |= {camera: {**stats.get(camera, {}), **IMAGENET_STATS} for camera in metadata.camera_keys}
    return stats


def frame_ranges(metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None) -> list[range]:
    """The indices of all frames of these episodes (None for all), as ascending ranges without gaps between them.

    Raises:
        ReflowError: there is no such episode.
    """
    chosen = range(metadata.total_episodes) if episodes is None else sorted(set(episodes))
    unknown = [episode for episode in chosen if not 0 <= episode < metadata.total_episodes]
    if unknown:
        raise ReflowError(
            f"--dataset.episodes: the dataset has {metadata.total_episodes}, and no episode {unknown[0]}; they are "
            "counted from 0."
        )
    ranges: list[range] = []
    for episode in chosen:
        row = metadata.episodes[episode]
        start, stop = int(row["dataset_from_index"]), int(row["dataset_to_index"])
        if ranges and ranges[-1].stop == start:
            start = ranges.pop().start
        ranges.append(range(start, stop))
    return ranges
