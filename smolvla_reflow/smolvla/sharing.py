"""What student and teacher share of a training step: the whole prefix if they can, or else each image's features.

The prefix is images, language and state. In a fine-tuned SmolVLA all that encodes it is frozen but `state_proj`. If
that is the teacher's, it is frozen too as long as both are attached, and one encoding, without gradient, serves both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import nn

from smolvla_reflow.coupling import CouplingSource
from smolvla_reflow.losses import LossStrategy
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import different_part, trained_part
from smolvla_reflow.smolvla.vision import SharedFeatures, share_features
from smolvla_reflow.teacher import FrozenTeacher


@dataclass(frozen=True, eq=False)
class Sharing:
    """What is shared, until `undo`.

    Attributes:
        own_prefix: why the student encodes the prefix for itself, with gradient, in words; None if it does not.
        features: of the images; None if the vision encoder is trained or differs.
        frozen: the parameters that were trained before.
    """

    own_prefix: str | None
    features: SharedFeatures | None
    frozen: tuple[nn.Parameter, ...]

    @contextmanager
    def once(self) -> Iterator[None]:
        """Encode each image once until the end of this block."""
        if self.features is None:
            yield
        else:
            with self.features.once():
                yield

    def in_encoder_dtype(self, observation: Observation) -> Observation:
        """The observation, with images that can be recognised in the encoder."""
        return observation if self.features is None else self.features.in_dtype(observation)

    def undo(self) -> None:
        """Thaw what was frozen, and take the vision encoders apart."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if self.features is not None:
            for binding in self.features.bindings:
                binding.undo()

    def described(self, student: SmolVLAPolicy, teacher: SmolVLAPolicy | None) -> str:
        """What is shared and what is not, and why, in sentences."""
        sentences = []
        if teacher is not None:
            of_student = {id(parameter) for parameter in student.parameters()}
            shared = sum(p.numel() for p in teacher.parameters() if id(p) in of_student)
            total = sum(p.numel() for p in teacher.parameters())
            sentences.append(f"Teacher shares {shared} of its {total} parameters with the student.")
        if self.own_prefix is not None:
            sentences.append(
                f"The student encodes the prefix (images, language, state) for itself, because {self.own_prefix}."
            )
        else:
            whom = "for the student" if teacher is None else "for teacher and student"
            sentences.append(
                f"The prefix (images, language, state) is encoded once {whom}, and state_proj stays as it is."
            )
        return " ".join(sentences)


def share(
    student: SmolVLAPolicy, source: CouplingSource, loss: LossStrategy, *, per_frame: int, train_state_proj: bool
) -> Sharing:
    """Let a student share what it can with its teacher, or among a frame's couplings.

    Args:
        student: with its weights.
        source: of couplings, a frozen teacher or stored pairs.
        loss: that it is attached with.
        per_frame: couplings for each frame.
        train_state_proj: whether the user wants that trained.
    """
    if isinstance(source, FrozenTeacher):
        features = share_features(student, source.policy)
    else:
        features = share_features(student) if per_frame > 1 else None
    own_prefix = _why_own_prefix(student, source, loss, train_state_proj)
    frozen = () if own_prefix else tuple(p for p in student.model.state_proj.parameters() if p.requires_grad)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return Sharing(own_prefix, features, frozen)


def _why_own_prefix(
    student: SmolVLAPolicy, source: CouplingSource, loss: LossStrategy, train_state_proj: bool
) -> str | None:
    if loss.joint_forward:
        return f"strategy={loss.name} trains it with the rest"
    if train_state_proj:
        return "train_state_proj=true"
    if not student.config.use_cache:
        return "the policy's use_cache=false"
    trained = trained_part(student)
    if trained not in (None, "state_proj"):
        return f"the student trains {trained}"
    if not isinstance(source, FrozenTeacher):
        return None
    if source.space is not None and source.space.state is not None:
        return "the state is normalised otherwise than the teacher's"
    different = different_part(student, source.policy)
    return None if different is None else f"the student's {different} is not the teacher's"
