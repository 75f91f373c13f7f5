"""From a loss strategy and a step to the loss: recorded rows beside the strategy's own, and one mean over both.

The recipe's share of recorded data (`real_data_ratio`) is the first frames of a batch. They are a step of their own,
for `standard`; the others are the strategy's. A batch of both is one mean, and every entry that counts has the same
weight:

    counts[i, t, d] = 1 on a coupling; on recorded actions 1 if LeRobot's own reduction counts the entry, else 0
    N               = sum of counts over the batch of B frames
    "mean"          = sum(counts * losses) / N
    "none"[i]       = sum(counts * losses)[i] * B / N           its mean over the frames is "mean"

LeRobot counts every entry up to 0.4.4. From 0.5 on it counts the robot's own dimensions of the steps before the
episode's end. There an entry counts on either kind of row, so the recorded rows' share of the gradient is their share
of the batch (of each process's own batch, if there are several).
"""

from collections.abc import Callable
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smolvla_reflow.losses import LossStrategy, standard
from smolvla_reflow.smolvla.binding import bind
from smolvla_reflow.step import Step

# (batch, noise, time, reduction) -> loss and metrics
PolicyForward = Callable[..., tuple[Tensor, dict[str, Any]]]


def losses_of(strategy: LossStrategy, step: Step) -> tuple[Tensor, int]:
    """The unreduced losses of a step, (B, chunk_size, max_action_dim), and the number of recorded rows at its start."""
    size = len(step.actions)
    recorded = 0 if "real_data_ratio" in strategy.unused else step.recipe.recorded_frames(size)
    if not recorded:
        return strategy(step), 0
    if step.recipe.real_data_ratio == 1:
        return standard(step), size
    # The strategy sees a frame in every step, since LeRobot wants the same metrics of every process.
    others = step.rows(min(recorded, size - 1), size)
    return torch.cat([standard(step.rows(0, recorded)), strategy(others)])[:size], recorded


def reduced_loss(
    strategy: LossStrategy, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward, reduction: str
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a step, a scalar or with `reduction="none"` (B,), and metrics to log, which may still be tensors.

    `policy_forward` is the attached policy's forward as LeRobot defines it.
    """
    losses, recorded = losses_of(strategy, step)
    if not strategy.couples or (recorded and step.recipe.real_data_ratio == 1):
        return lerobot_loss(losses, step, policy, policy_forward, reduction)
    if recorded:
        counts = torch.ones_like(losses, dtype=torch.bool)
        counts[:recorded] = counted_by_lerobot(losses[:recorded], step.rows(0, recorded), policy, policy_forward)
        losses = losses.masked_fill(~counts, 0) * (counts.numel() / counts.sum().clamp_min(1))
    loss = losses.mean(dim=(1, 2)) if reduction == "none" else losses.mean()
    return loss, {"loss": loss.detach().mean()}


def counted_by_lerobot(losses: Tensor, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward) -> Tensor:
    """The entries that LeRobot's reduction of recorded actions counts, bool: its loss has a gradient to them."""
    with torch.enable_grad(), Unread():
        probe = torch.zeros_like(losses, requires_grad=True)
        loss, _ = lerobot_loss(probe, step, policy, policy_forward, "none")
        (weights,) = torch.autograd.grad(loss.sum(), probe)
    return weights != 0


class Unread(TorchFunctionMode):
    """Within it `tensor.item()` is the tensor: LeRobot reads a loss for its metrics, which waits for the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.item else func(*args, **(kwargs or {}))


def lerobot_loss(
    losses: Tensor, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward, reduction: str
) -> tuple[Tensor, dict[str, Any]]:
    """Reduce losses by LeRobot's own forward, which also gives its metrics.

    LeRobot's reduction differs between versions and stands in the middle of its forward. So that forward runs, with its
    two expensive parts, preparing the images and asking the model, bound to results that are known already.
    """
    seen = step.observation
    prepared = bind(policy, prepare_images=lambda batch: (seen.images, seen.img_masks))
    asked = bind(policy.model, forward=lambda *inputs: losses)
    # LeRobot converts Aloha's state and actions in place, and these may be rows of the caller's batch.
    own = {name: step.batch[name].clone() for name in (OBS_STATE, ACTION)}
    try:
        return policy_forward({**step.batch, **own}, None, None, reduction)
    finally:
        asked.undo()
        prepared.undo()
