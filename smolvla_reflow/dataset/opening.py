"""A dataset opened as LeRobot's training opens it, and the faults of a dataset that LeRobot would pass over in silence.

LeRobot reports missing files and files that were cut off; its error becomes one sentence. Three faults it does not
report are refused: episodes and counts that contradict each other, statistics that are missing or of another width, and
statistics that are not finite. Files and columns that LeRobot does not read are not looked at.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import PolicyFeature
from lerobot.datasets.factory import IMAGENET_STATS
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset
from lerobot.datasets.utils import EPISODES_DIR, INFO_PATH, STATS_PATH, BackwardCompatibilityError
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import HF_LEROBOT_HOME

from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    chosen_by_lerobot,
    conversion_command,
    dataset_to_policy_features,
    depth_cameras,
    holds_out,
    is_bucket,
    open_as_training,
    open_metadata_as_training,
    statistics_command,
)
from smolvla_reflow.errors import ReflowError, causes, doing, in_one_line, kind_and_line
from smolvla_reflow.smolvla.statistics import TYPES, Statistics, in_use

# Default of lerobot-train's --tolerance_s, in seconds.
TOLERANCE_S = TrainPipelineConfig.tolerance_s


# --- metadata -------------------------------------------------------------------------------------------------


def open_metadata(dataset: DatasetConfig, policy: SmolVLAConfig | None = None) -> LeRobotDatasetMetadata:
    """The metadata of a dataset, from folder or hub; `policy` (default a stock SmolVLA) needs its statistics."""
    root = _root(dataset)
    was_there = root.exists()
    try:
        metadata = open_metadata_as_training(dataset)
    except Exception as error:  # the errors of the hub client, Arrow and LeRobot share no base class
        if not was_there:
            _remove_empty(root)
        raise _cannot_open(dataset, root, error) from error
    with doing(f"opening the dataset at {_where(dataset)}"):
        _check_counts(dataset, metadata)
        _check_statistics(dataset, metadata, policy or SmolVLAConfig(device="cpu"))
    return metadata


def policy_features(metadata: LeRobotDatasetMetadata) -> dict[str, PolicyFeature]:
    """The features that LeRobot would give a policy of this dataset. Raises ReflowError if LeRobot cannot."""
    with doing(f"reading the features in {metadata.root / INFO_PATH}"):
        return dataset_to_policy_features(metadata.features)


def _check_counts(dataset: DatasetConfig, metadata: LeRobotDatasetMetadata) -> None:
    """Refuse counts that contradict each other: LeRobot would leave out frames, or read actions of other frames."""
    table, where = metadata.episodes, _where(dataset)
    if table is None:  # LeRobot reads no list where info.json says 0 episodes, from 0.6 on
        raise _no_frames(dataset)
    starts, stops = table["dataset_from_index"][:], table["dataset_to_index"][:]
    in_order = table["episode_index"][:] == list(range(len(table)))
    if not in_order or starts != [0, *stops[:-1]][: len(starts)] or stops != sorted(stops):
        raise ReflowError(
            f"The episodes of the dataset at {where} do not follow each other without gaps (dataset_from_index and "
            f"dataset_to_index in {EPISODES_DIR}), so LeRobot would read actions of other frames. Convert or copy the "
            "dataset again."
        )
    said, listed = (metadata.total_episodes, metadata.total_frames), (len(table), max(stops, default=0))
    if said != listed:
        raise ReflowError(
            f"The dataset at {where} contradicts itself: {INFO_PATH} says {said[0]} episodes and {said[1]} frames, and "
            f"{EPISODES_DIR} lists {listed[0]} and {listed[1]}. If the list is right, correct {INFO_PATH} "
            "(total_episodes, total_frames); otherwise copy the dataset again."
        )
    if not any(map(len, frame_ranges(metadata, chosen_by_lerobot(dataset, metadata.total_episodes)))):
        raise _no_frames(dataset)


def _check_statistics(dataset: DatasetConfig, metadata: LeRobotDatasetMetadata, policy: SmolVLAConfig) -> None:
    """Refuse statistics that are missing, of another width or not finite: LeRobot would normalise wrongly."""
    anew = f"Compute all statistics anew with: {statistics_command(metadata.repo_id, metadata.root)}"
    stats: dict[str, Any] = metadata.stats or {}
    for feature in (name for name in TYPES if name in metadata.features):
        shape = tuple(metadata.features[feature]["shape"])
        for statistic in in_use(policy, feature):
            values = stats.get(feature, {}).get(statistic)
            problem = None
            if values is None:
                problem = f"no '{statistic}', and the policy normalises its {feature} by that number"
            elif np.shape(values) != shape:
                found = np.shape(values)
                problem = f"a '{statistic}' of shape {found}, and {INFO_PATH} says that the feature has {shape}"
            if problem:
                raise ReflowError(f"In {STATS_PATH} of {_where(dataset)}, '{feature}' has {problem}. {anew}")
            if not np.isfinite(np.asarray(values, np.float64)).all():
                raise ReflowError(
                    f"The dataset's '{feature}' holds NaN or infinity ('{statistic}' in {STATS_PATH} is not finite). "
                    "Leave those episodes out (lerobot-edit-dataset --operation.type=delete_episodes), or record them "
                    "again."
                )


def _cannot_open(dataset: DatasetConfig, root: Path, error: Exception) -> ReflowError:
    """The sentence about metadata that LeRobot cannot open."""
    info, where = _info(root), _where(dataset)
    if info is None:
        old = isinstance(error, BackwardCompatibilityError)  # its later lines say how to convert a dataset on the hub
        said = in_one_line(error) if old else f"{kind_and_line(error)}."
        inside = root / dataset.repo_id
        hint = f" Did you mean --dataset.root={inside}?" if (inside / INFO_PATH).is_file() else ""
        return ReflowError(f"There is no LeRobotDataset at {where}, and LeRobot cannot download it: {said}{hint}")
    if info.get("total_frames") == 0:
        return _no_frames(dataset)
    found, hint = info.get("codebase_version", CODEBASE_VERSION), ""
    if found == "v2.1":
        hint = f" Convert it with: {conversion_command(dataset.repo_id, root)}"
    elif found != CODEBASE_VERSION:
        hint = f" The dataset's format is {found}, and this LeRobot reads {CODEBASE_VERSION}."
    return ReflowError(f"While opening the dataset at {where}: {kind_and_line(error)}.{hint or _hint(root, error)}")


def _hint(root: Path, error: Exception) -> str:
    """Where to look for the cause, if the dataset in this folder is not at fault."""
    for each in causes(error):
        if isinstance(each, OSError) and each.filename and not Path(each.filename).is_relative_to(root):
            return f" {each.filename} is no file of the dataset. HOME and HF_HOME say where such files are kept."
    if set("[]*?").intersection(str(root)):
        return " Hugging Face's datasets take [, ], * and ? in a path for a pattern; rename the folder."
    return ""


def _no_frames(dataset: DatasetConfig) -> ReflowError:
    return ReflowError(f"The chosen episodes at {_where(dataset)} hold 0 frames; record some, or choose others.")


def _info(root: Path) -> dict[str, Any] | None:
    """The content of `meta/info.json`; None if there is no such file, and {} if it is unreadable."""
    path = root / INFO_PATH
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        info = {}
    return info if isinstance(info, dict) else {}


def _root(dataset: DatasetConfig) -> Path:
    return Path(dataset.root) if dataset.root else HF_LEROBOT_HOME / dataset.repo_id


def _where(dataset: DatasetConfig) -> str:
    return f"--dataset.root={dataset.root}" if dataset.root else f"--dataset.repo_id={dataset.repo_id}"


def _remove_empty(root: Path) -> None:
    """Remove the folders that LeRobot makes before it finds nothing to download."""
    for folder in (root / "meta", root):
        with contextlib.suppress(OSError):
            folder.rmdir()


def in_home(path: str | None) -> str | None:
    """The path, with a leading `~` replaced by the home folder."""
    return path and os.path.expanduser(path)


def check_as_recorded(dataset: DatasetConfig, purpose: str) -> None:
    """Raise ReflowError for settings that change the recorded frames or their order.

    Args:
        dataset: the settings.
        purpose: of the frames, for the message; ends with a preposition, such as "pairs are made from".
    """
    if dataset.image_transforms.enable:
        raise ReflowError(
            f"--dataset.image_transforms.enable=true: {purpose} the images as they were recorded; leave it out."
        )
    if dataset.streaming:
        instead = "leave it out, and the dataset is downloaded"
        if is_bucket(dataset):
            instead = "copy the bucket to a folder and name that with --dataset.root, without --dataset.repo_type"
        raise ReflowError(f"--dataset.streaming=true: {purpose} frames that can be read in any order; {instead}.")


def dataset_statistics(metadata: LeRobotDatasetMetadata, dataset: DatasetConfig) -> Statistics:
    """The statistics that LeRobot normalises this dataset's batches with."""
    stats = dict(metadata.stats)
    if dataset.use_imagenet_stats:
        cameras = set(metadata.camera_keys) - set(depth_cameras(metadata))
        stats |= {camera: {**stats.get(camera, {}), **IMAGENET_STATS} for camera in cameras}
    return stats


def chosen_episodes(
    metadata: LeRobotDatasetMetadata, dataset: DatasetConfig, *, held_out: bool = False
) -> list[int] | None:
    """The episodes that `open_dataset` opens with the same `held_out`, None for all."""
    if not holds_out(dataset):
        return chosen_by_lerobot(dataset, metadata.total_episodes)
    return open_dataset(dataset, held_out=held_out).episodes


def frame_ranges(metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None) -> list[range]:
    """The indices of all frames of these episodes (None for all), as ascending ranges without gaps between them."""
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


# --- frames ---------------------------------------------------------------------------------------------------


def open_dataset(
    dataset: DatasetConfig,
    *,
    chunk_size: int = 1,
    tolerance_s: float = TOLERANCE_S,
    held_out: bool = False,
    rename_map: dict[str, str] | None = None,
) -> LeRobotDataset:
    """The frames of the chosen episodes as `lerobot-train` would see them, each with the chunk recorded from it on.

    `open_metadata` has checked the episodes. `held_out` chooses those that training holds out, if there are any.
    """
    policy = SmolVLAConfig(device="cpu", chunk_size=chunk_size, n_action_steps=chunk_size)
    cfg = TrainPipelineConfig(dataset=dataset, policy=policy, tolerance_s=tolerance_s, rename_map=rename_map or {})
    return open_configured(cfg, held_out)


def open_configured(cfg: TrainPipelineConfig, held_out: bool = False) -> LeRobotDataset:
    """The same for a whole training configuration. Raises ReflowError if LeRobot cannot open it."""
    try:
        return open_as_training(cfg, held_out=held_out)
    except Exception as error:  # the errors of the hub client, Arrow and LeRobot share no base class
        what = f"While opening {_where(cfg.dataset)} or downloading its missing files: {kind_and_line(error)}."
        raise ReflowError(what + _hint(_root(cfg.dataset), error)) from error
