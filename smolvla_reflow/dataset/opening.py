"""Open a LeRobotDataset as LeRobot's own training opens it: metadata, frames and statistics."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub.errors import RevisionNotFoundError
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.factory import IMAGENET_STATS
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset
from lerobot.datasets.utils import INFO_PATH, BackwardCompatibilityError, ForwardCompatibilityError
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import HF_LEROBOT_HOME
from packaging.version import InvalidVersion, Version

from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    chosen_by_lerobot,
    conversion_command,
    open_as_training,
    open_metadata_as_training,
)
from smolvla_reflow.dataset.batches import frame_error
from smolvla_reflow.dataset.damage import (
    Damage,
    damaged_data,
    missing_files,
    not_finite,
    unreadable_metadata,
    unusable_statistics,
    wrong_counts,
)
from smolvla_reflow.errors import ReflowError, first_line, in_one_line
from smolvla_reflow.smolvla.statistics import Statistics

# lerobot-train's --tolerance_s, in seconds.
TOLERANCE_S = TrainPipelineConfig.tolerance_s


def open_metadata(dataset: DatasetConfig, policy: SmolVLAConfig | None = None) -> LeRobotDatasetMetadata:
    """The metadata of a dataset that can be used, from its folder or from the hub.

    Args:
        dataset: where it is, and which of its episodes are wanted.
        policy: whose state and actions are normalised by its statistics; by default one that is as SmolVLA is.

    Raises:
        ReflowError: there is no such dataset or episode, it is of another format, or its files are damaged, incomplete
            or contradict each other.
    """
    root = _folder(dataset)
    was_there = root.exists()
    try:
        metadata = open_metadata_as_training(dataset)
        damage = _damage(dataset, metadata, policy or SmolVLAConfig(device="cpu"))
    except ReflowError:
        raise
    except Exception as error:  # the hub client's, Arrow's and LeRobot's errors share no base class
        if not was_there:
            _remove_empty(root)
        _refuse(dataset, root, error)
    if damage is not None:
        _refuse_damage(dataset, metadata.root, damage)
    return metadata


def _damage(dataset: DatasetConfig, metadata: LeRobotDatasetMetadata, policy: SmolVLAConfig) -> Damage | None:
    """What is wrong with the dataset's files; raises ReflowError if there is nothing in them to use."""
    damage = wrong_counts(metadata)
    if damage is not None:
        return damage
    episodes = chosen_by_lerobot(dataset, metadata.total_episodes)
    if not sum(map(len, frame_ranges(metadata, episodes))):
        raise ReflowError(f"The episodes at {_where(dataset)} hold 0 frames; record some, or choose others.")
    damage = unusable_statistics(metadata, policy, use_imagenet_stats=dataset.use_imagenet_stats)
    if damage is not None:
        return damage
    if sentence := not_finite(metadata, policy):
        raise ReflowError(sentence)
    if dataset.streaming and not _streams_from_its_folder(dataset):
        return None
    return damaged_data(metadata, episodes, streaming=dataset.streaming)


def _streams_from_its_folder(dataset: DatasetConfig) -> bool:
    return bool(dataset.root) and getattr(dataset, "repo_type", "dataset") == "dataset"


def _refuse(dataset: DatasetConfig, root: Path, error: Exception) -> NoReturn:
    """Raise ReflowError for a dataset that LeRobot cannot open."""
    where = _where(dataset)
    here = (root / INFO_PATH).is_file()
    if isinstance(error, BackwardCompatibilityError | NotImplementedError | ForwardCompatibilityError):
        command = f" As it is in a folder: {conversion_command(dataset.repo_id, root)}" if here else ""
        if isinstance(error, NotImplementedError):  # LeRobot's converter begins with v2.1
            command = f" Its format is {_format(root)}, and this LeRobot reads {CODEBASE_VERSION}." if here else ""
        raise ReflowError(f"The installed LeRobot cannot open {where}. {in_one_line(error)}{command}") from None
    if not here and not any((root / name).exists() for name in ("meta/stats.json", "meta/episodes", "data")):
        within = root / dataset.repo_id
        suggestion = f" Did you mean --dataset.root={within}?" if (within / INFO_PATH).is_file() else ""
        said = in_one_line(error) if isinstance(error, RuntimeError | RevisionNotFoundError) else first_line(error)
        raise ReflowError(
            f"There is no LeRobotDataset at {where}, nor could it be downloaded ({said}).{suggestion}"
        ) from None
    if _is_empty(root):
        raise ReflowError(f"The episodes at {where} hold 0 frames; record some.") from None
    _refuse_damage(dataset, root, unreadable_metadata(dataset.repo_id, root, error))


def _refuse_damage(dataset: DatasetConfig, root: Path, damage: Damage) -> NoReturn:
    found = _format(root)
    if found is not None and found > Version(CODEBASE_VERSION):
        reason = in_one_line(ForwardCompatibilityError(dataset.repo_id, found))
        raise ReflowError(f"The dataset at {_where(dataset)} cannot be used: {damage.what}. {reason}") from None
    raise ReflowError(
        f"The dataset at {_where(dataset)} is damaged or incomplete: {damage.what}. {damage.remedy}"
    ) from None


def _format(root: Path) -> Version | None:
    """The version of the dataset's format, if that can be read."""
    try:
        return Version(json.loads((root / INFO_PATH).read_text())["codebase_version"])
    except (OSError, ValueError, TypeError, KeyError, InvalidVersion):
        return None


def _where(dataset: DatasetConfig) -> str:
    return f"--dataset.root={dataset.root}" if dataset.root else f"--dataset.repo_id={dataset.repo_id}"


def _folder(dataset: DatasetConfig) -> Path:
    """Where LeRobot looks for it before it asks the hub."""
    return Path(dataset.root) if dataset.root else HF_LEROBOT_HOME / dataset.repo_id


def _remove_empty(root: Path) -> None:
    """Remove the folders that LeRobot makes before it finds out that there is nothing to download."""
    for folder in (root / "meta", root):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_empty(root: Path) -> bool:
    """Whether nothing was recorded into this dataset; LeRobot 0.4 reports such a dataset as missing."""
    try:
        return json.loads((root / INFO_PATH).read_text())["total_frames"] == 0
    except (OSError, ValueError, TypeError, KeyError):
        return False


def in_home(path: str | None) -> str | None:
    """The path, in which a leading `~` means the home folder."""
    return path and os.path.expanduser(path)


def check_as_recorded(dataset: DatasetConfig, purpose: str) -> None:
    """Raise ReflowError for settings with which frames would not come in order, and as they were recorded.

    Args:
        dataset: with the settings.
        purpose: of the frames, for the message; it ends with a preposition.
    """
    if dataset.image_transforms.enable:
        raise ReflowError(
            f"--dataset.image_transforms.enable=true: {purpose} the images as they were recorded; leave it out."
        )
    if dataset.streaming:
        instead = "leave it out, and the dataset is downloaded"
        if getattr(dataset, "repo_type", "dataset") != "dataset":
            instead = "copy the bucket to a folder and name that with --dataset.root, without --dataset.repo_type"
        raise ReflowError(f"--dataset.streaming=true: {purpose} frames that can be read in any order; {instead}.")


def is_downloaded(metadata: LeRobotDatasetMetadata, dataset: DatasetConfig) -> bool:
    """Whether every file of the chosen episodes is on this machine."""
    return not missing_files(metadata, chosen_by_lerobot(dataset, metadata.total_episodes))


def open_dataset(
    dataset: DatasetConfig, *, chunk_size: int = 1, tolerance_s: float = TOLERANCE_S, held_out: bool = False
) -> LeRobotDataset:
    """The frames of the chosen episodes as `lerobot-train` would see them, with the actions recorded from each on.

    Args:
        dataset: whose metadata have been opened.
        chunk_size: how many actions.
        tolerance_s: by how many seconds a video's frame may be off its time.
        held_out: whether to open the episodes that training holds out (`--dataset.eval_split`), if there are any.

    Raises:
        ReflowError: LeRobot cannot open them.
    """
    policy = SmolVLAConfig(device="cpu", chunk_size=chunk_size, n_action_steps=chunk_size)
    return open_configured(TrainPipelineConfig(dataset=dataset, policy=policy, tolerance_s=tolerance_s), held_out)


def open_configured(cfg: TrainPipelineConfig, held_out: bool = False) -> LeRobotDataset:
    """The same for a whole training configuration. Raises ReflowError if LeRobot cannot open it."""
    try:
        return open_as_training(cfg, held_out=held_out)
    except Exception as error:  # whatever files that do not fit each other lead LeRobot and Arrow to
        raise frame_error(error, cfg.tolerance_s) from error


def dataset_statistics(metadata: LeRobotDatasetMetadata, dataset: DatasetConfig) -> Statistics:
    """The statistics by which LeRobot normalises this dataset's batches."""
    stats = dict(metadata.stats)
    if dataset.use_imagenet_stats:
        cameras = set(metadata.camera_keys) - set(getattr(metadata, "depth_keys", ()))
        stats |= {camera: {**stats.get(camera, {}), **IMAGENET_STATS} for camera in cameras}
    return stats


def chosen_episodes(
    metadata: LeRobotDatasetMetadata, dataset: DatasetConfig, *, held_out: bool = False
) -> list[int] | None:
    """The episodes that `open_dataset` opens, None for all.

    Args:
        metadata: of the dataset.
        dataset: which of its episodes are wanted.
        held_out: whether those are meant that training holds out (`--dataset.eval_split`), if there are any.
    """
    if not getattr(dataset, "eval_split", 0.0):
        return chosen_by_lerobot(dataset, metadata.total_episodes)
    return open_dataset(dataset, held_out=held_out).episodes


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
