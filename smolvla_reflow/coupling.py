"""A coupling: noise and the actions it is carried to; and the frozen teacher, the first source of couplings.

LeRobot puts noise at t = 1 and actions at t = 0 (the rectified-flow papers put them the other way round):

    x_t = t * noise + (1 - t) * actions        u = noise - actions        dx = v(x, t) dt, from t = 1 to t = 0

Flow matching draws noise and recorded actions independently. Reflow (Liu, Gong & Liu, "Flow Straight and
Fast", arXiv 2209.03003, section 2 and algorithm 1) couples each noise to the end of its own path instead:
`actions = ODE_teacher(noise)`. Paths of such a coupling do not cross, so they can be straight.

A source of couplings is anything that can be called like `FrozenTeacher`. The other one in this package is
`smolvla_reflow.pairs.store.Pairs`, which reads from disk what a teacher made before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.features import cameras_seen
from smolvla_reflow.smolvla.normalization import SpaceMaps
from smolvla_reflow.smolvla.observation import Observation, observe
from smolvla_reflow.smolvla.prefix import Prefix, encode
from smolvla_reflow.smolvla.velocity import Velocity, velocity_of
from smolvla_reflow.solver import Solver


@dataclass(frozen=True, eq=False)
class Coupling:
    """Both ends of `N` straight lines, in the normalised space of the student's batches.

    Attributes:
        noise: (N, chunk_size, max_action_dim) float32, at t = 1.
        actions: (N, chunk_size, max_action_dim) float32, at t = 0.
        recorded: on which lines the actions are recorded ones, on all, none, or (N,) bool. LeRobot trains on those in
            its own way: with SmolVLA's times, and not where the chunk is padded.
    """

    noise: Tensor
    actions: Tensor
    recorded: bool | Tensor = False

    @property
    def velocity(self) -> Tensor:
        """u of each line, the same all along it, in the shape of `noise`."""
        return self.noise - self.actions

    def at(self, times: Tensor) -> Tensor:
        """x_t, a point on each line, in the shape of `noise`; `times` is (N,)."""
        t = times[:, None, None]
        return t * self.noise + (1 - t) * self.actions


class CouplingSource(Protocol):
    """Anything that couples: a frozen teacher, stored pairs, or a function of yours."""

    def __call__(
        self, observation: Observation, *, frames: Tensor | None, noise: Tensor | None, per_frame: int
    ) -> Coupling:
        """Couplings of a batch of `B` frames, `per_frame` in a row for each.

        Args:
            observation: what the teacher sees; the student's own, unless its cameras are others.
            frames: (B,) int64, the frames' indices in the dataset; None if the batch does not hold any.
            noise: (B * per_frame, chunk_size, max_action_dim) float32 where the caller fixed it; None to draw some.
            per_frame: couplings for each frame.

        Returns:
            `B * per_frame` lines, without gradient.
        """
        ...


@dataclass(frozen=True, eq=False)
class FrozenTeacher:
    """A source of couplings: noise, and the end of its path along a teacher's flow.

    Attributes:
        policy: the teacher; it moves to the student's device by itself.
        solver: of the teacher's ODE.
        space: the maps into the teacher's normalised space and back, if that is not the student's.
        rename_map: from a dataset's own names to the teacher's, for batches that have none of the teacher's cameras.
    """

    policy: SmolVLAPolicy
    solver: Solver
    space: SpaceMaps | None = None
    rename_map: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(
        self,
        observation: Observation,
        *,
        frames: Tensor | None,
        noise: Tensor | None,
        per_frame: int,
        prefix: Prefix | None = None,
    ) -> Coupling:
        """See `CouplingSource`. Runs under whatever autocast is active, as the teacher's stock sampler would.

        The whole width `max_action_dim` is solved and returned: the dimensions beyond the robot's own are part
        of the flow's state, and the student's sampler will see them too.

        Args:
            prefix: of the observation, where the student has encoded it as the teacher would.

        Raises:
            ReflowError: the student has begun to train what it shares with the teacher, or the solver fails.
        """
        config = self.policy.config
        if noise is None:
            shape = (len(observation.state) * per_frame, config.chunk_size, config.max_action_dim)
            noise = self.policy.model.sample_noise(shape, observation.state.device)
        velocity = self.velocity(observation, prefix).repeated(per_frame)
        actions = self.solver.integrate(velocity, noise, config.num_steps)
        return Coupling(noise, actions if self.space is None else self.space.actions(actions))

    def velocity(self, observation: Observation, prefix: Prefix | None = None) -> Velocity:
        """The teacher's v(x, t) for the student's observations, in the teacher's own normalised space.

        Args:
            observation, prefix: as above.

        Raises:
            ReflowError: the student has begun to train what it shares with the teacher.
        """
        follow(self.policy, observation.state.device)
        if prefix is None:
            with torch.no_grad():
                prefix = encode(self.policy.model, self.sees(observation))
        return Velocity(self.policy.model, prefix)

    def observe(self, batch: Mapping[str, Any], student: SmolVLAPolicy, seen: Observation) -> Observation:
        """A batch as stock inference of the teacher's checkpoint sees it, still in the student's normalised space.

        Args:
            batch: as it came to the policy; empty where the model was called without its policy.
            student: whose batch it is.
            seen: what the student sees of it. The same is returned unless the two list other cameras in their configs,
                or in another order.

        Raises:
            ReflowError: they do, and which images the student was given is not known.
        """
        teachers, students = self.policy.config, student.config
        names = batch or {*teachers.image_features, *students.image_features}
        renames = {} if any(cameras_seen(teachers, names)) else self.rename_map
        by_teacher = {renames.get(name, name): name for name in names}
        images = tuple(by_teacher.get(name, name) for name in cameras_seen(teachers, by_teacher))
        if images == cameras_seen(students, names):
            return seen
        if not batch:
            raise ReflowError(
                "Teacher and student list other cameras in their configs, or in another order, so that images without "
                "names cannot serve both; call policy.forward(batch)."
            )
        return observe(self.policy, {renamed: batch[name] for renamed, name in by_teacher.items()})

    def sees(self, observation: Observation) -> Observation:
        """The student's observation in the teacher's normalised space."""
        if self.space is None or self.space.state is None:
            return observation
        return observation._replace(state=self.space.state(observation.state))


@torch.no_grad()
def solve(policy: SmolVLAPolicy, observation: Observation, noise: Tensor, solver: Solver) -> Tensor:
    """Carry `noise` along the policy's flow; returns actions in the shape of `noise`, at full width.

    Args:
        policy: in eval mode, its `config.num_steps` holding where `solver.num_steps` is None.
        observation: prepared tensors on the policy's device.
        noise: (B * K, chunk_size, max_action_dim) float32, K in a row for each observation, which is encoded once.
        solver: `euler` with the config's own number of steps does what the stock sampler does.

    Raises:
        ReflowError: the solver fails.
    """
    velocity = velocity_of(policy.model, observation).repeated(len(noise) // len(observation.state))
    return solver.integrate(velocity, noise, policy.config.num_steps)


def follow(teacher: SmolVLAPolicy, device: torch.device) -> None:
    """Move the teacher's own parameters to the student's device, where those that they share are already.

    Raises:
        ReflowError: a parameter that they share has become trainable.
    """
    elsewhere = False
    for parameter in teacher.parameters():
        elsewhere |= parameter.device != device
        if parameter.requires_grad:
            raise ReflowError(
                "A parameter that the teacher shares with the student was unfrozen after attach, so that "
                "training would change the teacher; detach, unfreeze it, and attach again."
            )
    if elsewhere or any(buffer.device != device for buffer in teacher.buffers()):
        teacher.to(device)
