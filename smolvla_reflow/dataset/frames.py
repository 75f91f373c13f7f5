"""The frames of an open dataset: loaded in batches, named if they cannot be read, refused if they hold NaN."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import FrameTimestampError
from torch.utils.data import DataLoader

from smolvla_reflow.compat import LeRobotDatasetMetadata, collate_function, renamed_batch
from smolvla_reflow.dataset.opening import frame_ranges
from smolvla_reflow.errors import ReflowError, doing, first_line, kind_and_line
from smolvla_reflow.smolvla.statistics import TYPES

AT_ONCE = 100_000  # rows of a table in memory
NAMED = 10  # numbers of frames or episodes in a message


def load_batches(
    dataset: LeRobotDataset,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
    rename_map: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Load batches (of positions in the dataset), collated, converted and renamed as in LeRobot's training."""
    name_unreadable_frames(dataset)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=collate_function(dataset.meta),
    )
    loaded = iter(loader)
    for _ in batches:
        with doing("reading the dataset's frames"):
            batch = next(loaded)
        seen = {name: _as_training_sees(value, name in dataset.meta.camera_keys) for name, value in batch.items()}
        yield renamed_batch(seen, rename_map or {})


def _as_training_sees(value: Any, is_image: bool) -> Any:
    """LeRobot's training converts images that were loaded as uint8, from 0.5 on."""
    return value.to(torch.float32) / 255.0 if is_image and value.dtype == torch.uint8 else value


def name_unreadable_frames(dataset: LeRobotDataset) -> None:
    """Let an error in reading a frame name the frame, also in a loader's process.

    PyTorch's loaders read a batch by a dataset's `__getitems__`, where there is one.
    """
    vars(dataset)["__getitems__"] = _Frames(dataset)


@dataclass(frozen=True)
class _Frames:
    """Several frames of a dataset, by their positions."""

    dataset: LeRobotDataset

    def __call__(self, positions: Sequence[int]) -> list[Any]:
        return [self._frame(position) for position in positions]

    def _frame(self, position: int) -> Any:
        try:
            return self.dataset[position]
        except Exception as error:  # each decoder raises another kind of error
            raise self._error(position, error) from error

    def _error(self, position: int, error: Exception) -> ReflowError:
        frame, episode = self._unreadable(position)
        where = f"While reading frame {frame} of the dataset (episode {episode})"
        leave_out = "leave the episode out with --dataset.episodes"
        if isinstance(error, FrameTimestampError):
            return ReflowError(
                f"{where}: its timestamp does not match the video: {first_line(error).rstrip('.')}. Allow for more "
                f"with --tolerance_s, now {self.dataset.tolerance_s:g} seconds (half the time between two frames is a "
                f"sensible maximum). If a part of the video is missing, {leave_out}."
            )
        return ReflowError(
            f"{where}: {kind_and_line(error)}. Record or copy that episode again, or {leave_out}. If no video can be "
            "decoded, try another --dataset.video_backend (pyav needs nothing installed)."
        )

    def _unreadable(self, position: int) -> tuple[int, int]:
        """The frame that cannot be read, and its episode. LeRobot reads a frame's row together with its chunk's."""
        metadata = self.dataset.meta
        frames = chain.from_iterable(frame_ranges(metadata, self.dataset.episodes))
        frame = next(islice(frames, position, None))
        (episode,) = _episodes_of(metadata, [frame])
        for ahead in range(metadata.episodes["dataset_to_index"][episode] - frame):
            try:
                self.dataset.hf_dataset[position + ahead]
            except Exception:  # see `_frame`
                return frame + ahead, episode
        return frame, episode


def _episodes_of(metadata: LeRobotDatasetMetadata, frames: Sequence[int]) -> list[int]:
    """The episode of each frame."""
    stops = metadata.episodes["dataset_to_index"][:]
    return [bisect_right(stops, frame) for frame in frames]


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return ", ".join(map(str, numbers[:NAMED])) + more


def check_finite(dataset: LeRobotDataset, names: Iterable[str]) -> None:
    """Raise ReflowError if these columns of the dataset hold NaN or infinity: a policy would learn NaN of them."""
    for name in (name for name in names if name in dataset.hf_dataset.column_names):
        table, bad = dataset.hf_dataset.select_columns([name, "index"]).with_format("numpy"), list[int]()
        for rows in table.iter(batch_size=AT_ONCE):
            values = np.stack(rows[name]) if rows[name].dtype == object else rows[name]
            finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            bad += rows["index"][~finite].tolist()
        if bad:
            episodes = sorted({*_episodes_of(dataset.meta, bad)})
            raise ReflowError(
                f"The dataset's '{name}' holds NaN or infinity in {len(bad)} of {len(table)} frames: "
                f"{_listed(bad)} (in episodes {_listed(episodes)}). Leave those episodes out with --dataset.episodes, "
                "or record them again."
            )


def episodes_of(dataset: LeRobotDataset, positions: Sequence[int]) -> list[int]:
    """The episode of each of these positions in the dataset."""
    return dataset.hf_dataset.select_columns("episode_index").with_format("numpy")[positions]["episode_index"].tolist()


def trained_columns(features: Iterable[str], rename_map: Mapping[str, str]) -> list[str]:
    """The columns of a dataset that become a policy's state and actions."""
    return [name for name in features if rename_map.get(name, name) in TYPES]


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` positions from 0 to `total - 1`, both included; every position if there are fewer."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
