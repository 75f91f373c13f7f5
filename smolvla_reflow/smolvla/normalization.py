"""Maps between the normalised spaces of teacher and student, where their statistics differ.

A SmolVLA sees state and gives actions in units of the statistics saved with its checkpoint. `train()` normalises
batches by the current dataset's. Where the two differ (more episodes were recorded, another dataset), the teacher
is asked in its own space: the state is mapped into it, the actions are mapped back. Every mode of LeRobot's
normaliser is affine in each dimension, and so are both maps.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import (
    NormalizerProcessorStep,
    TransitionKey,
    UnnormalizerProcessorStep,
    create_transition,
)
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.nn.functional import pad

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.checkpoint import Checkpoint

# The statistics each mode of LeRobot's normaliser uses.
STATISTICS = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}
# In normalised units: what is less is rounding, what is more no teacher has seen.
NEGLIGIBLE = 1e-6
HOPELESS = 1e3

# As in LeRobot's `dataset.meta.stats`: `{"action": {"mean": ..., "std": ...}, ...}`.
Statistics = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Affine:
    """`scale * x + shift` in the last dimension; padded dimensions have scale 1 and shift 0."""

    scale: Tensor  # (width,) float64
    shift: Tensor  # (width,) float64

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(..., width)`, in its dtype."""
        return x * self.scale.to(x) + self.shift.to(x)

    def change(self) -> Tensor:
        """The largest change of each dimension for x in [-1, 1], (width,)."""
        return (self.scale - 1).abs() + self.shift.abs()


@dataclass(frozen=True)
class SpaceMaps:
    """The two maps between the normalised spaces of a student and its teacher."""

    state: Affine  # from the student's to the teacher's
    actions: Affine  # from the teacher's to the student's


def space_maps(teacher: Checkpoint, stats: Statistics) -> SpaceMaps | None:
    """The maps for batches normalised by `stats`; None if those are the teacher's own statistics.

    Args:
        teacher: a checkpoint with saved statistics.
        stats: the dataset's, by feature and statistic.

    Raises:
        ReflowError: either side lacks statistics, or they differ so that no map can bridge them.
    """
    config, saved = teacher.config, _nested(teacher.statistics())
    current = {name: {k: np.asarray(v, np.float32) for k, v in of.items()} for name, of in stats.items()}
    _check(teacher.source, config, saved, current)

    # Into the teacher's units: undo the dataset's normaliser, apply the teacher's.
    here, there = (_probe(NormalizerProcessorStep, OBS_STATE, config, s) for s in (current, saved))
    scale = there.slope / here.slope
    state = _padded(scale, there.offset - scale * here.offset, config.max_state_dim)
    # Out of them as the robot would get them: the teacher's unnormaliser, then the inverse of the student's.
    here, there = (_probe(UnnormalizerProcessorStep, ACTION, config, s) for s in (current, saved))
    # A dimension that is constant in both has no slope to divide by, and nothing to map.
    same = (there.slope == here.slope) & (there.offset == here.offset)
    actions = _padded(
        torch.where(same, 1.0, there.slope / here.slope),
        torch.where(same, 0.0, (there.offset - here.offset) / here.slope),
        config.max_action_dim,
    )

    largest = _largest_change(state, actions)
    if largest.size <= NEGLIGIBLE:
        return None
    _check_mappable(config, largest)
    logging.getLogger(__name__).info(
        "The dataset's statistics are not the teacher's (most in '%s' dimension %d, by %.3g in normalised units): "
        "state and actions are mapped to the teacher's space and back.",
        largest.feature,
        largest.dimension,
        largest.size,
    )
    return SpaceMaps(state, actions)


class _Change(NamedTuple):
    """Where two normalised spaces differ most, and by how much for x in [-1, 1]."""

    feature: str
    dimension: int
    size: float


def _largest_change(state: Affine, actions: Affine) -> _Change:
    changes = {OBS_STATE: state.change().nan_to_num(torch.inf), ACTION: actions.change().nan_to_num(torch.inf)}
    feature = max(changes, key=lambda name: changes[name].max().item())
    dimension = int(changes[feature].argmax())
    return _Change(feature, dimension, changes[feature][dimension].item())


def _check_mappable(config: SmolVLAConfig, largest: _Change) -> None:
    if not largest.size < HOPELESS:
        raise ReflowError(
            f"The dataset's statistics cannot be mapped to the teacher's: '{largest.feature}' dimension "
            f"{largest.dimension} is (nearly) constant in the one and not in the other. First fine-tune the teacher on "
            "this dataset with lerobot-train."
        )
    if config.adapt_to_pi_aloha:
        raise ReflowError(
            "The dataset's statistics are not the teacher's, and adapt_to_pi_aloha=true bends the normalised "
            "space, so they cannot be mapped. First fine-tune the teacher on this dataset with lerobot-train."
        )


def robot_units(checkpoint: Checkpoint) -> Affine:
    """From this checkpoint's normalised actions to the robot's own units, at the robot's width.

    Raises:
        ReflowError: the checkpoint has no saved statistics for its actions.
    """
    saved = _nested(checkpoint.statistics())
    _check(checkpoint.source, checkpoint.config, saved, saved)
    line = _probe(UnnormalizerProcessorStep, ACTION, checkpoint.config, saved)
    return Affine(scale=line.slope, shift=line.offset)


def fingerprint(config: SmolVLAConfig, stats: Statistics) -> str:
    """SHA-256 of the statistics by which this policy's state and actions are normalised, as float32.

    Raises:
        ReflowError: one of them is missing.
    """
    digest = hashlib.sha256()
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for feature in (OBS_STATE, ACTION):
        mode = config.normalization_mapping.get(features[feature].type.value, NormalizationMode.IDENTITY)
        for statistic in STATISTICS[mode]:
            name = f"{feature}.{statistic}"
            if statistic not in stats.get(feature, {}):
                raise ReflowError(f"There are no statistics '{name}', by which the policy's {feature} is normalised.")
            digest.update(name.encode())
            digest.update(np.asarray(stats[feature][statistic], np.float32).tobytes())
    return digest.hexdigest()


class _Line(NamedTuple):
    """`slope * x + offset`, each (D,) float64."""

    slope: Tensor
    offset: Tensor


def _probe(
    kind: type[NormalizerProcessorStep] | type[UnnormalizerProcessorStep],
    name: str,
    config: SmolVLAConfig,
    stats: Statistics,
) -> _Line:
    """The line that LeRobot's (un)normaliser is for one feature, found by its values at 0 and 1."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    step = kind(
        features={name: features[name]},
        norm_map={FeatureType(k): mode for k, mode in config.normalization_mapping.items()},
        stats={name: dict(stats.get(name, {}))},
    )

    def at(value: float) -> Tensor:
        x = torch.full(features[name].shape, value, dtype=torch.float64)
        if name == ACTION:
            return step(create_transition(action=x))[TransitionKey.ACTION]
        return step(create_transition(observation={name: x}))[TransitionKey.OBSERVATION][name]

    offset = at(0.0)
    return _Line(slope=at(1.0) - offset, offset=offset)


def _padded(scale: Tensor, shift: Tensor, width: int) -> Affine:
    missing = (0, width - len(scale))
    return Affine(scale=pad(scale, missing, value=1.0), shift=pad(shift, missing, value=0.0))


def _nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, tensor in flat.items():
        feature, _, statistic = name.rpartition(".")
        nested.setdefault(feature, {})[statistic] = tensor.cpu().numpy()
    return nested


def _check(source: str, config: SmolVLAConfig, saved: Statistics, current: Statistics) -> None:
    """Raise ReflowError unless both have every statistic in use, in the feature's shape, and equal ones of images.

    LeRobot hands its normaliser the dataset's statistics under the dataset's own names, so a renamed state
    has none, and would be trained unnormalised.
    """
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for feature, spec in features.items():
        mode = config.normalization_mapping.get(spec.type.value, NormalizationMode.IDENTITY)
        for statistic in STATISTICS[mode]:
            name = f"{feature}.{statistic}"
            of_dataset, of_teacher = current.get(feature, {}).get(statistic), saved.get(feature, {}).get(statistic)
            if spec.type is FeatureType.VISUAL:
                if not _agree(of_dataset, of_teacher):
                    raise ReflowError(
                        f"The teacher's images were normalised by other statistics: '{name}' is not the "
                        "dataset's. Only state and actions can be mapped."
                    )
                continue
            if of_teacher is None:
                raise ReflowError(
                    f"The checkpoint {source} has no saved statistics '{name}', so the space of its actions is "
                    "unknown; use a checkpoint saved by lerobot-train."
                )
            if of_dataset is None:
                raise ReflowError(
                    f"The dataset has no statistics '{name}', by which the teacher's {feature} is normalised; a "
                    "dataset that names this feature differently has to be converted, not mapped."
                )
            if not of_dataset.shape == of_teacher.shape == tuple(spec.shape):
                raise ReflowError(
                    f"The statistics '{name}' have shape {of_dataset.shape} in the dataset and {of_teacher.shape} in "
                    f"the teacher, and the feature has {tuple(spec.shape)}."
                )


def _agree(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.size == other.size and np.allclose(one.ravel(), other.ravel())
