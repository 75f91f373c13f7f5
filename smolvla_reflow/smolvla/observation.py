"""SmolVLA's observation, the condition of its flow, prepared as the policy's own forward prepares it.

observe(policy, batch) -> Observation        recorded_actions(policy, batch) -> Tensor
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor


class Observation(NamedTuple):
    """The condition of the flow, in the order of SmolVLA's forward. `B` is the batch size."""

    images: list[Tensor]  # per camera (B, 3, H, W) in [-1, 1], float32 or the vision encoder's dtype
    img_masks: list[Tensor]  # per camera (B,) bool, False where the camera is missing
    lang_tokens: Tensor  # (B, L) int64
    lang_masks: Tensor  # (B, L) bool
    state: Tensor  # (B, max_state_dim) float32, normalised

    def rows(self, part: slice) -> "Observation":
        """Some of the observations; the tensors are views."""
        images, masks = ([tensor[part] for tensor in each] for each in (self.images, self.img_masks))
        return Observation(images, masks, self.lang_tokens[part], self.lang_masks[part], self.state[part])


def with_one_state(policy: SmolVLAPolicy, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with Aloha's state as (B, D); LeRobot's conversion fails on (B, 1, D)."""
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
