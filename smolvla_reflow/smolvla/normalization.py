"""Maps between the normalised spaces of teacher and student, for different statistics.

A SmolVLA's state and actions are in units of the statistics saved with its checkpoint. `train()` normalises batches by
the present dataset's. If the two differ (more episodes, another dataset), the state is mapped into the teacher's space,
and its actions are mapped back. Every mode of LeRobot's normaliser is affine in each dimension, and so are both maps.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import NormalizerProcessorStep, TransitionKey, UnnormalizerProcessorStep, create_transition
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

# In normalised units: smaller changes are rounding, and a teacher has seen nothing of larger ones.
NEGLIGIBLE = 1e-6
HOPELESS = 1e3
CONSTANT_IN_ONE = "(nearly) constant in one and not in the other"
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
        """The same map with the identity in the dimensions up to `width`."""
        missing = (0, width - len(self.scale))
        return Affine(scale=pad(self.scale, missing, value=1.0), shift=pad(self.shift, missing, value=0.0))


class SpaceMaps(NamedTuple):
    """The two maps between the normalised spaces of a student and its teacher."""

    state: Affine | None  # from the student's to the teacher's, None if a state is the same in both
    actions: Affine  # from the teacher's to the student's


def space_maps(teacher: Checkpoint, stats: Statistics) -> SpaceMaps | None:
    """The maps for batches normalised by the dataset's `stats`; None if these are the teacher's own statistics.

    Raises ReflowError if a statistic in use is missing, or if no map fits the difference.
    """
    config, saved = teacher.config, saved_statistics(teacher)
    cameras = [name for name, spec in (config.input_features or {}).items() if spec.type is FeatureType.VISUAL]
    current = {
        name: {statistic: np.asarray(value, np.float32) for statistic, value in stats[name].items()}
        for name in (*TYPES, *cameras)
        if name in stats
    }
    _check_images(config, cameras, saved, current)
    _check(teacher.source, config, saved, current)
    state, actions = (_map(_Space(name, config, current), _Space(name, config, saved)) for name in (OBS_STATE, ACTION))
    changes = {OBS_STATE: state.change(), ACTION: actions.change()}
    most = max(changes, key=lambda name: changes[name].max().item())
    if changes[most].max() <= NEGLIGIBLE:
        return None
    if config.adapt_to_pi_aloha:
        raise ReflowError(
            "The dataset's statistics are not the teacher's, and adapt_to_pi_aloha=true bends the normalised space, so "
            "they cannot be mapped. First fine-tune the teacher on this dataset with lerobot-train."
        )
    logging.getLogger(__name__).info(
        f"The dataset's statistics are not the teacher's (most in '{most}' dimension {int(changes[most].argmax())}, by "
        f"{changes[most].max():.3g} in normalised units): state and actions are mapped to the teacher's space and back."
    )
    state = state.padded(config.max_state_dim)
    return SpaceMaps(state if state.change().max() > NEGLIGIBLE else None, actions.padded(config.max_action_dim))


def robot_units(checkpoint: Checkpoint, policy: SmolVLAPolicy) -> Affine:
    """The map from a checkpoint's normalised actions to the robot's own units, at the robot's width.

    `policy` is the checkpoint's; it converts Aloha's normalised units once more (`adapt_to_pi_aloha`).
    """
    saved = saved_statistics(checkpoint)
    _check(checkpoint.source, checkpoint.config, saved, saved)
    return _robot_units(checkpoint.config, saved, policy)


def action_deviations(policy: SmolVLAPolicy, stats: Statistics) -> Tensor:
    """Standard deviations in one normalised unit of each action dimension, (D,) float32; 0 if it never moves.

    A unit counts as one standard deviation if `stats` has none, as it is in LeRobot's "MEAN_STD".
    """
    if "std" not in stats.get(ACTION, {}):
        feature = policy.config.action_feature
        return torch.ones(policy.config.max_action_dim if feature is None else feature.shape[0])
    std = moving_deviations(stats[ACTION]).double()
    scale = _robot_units(policy.config, stats, policy).scale.abs()
    return torch.where(std > 0, scale / std, 0.0).float()


def _robot_units(config: SmolVLAConfig, stats: Statistics, policy: SmolVLAPolicy) -> Affine:
    unnormalised = _Space(ACTION, config, stats).probe(UnnormalizerProcessorStep)
    if not config.adapt_to_pi_aloha:
        return unnormalised
    width = len(unnormalised.scale)
    encoded = [policy._pi_aloha_encode_actions(torch.full((1, 1, width), x).double())[0, 0] for x in (0.0, 1.0)]
    return Affine(scale=unnormalised.scale * (encoded[1] - encoded[0]), shift=unnormalised(encoded[0]))


@dataclass(frozen=True)
class _Space:
    """The normalised space of one feature: the dataset's or the teacher's, by its statistics."""

    feature: str
    config: SmolVLAConfig
    stats: Statistics

    def probe(self, kind: type[NormalizerProcessorStep] | type[UnnormalizerProcessorStep]) -> Affine:
        """LeRobot's normaliser or unnormaliser as an affine map, found by its values at 0 and 1."""
        step = kind(
            features={self.feature: PolicyFeature(TYPES[self.feature], (self.width(),))},
            norm_map={FeatureType(k): mode for k, mode in self.config.normalization_mapping.items()},
            stats={self.feature: dict(self.stats.get(self.feature, {}))},
        )

        def at(value: float) -> Tensor:
            x = torch.full((self.width(),), value, dtype=torch.float64)
            if self.feature == ACTION:
                return step(create_transition(action=x))[TransitionKey.ACTION]
            return step(create_transition(observation={self.feature: x}))[TransitionKey.OBSERVATION][self.feature]

        shift = at(0.0)
        return Affine(scale=at(1.0) - shift, shift=shift)

    def width(self) -> int:
        return robot_width(self.config, self.stats, self.feature)

    def still(self) -> Tensor:
        """True for dimensions that never move, (D,)."""
        return torch.from_numpy(never_moves(self.stats.get(self.feature, {}), self.width()))

    def value(self) -> Tensor:
        """The value of each dimension that never moves, (D,) float64; of the others it says nothing."""
        zeros = np.zeros(self.width())
        low, high, mean = (self.stats.get(self.feature, {}).get(name, zeros) for name in ("min", "max", "mean"))
        return torch.from_numpy(np.where(np.equal(low, high), low, mean).astype(np.float64))


def _map(dataset: _Space, teacher: _Space) -> Affine:
    """The map of a state into the teacher's space, or of actions back, at the robot's width.

    A state is unnormalised by the inverse of the dataset's normaliser, since the policy has seen it normalised. The
    teacher's actions are unnormalised as for the robot, and normalised by the inverse of the dataset's unnormaliser.
    """
    is_state = dataset.feature == OBS_STATE
    before, after = (dataset, teacher) if is_state else (teacher, dataset)
    kind = NormalizerProcessorStep if is_state else UnnormalizerProcessorStep
    undone, applied = before.probe(kind), after.probe(kind)
    if is_state:
        scale = applied.scale / undone.scale
        moving = Affine(scale, applied.shift - scale * undone.shift)
    else:
        moving = Affine(undone.scale / applied.scale, (undone.shift - applied.shift) / applied.scale)
    # Statistics without "min" and "max" do not show that a dimension never moves. If they are the same, no matter.
    changed = ~(moving.change() <= NEGLIGIBLE)
    _refuse(dataset.feature, after.still() & ~before.still() & changed, CONSTANT_IN_ONE)
    still, both = dataset.still(), dataset.still() & teacher.still()
    same = torch.isclose(dataset.value(), teacher.value(), rtol=1e-5, atol=1e-6)
    _refuse(dataset.feature, both & ~same, OTHER_CONSTANTS)
    # A map would multiply or divide a constant by its standard deviation, which is rounding noise or 0. LeRobot's
    # normaliser gives the constant on both sides of the map.
    known, wanted = (space.probe(NormalizerProcessorStep)(dataset.value()) for space in (before, after))
    alike = (wanted - known).abs() <= NEGLIGIBLE
    mapped = Affine(
        scale=torch.where(still, alike.to(moving.scale), moving.scale),
        shift=torch.where(still, torch.where(alike, 0.0, wanted), moving.shift),
    )
    _refuse(dataset.feature, ~(mapped.change() < HOPELESS) & ~both, CONSTANT_IN_ONE)
    return mapped


def _refuse(feature: str, dimensions: Tensor, why: str) -> None:
    """Raise ReflowError if any of these dimensions, (D,) bool, is true."""
    if dimensions.any():
        raise ReflowError(
            f"The dataset's statistics cannot be mapped to the teacher's: '{feature}' dimension "
            f"{int(dimensions.int().argmax())} is {why}. First fine-tune the teacher on this dataset, with "
            "lerobot-train."
        )


def _check(source: str, config: SmolVLAConfig, saved: Statistics, current: Statistics) -> None:
    """Raise ReflowError unless both sides have every statistic in use, in one shape.

    LeRobot hands its normaliser the dataset's statistics under the dataset's own names. A renamed state has none, and
    would be trained unnormalised.
    """
    for feature, statistic in ((name, statistic) for name in TYPES for statistic in in_use(config, name)):
        of_teacher, of_dataset = (stats.get(feature, {}).get(statistic) for stats in (saved, current))
        if of_teacher is None or of_dataset is None:
            raise ReflowError(
                f"{f'The checkpoint {source} has no saved' if of_teacher is None else 'The dataset has no'} statistics "
                f"'{feature}.{statistic}', and they normalise the teacher's {feature}. Use a checkpoint that "
                "lerobot-train saved. A dataset with another name for this feature has to be converted."
            )
        if of_dataset.shape != of_teacher.shape:
            raise ReflowError(
                f"'{feature}' has {of_dataset.size} dimensions in the dataset and {of_teacher.size} in the statistics "
                f"of the teacher {source}. Name the dataset that the teacher was fine-tuned on, or first fine-tune the "
                "teacher on this one, with lerobot-train."
            )


def _check_images(config: SmolVLAConfig, cameras: Sequence[str], saved: Statistics, current: Statistics) -> None:
    """Raise ReflowError if images are normalised, and not by the teacher's statistics."""
    mode = config.normalization_mapping.get(FeatureType.VISUAL.value, NormalizationMode.IDENTITY)
    for camera, statistic in ((camera, statistic) for camera in cameras for statistic in STATISTICS[mode]):
        one, other = (np.ravel(stats.get(camera, {}).get(statistic, ())) for stats in (current, saved))
        if one.size != other.size or not np.allclose(one, other):
            raise ReflowError(
                f"The teacher's images were normalised by other statistics: '{camera}.{statistic}' is not the "
                "dataset's. Only state and actions can be mapped."
            )
