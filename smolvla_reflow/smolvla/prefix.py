"""SmolVLA's prefix (images, language, state): encoded once, asked any number of times.

    encode(model, observation) -> Prefix

The prefix never attends to the actions. So the training forward and the sampler's `denoise_step` on an encoded prefix
are one function of (x, t), with the same gradients for everything behind the prefix. And where a teacher and its
student agree in all that encodes it, one encoding serves both: in a fine-tuned checkpoint the vision-language model is
frozen, and only `state_proj` is trained, which straighter paths need not change.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from torch import Tensor, nn

from smolvla_reflow.compat import copy_prefix
from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.observation import Observation

_COMPILED = "_compiled_for_prefix"  # the attribute of a model that holds its compiled sampler


@dataclass(frozen=True, eq=False)
class Prefix:
    """An encoded prefix of `B` observations."""

    # what the stock sampler hands to `denoise_step` besides x and t: padding mask and key-value cache
    given: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the prefix, in the order of `of`."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        copy_prefix(self.given, note)
        return tuple(found)

    def of(self, tensors: Sequence[Tensor]) -> "Prefix":
        """A prefix like this one, made of other tensors."""
        others = iter(tensors)
        return Prefix(copy_prefix(self.given, lambda tensor: next(others)))

    def copied(self) -> dict[str, Any]:
        """For one call of `denoise_step`, which writes into the cache it is given. The tensors are shared."""
        return copy_prefix(self.given, lambda tensor: tensor)

    def repeated(self, times: int) -> "Prefix":
        """Each observation `times` in a row: B become B * times."""
        return self if times == 1 else Prefix(copy_prefix(self.given, lambda x: x.repeat_interleave(times, dim=0)))


def encode(model: VLAFlowMatching, observation: Observation) -> Prefix:
    """Encode the prefix once, with gradient where gradients are enabled and something in it is trained.

    LeRobot's versions encode a prefix differently. So the stock sampler does it: it runs for one step, unguided, with a
    `denoise_step` that keeps its arguments and stands still.
    """
    given: dict[str, Any] = {}

    def keep(x_t: Tensor, timestep: Tensor, **rest: Any) -> Tensor:
        given.update(rest)
        return torch.zeros_like(x_t)

    config = copy.copy(model.config)
    config.num_steps, config.rtc_config = 1, None
    noise = observation.state.new_zeros(len(observation.state), config.chunk_size, config.max_action_dim)
    compiled = vars(model).get(_COMPILED)
    binding = bind(model, denoise_step=keep, config=config)
    try:
        (compiled or type(model).sample_actions)(model, *observation, noise=noise)
    finally:
        binding.undo()
    # CUDA graphs of a compiled sampler write the next prefix into the memory of this one.
    return Prefix(copy_prefix(given, torch.clone) if compiled else given)


def compile_encoding(*models: VLAFlowMatching) -> tuple[Binding, ...]:
    """Let `encode` compile what it runs of these models, in the mode of the first model's config."""
    compiled = torch.compile(type(models[0]).sample_actions, mode=models[0].config.compile_mode)
    return tuple(bind(model, **{_COMPILED: compiled}) for model in models)


def trained_part(policy: SmolVLAPolicy) -> str | None:
    """The trained part of the modules that encode the prefix, in words; None if all are frozen."""
    if is_trained(policy.model.vlm_with_expert.vlm):
        return "part of the vision-language model"
    return "state_proj" if is_trained(policy.model.state_proj) else None


def is_trained(module: nn.Module) -> bool:
    """True if any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def different_part(student: SmolVLAPolicy, teacher: SmolVLAPolicy) -> str | None:
    """The part of the modules that encode the prefix in which two policies differ, in words; None if there is none."""
    for name in ("vlm_with_expert.vlm", "state_proj"):
        of_student, of_teacher = (
            dict(policy.model.get_submodule(name).named_parameters()) for policy in (student, teacher)
        )
        alike = of_student.keys() == of_teacher.keys() and all(
            parameter is of_teacher[key] or torch.equal(parameter, of_teacher[key])
            for key, parameter in of_student.items()
        )
        if not alike:
            return "vision-language model" if "vlm" in name else name
    return None
