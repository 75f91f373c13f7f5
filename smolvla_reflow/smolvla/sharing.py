"""The part of a training step that student and teacher share: the whole prefix if they can, or else image features.

The prefix is images, language and state. In a fine-tuned SmolVLA everything that encodes it is frozen except
`state_proj`. If the student's `state_proj` is the teacher's, it is frozen too while both are attached, and one
encoding, without gradient, serves both. The vision encoder is most of a step's cost. So policies that cannot share the
prefix still encode each image once, for both and for all couplings of a frame.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import different_part, trained_part


@dataclass(eq=False)
class Sharing:
    """The shared part, until `undo`."""

    why_not_shared: str | None  # the reason why the student encodes the prefix for itself, with gradient; else None
    frozen: tuple[nn.Parameter, ...]  # the parameters that were trained before
    dtype: torch.dtype | None = None  # of the vision encoder, None if it is trained, or differs, or is compiled
    bindings: tuple[Binding, ...] = ()  # on the encoders of student and teacher
    seen: list[tuple[Tensor, Any]] | None = None  # images and features of the present step, None outside of a step

    @contextmanager
    def once(self) -> Iterator[None]:
        """Encode each image tensor once until the end of this block."""
        self.seen = []
        try:
            yield
        finally:
            self.seen = None

    def in_encoder_dtype(self, observation: Observation) -> Observation:
        """The observation, with images that the encoder need not convert, so that it recognises them."""
        if self.dtype is None:
            return observation
        return observation._replace(images=[image.to(self.dtype) for image in observation.images])

    def undo(self) -> None:
        """Thaw the frozen parameters, and unbind the vision encoders."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for binding in self.bindings:
            binding.undo()

    def described(self, student: SmolVLAPolicy, teacher: SmolVLAPolicy | None) -> str:
        """Sentences for the log: the shared parameters, and who encodes the prefix and why."""
        sentences = []
        if teacher is not None:
            of_student = {id(parameter) for parameter in student.parameters()}
            shared = sum(p.numel() for p in teacher.parameters() if id(p) in of_student)
            total = sum(p.numel() for p in teacher.parameters())
            sentences.append(f"Teacher shares {shared} of its {total} parameters with the student.")
        if self.why_not_shared is not None:
            sentences.append(
                f"The student encodes the prefix (images, language, state) for itself, because {self.why_not_shared}."
            )
        else:
            whom = "for the student" if teacher is None else "for teacher and student"
            if not _same_cameras(student, teacher):
                whom += " (for each of them if they see other images, or in another order)"
            sentences.append(f"The prefix (images, language, state) is encoded once {whom}, and state_proj is frozen.")
        return " ".join(sentences)


# A compiled student calls it between two graphs: what was seen is a fact of this step, not of the graph.
@torch.compiler.disable
def _forward(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An encoder's stock forward, unless this very image was seen in this step. In train mode it may drop out."""
    seen = self.sharing.seen
    if seen is None or self.training:
        return self.forward_standard(pixel_values, *args, **kwargs)
    # Images are told apart by identity. Comparing pixels would cost a pass over them and wait for the GPU; and student
    # and teacher are handed the same tensors, so nothing but the same image is the same object.
    for image, features in seen:
        if image is pixel_values:
            return features
    features = self.forward_standard(pixel_values, *args, **kwargs)
    seen.append((pixel_values, features))
    return features


def share(
    student: SmolVLAPolicy, teacher: SmolVLAPolicy | None, *, several: bool = False, why_not: str | None = None
) -> Sharing:
    """Let a student share with its teacher, or among the couplings of a frame if it has `several`.

    `why_not` is a reason against one prefix that the policies do not show.
    """
    why_not_shared = why_not or _why_not_shared(student, teacher)
    frozen = () if why_not_shared else tuple(p for p in student.model.state_proj.parameters() if p.requires_grad)
    sharing = Sharing(why_not_shared, frozen)
    # The vision encoder is compiled with the rest of a prefix that both see alike, and encodes each image once anyway.
    compiled = student.config.compile_model and why_not_shared is None and _same_cameras(student, teacher)
    encoders = [vision_encoder(policy) for policy in (student, teacher) if policy is not None]
    if (
        (teacher is not None or several)
        and not compiled
        and all(_same_frozen_parameters(encoders[0], encoder) for encoder in encoders)
    ):
        sharing.dtype = next(encoders[0].parameters()).dtype
        sharing.bindings = tuple(
            bind(each, sharing=sharing, forward_standard=each.forward, forward=MethodType(_forward, each))
            for each in encoders
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sharing


def _same_cameras(student: SmolVLAPolicy, teacher: SmolVLAPolicy | None) -> bool:
    return teacher is None or list(teacher.config.image_features) == list(student.config.image_features)


def _why_not_shared(student: SmolVLAPolicy, teacher: SmolVLAPolicy | None) -> str | None:
    if not student.config.use_cache:
        return "the policy's use_cache=false"
    trained = trained_part(student)
    if trained not in (None, "state_proj"):
        return f"the student trains {trained}"
    different = None if teacher is None else different_part(student, teacher)
    return None if different is None else f"the student's {different} is not the teacher's"


def vision_encoder(policy: SmolVLAPolicy) -> nn.Module:
    """The part of the backbone that turns images into features, before the connector."""
    return policy.model.vlm_with_expert.get_vlm_model().vision_model


def _same_frozen_parameters(first: nn.Module, second: nn.Module) -> bool:
    of_first, of_second = dict(first.named_parameters()), dict(second.named_parameters())
    return of_first.keys() == of_second.keys() and all(
        parameter is of_second[name] and not parameter.requires_grad for name, parameter in of_first.items()
    )
