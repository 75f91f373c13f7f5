"""From unreduced losses to the loss: LeRobot's own reduction of recorded actions, the whole chunk of all others.

A teacher's actions fill the chunk at full width. From LeRobot 0.5 on its reduction leaves out padded dimensions and
steps past the episode's end, which is right for recorded actions, since they do not exist there.
"""

from collections.abc import Callable
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.smolvla.binding import bind
from smolvla_reflow.step import Losses, Step

# (batch, noise, time, reduction) -> loss and metrics
PolicyForward = Callable[..., tuple[Tensor, dict[str, Any]]]


def reduce(
    losses: Losses, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward, reduction: str
) -> tuple[Tensor, dict[str, Any]]:
    """Reduce the losses of a step.

    Args:
        losses: (B, chunk_size, max_action_dim), and which of the frames they are on recorded actions for.
        step: that the losses are of.
        policy: whose forward computes them.
        policy_forward: the one that LeRobot gave it.
        reduction: "mean", or "none" for one loss per frame.

    Returns:
        As LeRobot's forward does: the loss, a scalar or (B,), and metrics to log.
    """
    if losses.recorded is True:
        return lerobot_loss(losses, step, policy, policy_forward, reduction)
    if losses.recorded is False:
        loss = losses.values.mean(dim=(1, 2)) if reduction == "none" else losses.values.mean()
    else:
        by_lerobot, _ = lerobot_loss(losses, step, policy, policy_forward, "none")
        loss = torch.where(losses.recorded, by_lerobot, losses.values.mean(dim=(1, 2)))
        loss = loss if reduction == "none" else loss.mean()
    return loss, {"loss": loss.mean().item()}


def lerobot_loss(
    losses: Losses, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward, reduction: str
) -> tuple[Tensor, dict[str, Any]]:
    """Reduce losses by LeRobot's own forward, which also gives its metrics; arguments as of `reduce`.

    Its reduction differs between versions and stands in the middle of its forward. So that forward runs, with its two
    expensive parts, preparing the images and asking the model, bound to what is prepared and known already.
    """
    seen = step.observation
    prepared = bind(policy, prepare_images=lambda batch: (seen.images, seen.img_masks))
    asked = bind(policy.model, forward=lambda *inputs: losses.values)
    try:
        return policy_forward(dict(step.batch), None, None, reduction)
    finally:
        asked.undo()
        prepared.undo()
