"""An independent derivation of what the package computes, from SmolVLA's building blocks only.

Nothing here calls `VLAFlowMatching.forward`, `sample_actions` or the package: the prefix is encoded, the velocity
evaluated by `denoise_step`, the ODE and the interpolation written out.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

Batch = dict[str, Tensor]
Field = Callable[[Tensor, float], Tensor]


def inputs_of(policy: SmolVLAPolicy, batch: Batch) -> tuple:
    """The first arguments of SmolVLA's own forward: images, their masks, tokens, their mask, state."""
    language = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    return (*policy.prepare_images(batch), *language, policy.prepare_state(batch))


def repeated(batch: Batch, times: int) -> Batch:
    """A batch in which each frame stands `times` times in a row."""
    return {name: value.repeat_interleave(times, dim=0) for name, value in batch.items()}


def by_frame(losses: Tensor, frames: int = 4) -> Tensor:
    """Mean loss of each frame, from the losses of lines that stand in a row for each frame."""
    return losses.reshape(frames, -1).mean(dim=1)


def euler(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    """One step from t to t - h."""
    return x - h * v(x, t)


def midpoint(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    return x - h * v(x - h / 2 * v(x, t), t - h / 2)


def three_eighths(v: Field, x: Tensor, t: float, h: float) -> Tensor:
    k1 = v(x, t)
    k2 = v(x - h * k1 / 3, t - h / 3)
    k3 = v(x - h * (k2 - k1 / 3), t - 2 * h / 3)
    k4 = v(x - h * (k1 - k2 + k3), t - h)
    return x - h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


def solved(v: Field, noise: Tensor, times: Sequence[float], step: Callable[..., Tensor]) -> Tensor:
    """x at the last of these times, from noise at the first, with one step between each two."""
    x = noise
    for t, end in pairwise(times):
        x = step(v, x, t, t - end)
    return x


class Flow:
    """The velocity field `v(x, t)` of a policy, given a batch."""

    def __init__(self, policy: SmolVLAPolicy, batch: Batch):
        self.model = policy.model
        *seen, state = inputs_of(policy, batch)
        embs, self.pad_masks, att_masks = self.model.embed_prefix(*seen, state=state)
        block = torch.cumsum(att_masks.long(), dim=1)
        sees = (block[:, None, :] <= block[:, :, None]) & self.pad_masks[:, None, :] & self.pad_masks[:, :, None]
        encode = self.model.vlm_with_expert.forward
        extra = {"fill_kv_cache": True} if "fill_kv_cache" in inspect.signature(encode).parameters else {}
        _, self.cache = encode(
            attention_mask=sees,
            position_ids=torch.cumsum(self.pad_masks, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embs, None],
            use_cache=True,
            **extra,
        )

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.model.denoise_step(self.pad_masks, self.cache, x, torch.as_tensor(t).expand(len(x)))

    def solved(self, noise: Tensor, num_steps: int, step: Callable[..., Tensor]) -> Tensor:
        """From noise at t = 1 down to actions at t = 0, in equal steps, without gradient."""
        with torch.no_grad():
            return solved(self.velocity, noise, [1 - i / num_steps for i in range(num_steps + 1)], step)

    def euler(self, noise: Tensor, num_steps: int) -> Tensor:
        return self.solved(noise, num_steps, euler)

    def midpoint(self, noise: Tensor, num_steps: int) -> Tensor:
        return self.solved(noise, num_steps, midpoint)


def squared_errors(policy: SmolVLAPolicy, batch: Batch, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Squared errors `(N, chunk, width)` of the velocity on straight lines, as many in a row for each frame."""
    line = torch.lerp(actions, noise, time[:, None, None])
    velocity = Flow(policy, repeated(batch, len(time) // len(batch["action"]))).velocity(line, time)
    return (velocity - (noise - actions)).square()


def reflow_losses(
    student: SmolVLAPolicy,
    teacher: SmolVLAPolicy,
    batch: Batch,
    noise: Tensor,
    time: Tensor,
    num_steps: int = 10,
    step: Callable[..., Tensor] = midpoint,
) -> Tensor:
    """Squared errors `(N, chunk, width)` of the student's velocity on the teacher's straight lines."""
    actions = Flow(teacher, repeated(batch, len(time) // len(batch["action"]))).solved(noise, num_steps, step)
    return squared_errors(student, batch, actions, noise, time)
