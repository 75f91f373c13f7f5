"""SmolVLA's velocity field for one observation: one pass through the action expert for each v(x, t).

velocity_of(model, observation) -> Velocity        velocity(x, t) -> dx/dt
"""

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from torch import Tensor

from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import Prefix, encode


@dataclass(frozen=True, eq=False)
class Velocity:
    """`v(x, t)` given one observation, whose prefix has been encoded."""

    model: VLAFlowMatching  # of the policy
    prefix: Prefix  # by this model, or by one that encodes it in the same way

    def repeated(self, times: int) -> "Velocity":
        """For each observation `times` in a row: B observations become B * times, sharing the work of encoding."""
        return replace(self, prefix=self.prefix.repeated(times))

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """dx/dt, in the shape of `x`, (B, chunk_size, max_action_dim); under autocast in its dtype, as stock.

        Args:
            x: where.
            t: when, a number, or a tensor () or (B,).
        """
        if isinstance(t, Tensor):
            timestep = t.to(torch.float32).expand(len(x))
        else:  # filled in on the device; copying a number there would wait for it
            timestep = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        velocity = self.model.denoise_step(x_t=x, timestep=timestep, **self.prefix.copied())
        if not torch.is_grad_enabled():
            # Until PyTorch 2.11 autocast would hand the weights that it has cast without gradient to a later call with.
            torch.clear_autocast_cache()
        return velocity


def velocity_of(model: VLAFlowMatching, observation: Observation) -> Velocity:
    """Encode the prefix once, for any number of velocity evaluations."""
    return Velocity(model, encode(model, observation))


def compile_velocity(*models: VLAFlowMatching) -> tuple[Binding, ...]:
    """Compile the `denoise_step` that these models share, in the mode of the first model's config."""
    compiled = torch.compile(type(models[0]).denoise_step, mode=models[0].config.compile_mode)

    def denoise_step(self: VLAFlowMatching, **given: Any) -> Tensor:
        # A copy, since CUDA graphs write the next call's result into the memory of this one's.
        return compiled(self, **given).clone()

    return tuple(bind(model, denoise_step=MethodType(denoise_step, model)) for model in models)
