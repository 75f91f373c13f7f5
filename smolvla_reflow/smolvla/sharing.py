"""The part of a training step that student and teacher share: the whole prefix if they can, or else image features.

The prefix is images, language and state. In a fine-tuned SmolVLA everything that encodes it is frozen except
`state_proj`. If the student's `state_proj` is the teacher's, it is frozen too while both are attached, and one
encoding, without gradient, serves both.
"""

import contextlib
from dataclasses import dataclass

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import nn

from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import different_part, trained_part
from smolvla_reflow.smolvla.vision import SharedFeatures, share_features


@dataclass(frozen=True, eq=False)
class Sharing:
    """The shared part, until `undo`.

    Attributes:
        why_not_shared: the reason why the student encodes the prefix for itself, with gradient; None if it does not.
        features: of the images; None if the vision encoder is trained or differs.
        frozen: the parameters that were trained before.
    """

    why_not_shared: str | None
    features: SharedFeatures | None
    frozen: tuple[nn.Parameter, ...]

    def once(self) -> contextlib.AbstractContextManager[None]:
        """Encode each image once within the block."""
        return contextlib.nullcontext() if self.features is None else self.features.once()

    def in_encoder_dtype(self, observation: Observation) -> Observation:
        """The observation, with images that the encoder takes as they are, so that it recognises them."""
        return observation if self.features is None else self.features.in_dtype(observation)

    def undo(self) -> None:
        """Thaw the frozen parameters, and unbind the vision encoders."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if self.features is not None:
            for binding in self.features.bindings:
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


def share(
    student: SmolVLAPolicy, teacher: SmolVLAPolicy | None, *, several: bool = False, why_not: str | None = None
) -> Sharing:
    """Let a student share with its teacher, or among the couplings of a frame if it has `several`.

    `why_not` is a reason against one prefix that the policies do not show.
    """
    features = None
    why_not_shared = why_not or _why_not_shared(student, teacher)
    # The vision encoder is compiled with the rest of a prefix that both see alike, and encodes each image once anyway.
    compiled = student.config.compile_model and why_not_shared is None and _same_cameras(student, teacher)
    if (teacher is not None or several) and not compiled:
        features = share_features(*(policy for policy in (student, teacher) if policy is not None))
    frozen = () if why_not_shared else tuple(p for p in student.model.state_proj.parameters() if p.requires_grad)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return Sharing(why_not_shared, features, frozen)


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
