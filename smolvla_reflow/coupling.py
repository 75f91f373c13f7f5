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


class Observation(NamedTuple):
    """What the flow is conditioned on, in the order SmolVLA's forward takes it. `B` is the batch size."""

    images: list[Tensor]  # per camera (B, 3, H, W) float32 in [-1, 1]
    img_masks: list[Tensor]  # per camera (B,) bool, False where the camera is missing
    lang_tokens: Tensor  # (B, L) int64
    lang_masks: Tensor  # (B, L) bool
    state: Tensor  # (B, max_state_dim) float32, normalised


class Coupling(NamedTuple):
    """Both ends of `B` paths of the teacher, in the teacher's normalised action space."""

    noise: Tensor  # (B, chunk_size, max_action_dim) float32, t = 1
    actions: Tensor  # (B, chunk_size, max_action_dim) float32, t = 0


@torch.no_grad()
def solve(teacher: SmolVLAPolicy, observation: Observation, noise: Tensor) -> Coupling:
    """Carry `noise` along the teacher's flow with its stock sampler, `teacher.config.num_steps` Euler steps.

    The whole width `max_action_dim` is solved and returned: the dimensions beyond the robot's own are part
    of the flow's state, and the student's sampler will see them too.

    Args:
        teacher: a frozen policy; it is moved to the device of `noise` if it is elsewhere.
        observation: the tensors the student sees, prepared once for both.
        noise: (B, chunk_size, max_action_dim) float32.
    """
    tensors = [*teacher.parameters(), *teacher.buffers()]
    if any(tensor.device != noise.device for tensor in tensors):
        teacher.to(noise.device)
    return Coupling(noise, teacher.model.sample_actions(*observation, noise=noise))
