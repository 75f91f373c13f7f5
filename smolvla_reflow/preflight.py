"""Check a run before anything is written: does the dataset exist, and does the teacher fit it?"""

from typing import Any

from lerobot.configs.types import FeatureType
from lerobot.datasets.factory import IMAGENET_STATS

from smolvla_reflow.checkpoint import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.config import ReflowTrainPipelineConfig
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.normalization import Statistics, change_of_space


def check_run(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint) -> Statistics:
    """Raise ReflowError if this dataset cannot be trained on with this teacher.

    Returns:
        The statistics by which LeRobot will normalise the batches.
    """
    metadata = open_metadata(cfg)
    check_features(teacher, metadata.features, cfg.rename_map)
    stats = dict(metadata.stats)
    if cfg.dataset.use_imagenet_stats:
        stats |= {camera: {**stats.get(camera, {}), **IMAGENET_STATS} for camera in metadata.camera_keys}
    change_of_space(teacher, stats)
    return stats


def open_metadata(cfg: ReflowTrainPipelineConfig) -> LeRobotDatasetMetadata:
    dataset = cfg.dataset
    try:
        return LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision)
    except Exception as error:  # the hub client's and LeRobot's errors share no base class
        where = f"--dataset.root={dataset.root}" if dataset.root else f"--dataset.repo_id={dataset.repo_id}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReflowError(
            f"There is no LeRobotDataset at {where}, nor could it be downloaded ({reason})."
        ) from None


def check_features(teacher: Checkpoint, features: dict[str, Any], rename_map: dict[str, str]) -> None:
    """The dataset must have the teacher's state and action in their widths, and its cameras by name."""
    names = {rename_map.get(name, name): feature for name, feature in features.items()}
    expected = {**(teacher.config.input_features or {}), **(teacher.config.output_features or {})}
    for name, feature in expected.items():
        if name not in names:
            if feature.type is FeatureType.VISUAL and ".empty_camera_" in name:
                continue
            raise ReflowError(
                f"The teacher needs '{name}', which the dataset lacks (it has {', '.join(sorted(names))}); "
                "if it is there under another name, map it with --rename_map."
            )
        shape = tuple(names[name]["shape"])
        if feature.type in (FeatureType.STATE, FeatureType.ACTION) and shape != tuple(feature.shape):
            raise ReflowError(
                f"'{name}' has shape {shape} in the dataset and {tuple(feature.shape)} in the teacher."
            )
