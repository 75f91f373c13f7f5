"""The flow of a SmolVLA for one observation: its velocity field, and the ODE solved from noise to actions."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from smolvla_reflow.bindings import bind
from smolvla_reflow.compat import repeat_prefix
from smolvla_reflow.solver import Solver


class Observation(NamedTuple):
    """What the flow is conditioned on, in the order SmolVLA's forward takes it. `B` is the batch size."""

    images: list[Tensor]  # per camera (B, 3, H, W) in [-1, 1], float32 or the vision encoder's dtype
    img_masks: list[Tensor]  # per camera (B,) bool, False where the camera is missing
    lang_tokens: Tensor  # (B, L) int64
    lang_masks: Tensor  # (B, L) bool
    state: Tensor  # (B, max_state_dim) float32, normalised

    def repeated(self, times: int) -> "Observation":
        """Each observation `times` in a row."""

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        return Observation(
            images=[repeat(image) for image in self.images],
            img_masks=[repeat(mask) for mask in self.img_masks],
            lang_tokens=repeat(self.lang_tokens),
            lang_masks=repeat(self.lang_masks),
            state=repeat(self.state),
        )


def observe(policy: SmolVLAPolicy, batch: dict[str, Tensor]) -> Observation:
    """The observations of a preprocessed batch, prepared as the policy's own forward prepares them."""
    images, img_masks = policy.prepare_images(batch)
    tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    return Observation(images, img_masks, tokens, mask, policy.prepare_state(batch))


@dataclass(frozen=True)
class Velocity:
    """`v(x, t)` given one observation, whose prefix (images, language, state) has been encoded.

    Attributes:
        model: of the policy.
        prefix: what the stock sampler hands to `denoise_step` besides x and t: padding masks and key-value cache.
    """

    model: VLAFlowMatching
    prefix: dict[str, Any]

    def repeated(self, times: int) -> "Velocity":
        """For each observation `times` in a row: B observations become B * times, sharing the work of encoding."""
        return self if times == 1 else Velocity(self.model, repeat_prefix(self.prefix, times))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, (B, chunk_size, max_action_dim) in the dtype of `x`; `t` is a scalar or (B,)."""
        timestep = t.to(torch.float32).expand(len(x))
        denoise_step = type(self.model).denoise_step
        return denoise_step(self.model, x_t=x, timestep=timestep, **self.prefix).to(x.dtype)


@torch.no_grad()
def encode(policy: SmolVLAPolicy, observation: Observation) -> Velocity:
    """Encode the prefix once, for any number of velocity evaluations.

    The stock sampler does it: it is run with a `denoise_step` that notes what it is given and stands still.
    """
    model, config = policy.model, policy.model.config
    prefix: dict[str, Any] = {}

    def note(x_t: Tensor, timestep: Tensor, **given: Any) -> Tensor:
        prefix.update(given)
        return torch.zeros_like(x_t)

    noise = observation.state.new_zeros(len(observation.state), config.chunk_size, config.max_action_dim)
    binding = bind(model, denoise_step=note)
    try:
        type(model).sample_actions(model, *observation, noise=noise)
    finally:
        binding.undo()
    return Velocity(model, prefix)


@torch.no_grad()
def solve(policy: SmolVLAPolicy, observation: Observation, noise: Tensor, solver: Solver) -> Tensor:
    """Carry `noise` along the policy's flow; returns actions in the shape of `noise`, at full width.

    Args:
        policy: in eval mode, its `config.num_steps` holding where `solver.num_steps` is None.
        observation: prepared tensors on the policy's device.
        noise: (B * K, chunk_size, max_action_dim) float32, K in a row for each observation, which is encoded once.
        solver: `euler` with the config's own number of steps is the stock sampler itself.
    """
    per_observation = len(noise) // len(observation.state)
    if per_observation == 1 and solver.method == "euler" and solver.num_steps in (None, policy.config.num_steps):
        return policy.model.sample_actions(*observation, noise=noise)
    velocity = encode(policy, observation).repeated(per_observation)
    return solver.integrate(velocity, noise, policy.config.num_steps)
