"""From unreduced losses to the loss: a mean over every entry that counts, each of which weighs the same.

A loss on recorded actions is reduced by LeRobot's own forward, and a loss on couplings is the mean over the whole chunk
at full width, every entry of which a teacher has given a value. A batch of both (`real_data_ratio`) is one mean:

    counts[i, t, d] = 1 on a coupling; on recorded actions 1 where LeRobot's own reduction counts the entry, else 0
    N               = sum of counts over the batch of B frames
    "mean"          = sum(counts * losses) / N
    "none"[i]       = sum(counts * losses)[i] * B / N           whose mean over the frames is "mean"

    d "mean" / d losses[i, t, d] = counts[i, t, d] / N

LeRobot counts everything up to 0.4.4, and from 0.5 on the robot's own dimensions of the steps before the episode's end.
Where an entry counts on either kind of row, as the robot's dimensions before the episode's end do, the recorded rows'
share of the gradient is thus their share of the batch, of each process's own if there are several. If no frame is a
recorded one this is the plain mean, and if all are, "mean" is LeRobot's own.
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
        As LeRobot's forward does: the loss, a scalar or (B,), and metrics to log, which may still be tensors.
    """
    values, recorded = losses.values, losses.recorded
    if recorded is True:
        return lerobot_loss(values, step, policy, policy_forward, reduction)
    if isinstance(recorded, Tensor):
        counts = ~recorded[:, None, None] | counted_by_lerobot(values, step, policy, policy_forward)
        values = values.masked_fill(~counts, 0) * (counts.numel() / counts.sum().clamp_min(1))
    loss = values.mean(dim=(1, 2)) if reduction == "none" else values.mean()
    return loss, {"loss": loss.detach().mean()}


def counted_by_lerobot(values: Tensor, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward) -> Tensor:
    """Which entries LeRobot's reduction of recorded actions counts, bool: those that its loss has a gradient to.

    Arguments as of `reduce`; the result has the shape of `values`, of which nothing else matters.
    """
    with torch.enable_grad():
        probe = torch.zeros_like(values, requires_grad=True)
        loss, _ = lerobot_loss(probe, step, policy, policy_forward, "none")
        (weights,) = torch.autograd.grad(loss.sum(), probe)
    return weights != 0


def lerobot_loss(
    values: Tensor, step: Step, policy: SmolVLAPolicy, policy_forward: PolicyForward, reduction: str
) -> tuple[Tensor, dict[str, Any]]:
    """Reduce losses by LeRobot's own forward, which also gives its metrics; arguments as of `reduce`.

    Its reduction differs between versions and stands in the middle of its forward. So that forward runs, with its two
    expensive parts, preparing the images and asking the model, bound to what is prepared and known already.
    """
    seen = step.observation
    prepared = bind(policy, prepare_images=lambda batch: (seen.images, seen.img_masks))
    asked = bind(policy.model, forward=lambda *inputs: values)
    try:
        return policy_forward(dict(step.batch), None, None, reduction)
    finally:
        asked.undo()
        prepared.undo()
