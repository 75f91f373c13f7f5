"""A coupling: noise and the actions the teacher's ODE carries it to.

LeRobot puts noise at t = 1 and actions at t = 0 (the rectified-flow papers put them the other way round):

    x_t = t * noise + (1 - t) * actions        u = noise - actions        dx = v(x, t) dt, from t = 1 to t = 0

Flow matching draws noise and recorded actions independently. Reflow (Liu, Gong & Liu, "Flow Straight and
Fast", arXiv 2209.03003, section 2 and algorithm 1) couples each noise to the end of its own path instead:
`actions = ODE_teacher(noise)`. Paths of such a coupling do not cross, so they can be straight.
"""

from typing import NamedTuple

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.flow import Observation, solve
from smolvla_reflow.normalization import ChangeOfSpace
from smolvla_reflow.solver import Solver


class Coupling(NamedTuple):
    """Both ends of `B` paths of the teacher, in the normalised space of the student's batches."""

    noise: Tensor  # (B, chunk_size, max_action_dim) float32, t = 1
    actions: Tensor  # (B, chunk_size, max_action_dim) float32, t = 0


@torch.no_grad()
def couple(
    teacher: SmolVLAPolicy,
    observation: Observation,
    noise: Tensor,
    solver: Solver,
    space: ChangeOfSpace | None = None,
) -> Coupling:
    """Carry `noise` along the teacher's flow, under whatever autocast is active, as its stock sampler would be.

    The whole width `max_action_dim` is solved and returned: the dimensions beyond the robot's own are part
    of the flow's state, and the student's sampler will see them too.

    Args:
        teacher: a frozen policy; it is moved to the device of `noise` if it is elsewhere.
        observation: the tensors the student sees, prepared once for both.
        noise: (B * K, chunk_size, max_action_dim) float32, K in a row for each observation.
        solver: of the teacher's ODE.
        space: the way into the teacher's normalised space and back, if that is not the student's.

    Raises:
        ReflowError: the student has begun to train what it shares with the teacher, or the solver fails.
    """
    _follow(teacher, noise.device)
    if space is not None:
        observation = observation._replace(state=space.state(observation.state))
    actions = solve(teacher, observation, noise, solver)
    if space is not None:
        actions = space.actions(actions)
    return Coupling(noise, actions)


def _follow(teacher: SmolVLAPolicy, device: torch.device) -> None:
    """Bring what is the teacher's own to the student's device; what is shared went along."""
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
