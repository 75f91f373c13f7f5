"""A loss of your own in one decorated function: reflow that trains only near the noise end (t close to 1).

Import this file before training, or declare it in your package so that nobody needs to:

    [project.entry-points."smolvla_reflow.loss_strategies"]
    late = "your_package.late_time_loss:late"

    smolvla-reflow-train --reflow.strategy=late ...
"""

import torch

from smolvla_reflow import register_loss_strategy


@register_loss_strategy("late", whole_chunk=True)
def late(model, observation, actions, noise=None, time=None):
    """The teacher's coupling, with t drawn uniformly from [0.8, 1]."""
    coupling = model.generate_reflow_target(*observation, noise=noise)
    if time is None:
        time = 0.8 + 0.2 * torch.rand(len(coupling.noise), device=coupling.noise.device)
    return model.forward_standard(*observation, coupling.actions, coupling.noise, time)
