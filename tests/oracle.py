"""An independent derivation of what the package computes, from SmolVLA's building blocks only.

Nothing here calls `VLAFlowMatching.forward`, `sample_actions` or the package: the prefix is encoded, the velocity
evaluated by `denoise_step`, the ODE and the interpolation written out.
"""

import inspect

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor


class Flow:
    """The velocity field `v(x, t)` of a policy, given a batch."""

    def __init__(self, policy: SmolVLAPolicy, batch: dict[str, Tensor]):
        model = self.model = policy.model
        images, img_masks = policy.prepare_images(batch)
        embs, self.pad_masks, att_masks = model.embed_prefix(
            images,
            img_masks,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
            state=policy.prepare_state(batch),
        )
        block = torch.cumsum(att_masks.long(), dim=1)
        sees = (block[:, None, :] <= block[:, :, None]) & self.pad_masks[:, None, :] & self.pad_masks[:, :, None]
        encode = model.vlm_with_expert.forward
        extra = {"fill_kv_cache": True} if "fill_kv_cache" in inspect.signature(encode).parameters else {}
        _, self.cache = encode(
            attention_mask=sees,
            position_ids=torch.cumsum(self.pad_masks, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embs, None],
            use_cache=True,
            **extra,
        )

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.denoise_step(self.pad_masks, self.cache, x, t)

    def euler(self, noise: Tensor, num_steps: int) -> Tensor:
        """From noise at t = 1 down to actions at t = 0."""
        x = noise
        for step in range(num_steps):
            t = torch.full((len(x),), 1.0 - step / num_steps)
            x = x - self.velocity(x, t) / num_steps
        return x

    def midpoint(self, noise: Tensor, num_steps: int) -> Tensor:
        """The same, each step with the velocity half-way along it."""
        x, h = noise, 1 / num_steps
        for step in range(num_steps):
            t = torch.full((len(x),), 1.0 - step * h)
            half_way = x - h / 2 * self.velocity(x, t)
            x = x - h * self.velocity(half_way, t - h / 2)
        return x


def reflow_losses(
    student: SmolVLAPolicy,
    teacher: SmolVLAPolicy,
    batch: dict[str, Tensor],
    noise: Tensor,
    time: Tensor,
    num_steps: int,
    solver: str = "midpoint",
) -> Tensor:
    """Squared errors `(B, chunk, width)` of the student's velocity on the teacher's straight line."""
    with torch.no_grad():
        actions = getattr(Flow(teacher, batch), solver)(noise, num_steps)
    line = torch.lerp(actions, noise, time.reshape(-1, 1, 1))
    slope = noise - actions
    return (Flow(student, batch).velocity(line, time) - slope).square()
