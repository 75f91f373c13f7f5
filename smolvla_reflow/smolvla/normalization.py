"""Maps between the normalised spaces of teacher and student, where their statistics differ.

A SmolVLA sees state and gives actions in units of the statistics saved with its checkpoint. `train()` normalises
batches by the current dataset's. Where the two differ (more episodes were recorded, another dataset), the teacher
is asked in its own space: the state is mapped into it, the actions are mapped back. Every mode of LeRobot's
normaliser is affine in each dimension, and so are both maps.
"""

import logging
from dataclasses import dataclass
from typing import NamedTuple

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

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.statistics import (
    STATISTICS,
    TYPES,
    Statistics,
    in_use,
    moving_deviations,
    never_moves,
    robot_width,
    saved_statistics,
)

# In normalised units: what is less is rounding, what is more no teacher has seen.
NEGLIGIBLE = 1e-6
HOPELESS = 1e3
CONSTANT_IN_ONE = "(nearly) constant in the one and not in the other"
OTHER_CONSTANTS = "constant in both, but at different values"


@dataclass(frozen=True)
class Affine:
    """`scale * x + shift` in the last dimension."""

    scale: Tensor  # (width,) float64
    shift: Tensor  # (width,) float64

    def __call__(self, x: Tensor) -> Tensor:
        """Map `(..., width)`, in its dtype."""
        return x * self.scale.to(x) + self.shift.to(x)

    def change(self) -> Tensor:
        """The largest change of each dimension for x in [-1, 1], (width,)."""
        return (self.scale - 1).abs() + self.shift.abs()

    def padded(self, width: int) -> "Affine":
        """The same map, which leaves the dimensions up to `width` alone."""
        missing = (0, width - len(self.scale))
        return Affine(scale=pad(self.scale, missing, value=1.0), shift=pad(self.shift, missing, value=0.0))


@dataclass(frozen=True)
class SpaceMaps:
    """The two maps between the normalised spaces of a student and its teacher."""

    state: Affine | None  # from the student's to the teacher's, None where a state is the same in both
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
    here, there = _Space(config, current), _Space(config, saved)
    state, actions = _state_map(here, there, config.max_state_dim), _action_map(here, there, config.max_action_dim)
    largest = _largest_change(state, actions)
    if largest.size <= NEGLIGIBLE:
        return None
    if config.adapt_to_pi_aloha:
        raise ReflowError(
            "The dataset's statistics are not the teacher's, and adapt_to_pi_aloha=true bends the normalised "
            "space, so they cannot be mapped. First fine-tune the teacher on this dataset with lerobot-train."
        )
    logging.getLogger(__name__).info(
        "The dataset's statistics are not the teacher's (most in '%s' dimension %d, by %.3g in normalised units): "
        "state and actions are mapped to the teacher's space and back.",
        largest.feature,
        largest.dimension,
        largest.size,
    )
    return SpaceMaps(state if state.change().max() > NEGLIGIBLE else None, actions)


class _Change(NamedTuple):
    """Where two normalised spaces differ most, and by how much for x in [-1, 1]."""

    feature: str
    dimension: int
    size: float


def _largest_change(state: Affine, actions: Affine) -> _Change:
    changes = {OBS_STATE: state.change(), ACTION: actions.change()}
    feature = max(changes, key=lambda name: changes[name].max().item())
    dimension = int(changes[feature].argmax())
    return _Change(feature, dimension, changes[feature][dimension].item())


@dataclass(frozen=True)
class _Space:
    """The normalised space of the batches, or the teacher's own.

    Attributes:
        config: the teacher's, which says how a feature is normalised.
        stats: by which numbers.
    """

    config: SmolVLAConfig
    stats: Statistics

    def normaliser(self, feature: str) -> Affine:
        return _probe(NormalizerProcessorStep, feature, self.config, self.stats)

    def unnormaliser(self, feature: str) -> Affine:
        return _probe(UnnormalizerProcessorStep, feature, self.config, self.stats)

    def still(self, feature: str) -> Tensor:
        """Which dimensions never move, (D,) bool."""
        width = robot_width(self.config, self.stats, feature)
        return torch.from_numpy(never_moves(self.stats.get(feature, {}), width))

    def value(self, feature: str) -> Tensor:
        """Where those that never move stand, (D,) float64; of the others it says nothing."""
        zeros = np.zeros(robot_width(self.config, self.stats, feature))
        low, high, mean = (self.stats.get(feature, {}).get(name, zeros) for name in ("min", "max", "mean"))
        return torch.from_numpy(np.where(np.equal(low, high), low, mean).astype(np.float64))


def _state_map(here: _Space, there: _Space, width: int) -> Affine:
    """Into the teacher's units: undo the dataset's normaliser, apply the teacher's."""
    undone, applied, value = here.normaliser(OBS_STATE), there.normaliser(OBS_STATE), here.value(OBS_STATE)
    scale = applied.scale / undone.scale
    moving = Affine(scale, applied.shift - scale * undone.shift)
    _refuse(OBS_STATE, there.still(OBS_STATE) & ~here.still(OBS_STATE) & _changed(moving), CONSTANT_IN_ONE)
    return _with_constants(OBS_STATE, moving, undone(value), applied(value), here, there).padded(width)


def _action_map(here: _Space, there: _Space, width: int) -> Affine:
    """Out of the teacher's units as the robot would get them: its unnormaliser, then the inverse of the dataset's."""
    undone, applied, value = there.unnormaliser(ACTION), here.unnormaliser(ACTION), here.value(ACTION)
    moving = Affine(undone.scale / applied.scale, (undone.shift - applied.shift) / applied.scale)
    _refuse(ACTION, here.still(ACTION) & ~there.still(ACTION) & _changed(moving), CONSTANT_IN_ONE)
    seen_there, seen_here = there.normaliser(ACTION)(value), here.normaliser(ACTION)(value)
    return _with_constants(ACTION, moving, seen_there, seen_here, here, there).padded(width)


def _changed(moving: Affine) -> Tensor:
    """Which dimensions a map does not leave alone, (D,) bool.

    Statistics without "min" and "max" do not say that a dimension never moves, but are then the very same ones.
    """
    return ~(moving.change() <= NEGLIGIBLE)


def _with_constants(feature: str, moving: Affine, before: Tensor, after: Tensor, here: _Space, there: _Space) -> Affine:
    """The map, in which a dimension that never moves gets the value that it has after it.

    Its standard deviation is rounding noise, or 0, by which a map would multiply or divide. But what LeRobot's
    normaliser makes of its one value is known in both spaces.

    Args:
        feature: which.
        moving: the map of the dimensions that move.
        before, after: (D,), the dataset's constant, normalised in the space that is mapped from, and to.
        here, there: the space of the batches, and the teacher's.

    Raises:
        ReflowError: the constants are different ones, or a dimension is so nearly constant that it might as well be.
    """
    still, both = here.still(feature), here.still(feature) & there.still(feature)
    same = torch.isclose(here.value(feature), there.value(feature), rtol=1e-5, atol=1e-6)
    _refuse(feature, both & ~same, OTHER_CONSTANTS)
    alike = (after - before).abs() <= NEGLIGIBLE
    mapped = Affine(
        scale=torch.where(still, alike.to(moving.scale), moving.scale),
        shift=torch.where(still, torch.where(alike, 0.0, after), moving.shift),
    )
    _refuse(feature, ~(mapped.change() < HOPELESS) & ~both, CONSTANT_IN_ONE)
    return mapped


def _refuse(feature: str, dimensions: Tensor, why: str) -> None:
    """Raise ReflowError if there is any such dimension, (D,) bool."""
    if dimensions.any():
        raise ReflowError(
            f"The dataset's statistics cannot be mapped to the teacher's: '{feature}' dimension "
            f"{int(dimensions.int().argmax())} is {why}. First fine-tune the teacher on this dataset, with "
            "lerobot-train."
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
    return _robot_units(checkpoint.config, saved, policy)


def action_deviations(policy: SmolVLAPolicy, stats: Statistics) -> Tensor:
    """How many standard deviations one normalised unit of each action dimension is, (D,) float32; 0 if it never moves.

    Args:
        policy: whose batches are normalised.
        stats: by which numbers. Where they do not say what a standard deviation is, a unit counts as one, which under
            LeRobot's "MEAN_STD" it is.
    """
    if "std" not in stats.get(ACTION, {}):
        feature = policy.config.action_feature
        return torch.ones(policy.config.max_action_dim if feature is None else feature.shape[0])
    std = moving_deviations(stats[ACTION]).double()
    scale = _robot_units(policy.config, stats, policy).scale.abs()
    return torch.where(std > 0, scale / std, 0.0).float()


def _robot_units(config: SmolVLAConfig, stats: Statistics, policy: SmolVLAPolicy) -> Affine:
    unnormalised = _probe(UnnormalizerProcessorStep, ACTION, config, stats)
    if not config.adapt_to_pi_aloha:
        return unnormalised
    width = len(unnormalised.scale)
    encoded = [policy._pi_aloha_encode_actions(torch.full((1, 1, width), x).double())[0, 0] for x in (0.0, 1.0)]
    return Affine(scale=unnormalised.scale * (encoded[1] - encoded[0]), shift=unnormalised(encoded[0]))


def _probe(
    kind: type[NormalizerProcessorStep] | type[UnnormalizerProcessorStep],
    name: str,
    config: SmolVLAConfig,
    stats: Statistics,
) -> Affine:
    """What LeRobot's (un)normaliser does to one feature, found by its values at 0 and 1."""
    width = robot_width(config, stats, name)
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

    shift = at(0.0)
    return Affine(scale=at(1.0) - shift, shift=shift)


def _check(source: str, config: SmolVLAConfig, saved: Statistics, current: Statistics) -> None:
    """Raise ReflowError unless both have every statistic in use, in one shape, and equal ones of images.

    Where LeRobot hands its normaliser the dataset's statistics under the dataset's own names, a renamed state has none,
    and would be trained unnormalised.
    """
    _check_images(config, saved, current)
    for feature in TYPES:
        for statistic in in_use(config, feature):
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
