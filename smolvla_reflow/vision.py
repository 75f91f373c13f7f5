"""Look at each image once: teacher and student share what a frozen vision encoder makes of it.

The encoder is most of a training step's cost, and the teacher looks at the student's images. Within
`SharedFeatures.once()` the first of the two to encode an image does so for both, and for all of a frame's couplings.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from smolvla_reflow.bindings import Binding, bind


@dataclass(eq=False)
class SharedFeatures:
    """What the encoder made of the images of the present step.

    Attributes:
        dtype: of the encoder; images in this dtype reach it as the very tensors that were passed in.
        bindings: on the encoders of student and teacher.
        seen: (image, features) pairs, or None outside of a step.
        copies: (copies, images, times): batches in which each image of another batch stands `times` in a row.
    """

    dtype: torch.dtype
    bindings: tuple[Binding, ...] = ()
    seen: list[tuple[Tensor, Any]] | None = None
    copies: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Encode each image tensor once until the end of this block."""
        self.seen = []
        try:
            yield
        finally:
            self.seen = None
            self.copies.clear()

    def is_repeated(self, images: Tensor, times: int, copies: Tensor) -> None:
        """Take it from the caller that `copies` are those images, each `times` in a row."""
        if self.seen is not None:
            self.copies.append((copies, images, times))


class VisionMixin:
    """Bound onto the two vision encoders; never inherited."""

    training: bool
    forward_standard: Callable[..., Any]
    shared_features: SharedFeatures

    # A compiled student calls it between two graphs: what was seen is a fact of this step, not of the graph.
    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, unless this very image was seen in this step. A training encoder may drop out."""
        seen = self.shared_features.seen
        if seen is None or self.training:
            return self.forward_standard(pixel_values, *args, **kwargs)
        for image, features in seen:
            if image is pixel_values:
                return features
        for copies, images, times in self.shared_features.copies:
            if copies is pixel_values:
                return _repeated(self.forward(images, *args, **kwargs), times)
        features = self.forward_standard(pixel_values, *args, **kwargs)
        seen.append((pixel_values, features))
        return features


def _repeated(features: Any, times: int) -> Any:
    """What the encoder returned, for each image `times` in a row."""
    tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
    return type(features)(**{name: value.repeat_interleave(times, dim=0) for name, value in tensors.items()})


def share_features(*policies: SmolVLAPolicy) -> SharedFeatures | None:
    """Let student and teacher, or one alone, encode each image once; None if the encoder is trained, or differs."""
    encoders = [vision_encoder(policy) for policy in policies]
    if not all(_same_frozen_parameters(encoders[0], encoder) for encoder in encoders):
        return None
    shared = SharedFeatures(next(encoders[0].parameters()).dtype)
    shared.bindings = tuple(
        bind(
            encoder,
            shared_features=shared,
            forward_standard=encoder.forward,
            forward=MethodType(VisionMixin.forward, encoder),
        )
        for encoder in encoders
    )
    return shared


def vision_encoder(policy: SmolVLAPolicy) -> nn.Module:
    """The part of the backbone that turns images into features, before the connector."""
    return policy.model.vlm_with_expert.get_vlm_model().vision_model


def _same_frozen_parameters(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    return mine.keys() == other.keys() and all(
        parameter is other[name] and not parameter.requires_grad for name, parameter in mine.items()
    )
