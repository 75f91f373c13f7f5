"""Check a run before anything is written: does the dataset exist, and does the teacher fit it?"""

from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from smolvla_reflow.checkpoint import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.config import ReflowTrainPipelineConfig
from smolvla_reflow.errors import ReflowError

# The statistics each mode of LeRobot's normaliser divides by.
STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}
# They are stored as float32; anything beyond rounding is another dataset.
RELATIVE_TOLERANCE = 1e-5


def check_run(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint) -> None:
    """Raise ReflowError if this dataset cannot be trained on with this teacher."""
    metadata = open_metadata(cfg)
    check_features(teacher, metadata.features, cfg.rename_map)
    check_statistics(teacher, metadata.stats)


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


def check_statistics(teacher: Checkpoint, stats: dict[str, Any]) -> None:
    """Teacher and dataset must normalise alike.

    The teacher's actions live in the space of the statistics it was trained with, the batches in that of the
    dataset's: where the two differ, its couplings would be wrong by that difference. LeRobot hands its
    normaliser the dataset's statistics under the dataset's own names, so a renamed state has none.
    """
    saved = teacher.statistics()
    differences: dict[str, float] = {}
    for feature, kind in ((ACTION, FeatureType.ACTION), (OBS_STATE, FeatureType.STATE)):
        mode = teacher.config.normalization_mapping.get(kind.value, NormalizationMode.IDENTITY)
        for statistic in STATISTICS[mode]:
            name = f"{feature}.{statistic}"
            if name not in saved:
                raise ReflowError(
                    f"The teacher {teacher.source} has no saved statistics '{name}', so the space of its "
                    "actions is unknown; use a checkpoint saved by lerobot-train."
                )
            if statistic not in stats.get(feature, {}):
                raise ReflowError(
                    f"The dataset has no statistics '{name}', by which the teacher's {feature} is normalised; "
                    "a dataset that names this feature differently has to be converted, not mapped."
                )
            differences[name] = _relative_difference(saved[name], stats[feature][statistic])
    worst = max(differences, key=differences.__getitem__, default=None)
    if worst is not None and differences[worst] > RELATIVE_TOLERANCE:
        raise ReflowError(
            f"The dataset's statistics are not those the teacher was trained with: '{worst}' differs by "
            f"{differences[worst]:.2g} relative. Reflow on the dataset of the teacher, or first fine-tune "
            "the teacher on this one with lerobot-train."
        )


def _relative_difference(saved: Tensor, current: Any) -> float:
    """Largest difference relative to the largest entry; infinite if the shapes differ."""
    old = saved.double().flatten().cpu()
    new = torch.as_tensor(np.asarray(current), dtype=torch.float64).flatten()
    if old.shape != new.shape:
        return float("inf")
    scale = torch.maximum(old.abs().max(), new.abs().max()).clamp_min(1e-12)
    return ((old - new).abs().max() / scale).item()
