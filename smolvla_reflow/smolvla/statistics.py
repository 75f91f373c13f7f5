"""The numbers that normalise a policy's state and actions, their widths, and the dimensions that never move.

The statistics give the width of a robot's state and actions. A checkpoint's `config.json` may still give the widths of
the base that it was fine-tuned from, and LeRobot never reads them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.errors import ReflowError

# The statistics that each mode of LeRobot's normaliser uses.
STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}
TYPES = {OBS_STATE: FeatureType.STATE, ACTION: FeatureType.ACTION}

# As in LeRobot's `dataset.meta.stats`: `{"action": {"mean": ..., "std": ...}, ...}`.
Statistics = Mapping[str, Mapping[str, Any]]


def in_use(config: SmolVLAConfig, feature: str) -> tuple[str, ...]:
    """The statistics that normalise this policy's state or action, if any."""
    return STATISTICS[config.normalization_mapping.get(TYPES[feature].value, NormalizationMode.IDENTITY)]


def saved_statistics(checkpoint: Checkpoint) -> Statistics:
    """The statistics saved with a checkpoint, by feature and statistic."""
    nested: dict[str, dict[str, Any]] = {}
    for name, tensor in checkpoint.statistics().items():
        feature, _, statistic = name.rpartition(".")
        nested.setdefault(feature, {})[statistic] = tensor.cpu().numpy()
    return nested


def width_of(stats: Mapping[str, Any]) -> int | None:
    """The number of dimensions in the statistics of a state or an action; None if there are no statistics."""
    return next((len(stats[name]) for name in ("mean", "min", "q01", "q10") if name in stats), None)


def robot_width(config: SmolVLAConfig, stats: Statistics, feature: str) -> int:
    """The number of dimensions of a robot's state or action by its statistics, or by the config if it has none."""
    width = width_of(stats.get(feature, {}))
    if width is not None:
        return width
    return {**(config.input_features or {}), **(config.output_features or {})}[feature].shape[0]


def never_moves(stats: Mapping[str, Any], width: int) -> np.ndarray:
    """True for the constant dimensions of a state or an action, (width,).

    "min" and "max" decide. A standard deviation that LeRobot aggregates over episodes can be 0.06 for a constant 100.3.
    """
    still = np.zeros(width, bool)
    if "min" in stats and "max" in stats:
        still |= np.asarray(stats["min"], np.float32) == np.asarray(stats["max"], np.float32)
    if "std" in stats:
        still |= np.asarray(stats["std"]) == 0
    return still


def moving_deviations(stats: Mapping[str, Any]) -> Tensor:
    """A feature's standard deviations, (width,) float32, with 0 for dimensions that never move."""
    std = np.asarray(stats["std"], np.float32)
    return torch.from_numpy(np.where(never_moves(stats, len(std)), np.float32(0), std))


def fingerprint(config: SmolVLAConfig, stats: Statistics) -> str:
    """SHA-256 of the statistics that normalise this policy's state and actions, as float32."""
    digest = hashlib.sha256()
    for feature, statistic in ((name, statistic) for name in TYPES for statistic in in_use(config, name)):
        values = stats.get(feature, {}).get(statistic)
        if values is None:
            raise ReflowError(
                f"There are no statistics '{feature}.{statistic}', by which the policy's {feature} is normalised."
            )
        digest.update(f"{feature}.{statistic}".encode() + np.asarray(values, np.float32).tobytes())
    return digest.hexdigest()
