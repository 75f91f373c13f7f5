"""Maps between the normalised spaces of teacher and student, where their statistics differ.

A SmolVLA sees state and gives actions in units of the statistics saved with its checkpoint. `train()` normalises
batches by the current dataset's. Where the two differ (more episodes were recorded, another dataset), the teacher
is asked in its own space: the state is mapped into it, the actions are mapped back. Every mode of LeRobot's
normaliser is affine in each dimension, and so are both maps.

How wide state and actions are, the statistics say. A checkpoint's `config.json` may still have the width of the base it
was fine-tuned from, which LeRobot never looks at.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
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
TYPES = {OBS_STATE: FeatureType.STATE, ACTION: FeatureType.ACTION}
# In normalised units: what is less is rounding, what is more no teacher has seen.
NEGLIGIBLE = 1e-6
HOPELESS = 1e3
CONSTANT_IN_ONE = "(nearly) constant in the one and not in the other"
OTHER_CONSTANTS = "constant in both, but at different values"

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
    config, saved = teacher.config, saved_statistics(teacher)
    current = {name: {k: np.asarray(v, np.float32) for k, v in of.items()} for name, of in stats.items()}
    _check(teacher.source, config, saved, current)
    state = _state_map(_side(OBS_STATE, config, current), _side(OBS_STATE, config, saved), config.max_state_dim)
    actions = _action_map(_side(ACTION, config, current), _side(ACTION, config, saved), config.max_action_dim)

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


class _Side(NamedTuple):
    """One feature in the normalised space of the batches, or in the teacher's."""

    line: "_Line"  # LeRobot's normaliser for a state, its unnormaliser for actions
    still: Tensor  # (D,) bool, dimensions that never move
    value: Tensor  # (D,) float64, where those that do not stand


def _side(feature: str, config: SmolVLAConfig, stats: Statistics) -> _Side:
    line = _probe(UnnormalizerProcessorStep if feature == ACTION else NormalizerProcessorStep, feature, config, stats)
    of_feature = {name: np.asarray(values, np.float64) for name, values in stats.get(feature, {}).items()}
    still = never_moves(of_feature, len(line.slope))
    zeros = np.zeros(len(line.slope))
    low, high, mean = (of_feature.get(name, zeros) for name in ("min", "max", "mean"))
    return _Side(line, torch.from_numpy(still), torch.from_numpy(np.where(low == high, low, mean)))


def _state_map(here: _Side, there: _Side, width: int) -> Affine:
    """Into the teacher's units: undo the dataset's normaliser, apply the teacher's."""
    _refuse(OBS_STATE, there.still & ~here.still, CONSTANT_IN_ONE)
    _refuse(OBS_STATE, _other_constants(here, there), OTHER_CONSTANTS)
    scale = there.line.slope / here.line.slope
    shift = there.line.offset - scale * here.line.offset
    # The deviation of a dimension that never moves is rounding noise, by which a map would multiply or divide. But
    # what the teacher sees of its one value is known.
    seen_here, seen_there = here.line(here.value), there.line(here.value)
    alike = (seen_there - seen_here).abs() <= NEGLIGIBLE
    scale = torch.where(here.still, alike.to(scale), scale)
    shift = torch.where(here.still, torch.where(alike, 0.0, seen_there), shift)
    return _padded(scale, shift, width)


def _action_map(here: _Side, there: _Side, width: int) -> Affine:
    """Out of the teacher's units as the robot would get them: its unnormaliser, then the inverse of the dataset's."""
    _refuse(ACTION, here.still & ~there.still, CONSTANT_IN_ONE)
    _refuse(ACTION, _other_constants(here, there), OTHER_CONSTANTS)
    # Where nothing ever moves there is nothing to map, and a deviation of rounding noise, or 0, to divide by.
    still = here.still & there.still
    scale = torch.where(still, 1.0, there.line.slope / here.line.slope)
    shift = torch.where(still, 0.0, (there.line.offset - here.line.offset) / here.line.slope)
    return _padded(scale, shift, width)


def _other_constants(here: _Side, there: _Side) -> Tensor:
    return here.still & there.still & ~torch.isclose(here.value, there.value, rtol=1e-5, atol=1e-6)


def _refuse(feature: str, dimensions: Tensor, why: str) -> None:
    """Raise ReflowError if there is any such dimension, (D,) bool."""
    if dimensions.any():
        raise ReflowError(
            f"The dataset's statistics cannot be mapped to the teacher's: '{feature}' dimension "
            f"{int(dimensions.int().argmax())} is {why}. First fine-tune the teacher on this dataset, with "
            "lerobot-train."
        )


def never_moves(stats: Mapping[str, Any], width: int) -> np.ndarray:
    """Which dimensions of a feature are constant, (width,) bool.

    Its "min" and "max" decide. The standard deviation that LeRobot aggregates over episodes does not tell: of a
    constant 100.3 it can be 0.06.
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
        _refuse(largest.feature, torch.arange(largest.dimension + 1) == largest.dimension, CONSTANT_IN_ONE)
    if config.adapt_to_pi_aloha:
        raise ReflowError(
            "The dataset's statistics are not the teacher's, and adapt_to_pi_aloha=true bends the normalised "
            "space, so they cannot be mapped. First fine-tune the teacher on this dataset with lerobot-train."
        )


def robot_units(checkpoint: Checkpoint, policy: SmolVLAPolicy) -> Affine:
    """From this checkpoint's normalised actions to the robot's own units, at the robot's width.

    Args:
        checkpoint: with saved statistics.
        policy: its policy, which from Aloha's normalised units has a conversion of its own (`adapt_to_pi_aloha`).

    Raises:
        ReflowError: the checkpoint has no saved statistics for its actions.
    """
    saved = saved_statistics(checkpoint)
    _check(checkpoint.source, checkpoint.config, saved, saved)
    line = _probe(UnnormalizerProcessorStep, ACTION, checkpoint.config, saved)
    if not checkpoint.config.adapt_to_pi_aloha:
        return Affine(scale=line.slope, shift=line.offset)
    encoded = [policy._pi_aloha_encode_actions(torch.full((1, 1, len(line.slope)), x).double()) for x in (0.0, 1.0)]
    offset, slope = encoded[0][0, 0], (encoded[1] - encoded[0])[0, 0]
    return Affine(scale=line.slope * slope, shift=line(offset))


def fingerprint(config: SmolVLAConfig, stats: Statistics) -> str:
    """SHA-256 of the statistics by which this policy's state and actions are normalised, as float32.

    Raises:
        ReflowError: one of them is missing.
    """
    digest = hashlib.sha256()
    for feature in TYPES:
        for statistic in _statistics_in_use(config, feature):
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

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope * x + self.offset


def _statistics_in_use(config: SmolVLAConfig, feature: str) -> tuple[str, ...]:
    """The statistics by which this policy's state or action is normalised, if any."""
    return STATISTICS[config.normalization_mapping.get(TYPES[feature].value, NormalizationMode.IDENTITY)]


def saved_statistics(checkpoint: Checkpoint) -> Statistics:
    """The statistics saved with a checkpoint, by feature and statistic.

    Raises:
        ReflowError: its processors cannot be loaded.
    """
    nested: dict[str, dict[str, Any]] = {}
    for name, tensor in checkpoint.statistics().items():
        feature, _, statistic = name.rpartition(".")
        nested.setdefault(feature, {})[statistic] = tensor.cpu().numpy()
    return nested


def saved_width(checkpoint: Checkpoint, feature: str) -> int | None:
    """How many dimensions of a state or an action this checkpoint was trained on; None if its statistics do not say.

    Raises:
        ReflowError: its processors cannot be loaded.
    """
    saved = saved_statistics(checkpoint).get(feature, {})
    return next((len(saved[name]) for name in ("mean", "min", "q01", "q10") if name in saved), None)


def _width(config: SmolVLAConfig, stats: Statistics, feature: str) -> int:
    """How many dimensions a robot's state or action has: what its statistics say, or else what the config says."""
    for statistic in ("mean", "min", *_statistics_in_use(config, feature)):
        if statistic in stats.get(feature, {}):
            return len(stats[feature][statistic])
    return {**(config.input_features or {}), **(config.output_features or {})}[feature].shape[0]


def _probe(
    kind: type[NormalizerProcessorStep] | type[UnnormalizerProcessorStep],
    name: str,
    config: SmolVLAConfig,
    stats: Statistics,
) -> _Line:
    """The line that LeRobot's (un)normaliser is for one feature, found by its values at 0 and 1."""
    width = _width(config, stats, name)
    step = kind(
        features={name: PolicyFeature(TYPES[name], (width,))},
        norm_map={FeatureType(k): mode for k, mode in config.normalization_mapping.items()},
        stats={name: dict(stats.get(name, {}))},
    )

    def at(value: float) -> Tensor:
        x = torch.full((width,), value, dtype=torch.float64)
        if name == ACTION:
            return step(create_transition(action=x))[TransitionKey.ACTION]
        return step(create_transition(observation={name: x}))[TransitionKey.OBSERVATION][name]

    offset = at(0.0)
    return _Line(slope=at(1.0) - offset, offset=offset)


def _padded(scale: Tensor, shift: Tensor, width: int) -> Affine:
    missing = (0, width - len(scale))
    return Affine(scale=pad(scale, missing, value=1.0), shift=pad(shift, missing, value=0.0))


def _check(source: str, config: SmolVLAConfig, saved: Statistics, current: Statistics) -> None:
    """Raise ReflowError unless both have every statistic in use, in one shape, and equal ones of images.

    Where LeRobot hands its normaliser the dataset's statistics under the dataset's own names, a renamed state has none,
    and would be trained unnormalised.
    """
    _check_images(config, saved, current)
    for feature in TYPES:
        for statistic in _statistics_in_use(config, feature):
            name = f"{feature}.{statistic}"
            of_dataset, of_teacher = current.get(feature, {}).get(statistic), saved.get(feature, {}).get(statistic)
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
            if of_dataset.shape != of_teacher.shape:
                raise ReflowError(
                    f"'{feature}' has {of_dataset.size} dimensions in the dataset and {of_teacher.size} in the teacher "
                    f"{source} (so say the statistics it was saved with). Name the dataset it was fine-tuned on, or "
                    "fine-tune it on this one first, with lerobot-train."
                )


def _check_images(config: SmolVLAConfig, saved: Statistics, current: Statistics) -> None:
    mode = config.normalization_mapping.get(FeatureType.VISUAL.value, NormalizationMode.IDENTITY)
    cameras = [name for name, spec in (config.input_features or {}).items() if spec.type is FeatureType.VISUAL]
    for name in (f"{camera}.{statistic}" for camera in cameras for statistic in STATISTICS[mode]):
        camera, _, statistic = name.rpartition(".")
        if not _agree(current.get(camera, {}).get(statistic), saved.get(camera, {}).get(statistic)):
            raise ReflowError(
                f"The teacher's images were normalised by other statistics: '{name}' is not the "
                "dataset's. Only state and actions can be mapped."
            )


def _agree(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.size == other.size and np.allclose(one.ravel(), other.ravel())
