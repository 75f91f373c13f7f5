"""SmolVLA's velocity field for one observation: the prefix is encoded once, then v(x, t) is one expert pass each.

    observe(policy, batch) -> Observation        encode(model, observation) -> Velocity        velocity(x, t) -> dx/dt

The prefix (images, language, state) never attends to the actions, so that `Velocity` and the training forward are one
function of (x, t), with the same gradients for everything behind the prefix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from smolvla_reflow.compat import copy_prefix
from smolvla_reflow.smolvla.binding import bind


class Observation(NamedTuple):
    """What the flow is conditioned on, in the order SmolVLA's forward takes it. `B` is the batch size."""

    images: list[Tensor]  # per camera (B, 3, H, W) in [-1, 1], float32 or the vision encoder's dtype
    img_masks: list[Tensor]  # per camera (B,) bool, False where the camera is missing
    lang_tokens: Tensor  # (B, L) int64
    lang_masks: Tensor  # (B, L) bool
    state: Tensor  # (B, max_state_dim) float32, normalised

    def repeated(self, times: int) -> "Observation":
        """Each observation `times` in a row: B become B * times."""

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        return Observation(
            images=[repeat(image) for image in self.images],
            img_masks=[repeat(mask) for mask in self.img_masks],
            lang_tokens=repeat(self.lang_tokens),
            lang_masks=repeat(self.lang_masks),
            state=repeat(self.state),
        )


def with_one_state(policy: SmolVLAPolicy, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, in which Aloha's state has no axis of time, (B, D); LeRobot's conversion stumbles over (B, 1, D)."""
    if policy.config.adapt_to_pi_aloha and batch[OBS_STATE].ndim > 2:
        return {**batch, OBS_STATE: batch[OBS_STATE][:, -1]}
    return dict(batch)


def observe(policy: SmolVLAPolicy, batch: Mapping[str, Any]) -> Observation:
    """The observations of a preprocessed batch, prepared as the policy's own forward prepares them."""
    batch = with_one_state(policy, batch)
    if policy.config.adapt_to_pi_aloha:
        # LeRobot's conversion works in place, and the batch is the caller's.
        batch[OBS_STATE] = policy._pi_aloha_decode_state(batch[OBS_STATE].clone())
    images, img_masks = policy.prepare_images(batch)
    tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    return Observation(images, img_masks, tokens, mask, policy.prepare_state(batch))


def recorded_actions(policy: SmolVLAPolicy, batch: Mapping[str, Any]) -> Tensor:
    """The recorded actions of a preprocessed batch, as the policy's own forward trains on them.

    Returns:
        (B, chunk_size, max_action_dim) float32, normalised, padded with zeros beyond the robot's dimensions.
    """
    batch = dict(batch)
    if policy.config.adapt_to_pi_aloha:
        batch[ACTION] = policy._pi_aloha_encode_actions_inv(batch[ACTION].clone())
    return policy.prepare_action(batch)


@dataclass(frozen=True)
class Velocity:
    """`v(x, t)` given one observation, whose prefix has been encoded.

    Attributes:
        model: of the policy.
        prefix: what the stock sampler hands to `denoise_step` besides x and t: padding masks and key-value cache.
    """

    model: VLAFlowMatching
    prefix: dict[str, Any]

    def repeated(self, times: int) -> "Velocity":
        """For each observation `times` in a row: B observations become B * times, sharing the work of encoding."""
        return self if times == 1 else Velocity(self.model, copy_prefix(self.prefix, times))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, (B, chunk_size, max_action_dim) in the dtype of `x`; `t` is a scalar or (B,)."""
        timestep = t.to(torch.float32).expand(len(x))
        denoise_step = type(self.model).denoise_step
        # A copy, since a call without gradient would leave a cache without gradient behind.
        return denoise_step(self.model, x_t=x, timestep=timestep, **copy_prefix(self.prefix)).to(x.dtype)


def encode(model: VLAFlowMatching, observation: Observation) -> Velocity:
    """Encode the prefix once, for any number of velocity evaluations; with gradient where gradients are enabled.

    How a prefix is encoded is LeRobot's to know and differs between its versions. So the stock sampler does it: it runs
    with a `denoise_step` that keeps what it is given and stands still.
    """
    prefix: dict[str, Any] = {}

    def keep(x_t: Tensor, timestep: Tensor, **given: Any) -> Tensor:
        prefix.update(given)
        return torch.zeros_like(x_t)

    config = model.config
    noise = observation.state.new_zeros(len(observation.state), config.chunk_size, config.max_action_dim)
    binding = bind(model, denoise_step=keep)
    try:
        type(model).sample_actions(model, *observation, noise=noise)
    finally:
        binding.undo()
    return Velocity(model, prefix)
