"""Encode each image once: teacher and student share the features of a frozen vision encoder.

The encoder is most of a training step's cost, and the teacher looks at the student's images. Within
`SharedFeatures.once()` an image is encoded once for both policies, and for all couplings of a frame. Policies that
cannot share the whole prefix (`prefix.py`) still share these features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.observation import Observation


@dataclass(eq=False)
class SharedFeatures:
    """The encoder's features of the images of the present step.

    Attributes:
        dtype: of the encoder; images in this dtype reach it as the very tensors that were passed in.
        bindings: on the encoders of student and teacher.
        seen: (image, features) pairs, or None outside of a step.
    """

    dtype: torch.dtype
    bindings: tuple[Binding, ...] = ()
    seen: list[tuple[Tensor, Any]] | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """Encode each image tensor once until the end of this block."""
        self.seen = []
        try:
            yield
        finally:
            self.seen = None

    def in_dtype(self, observation: Observation) -> Observation:
        """The observation with images that the encoder need not convert, and can therefore be recognised in it."""
        return observation._replace(images=[image.to(self.dtype) for image in observation.images])


class VisionMixin:
    """Bound onto the two vision encoders; never inherited."""

    training: bool
    forward_standard: Callable[..., Any]
    shared_features: SharedFeatures

    # A compiled student calls it between two graphs: what was seen is a fact of this step, not of the graph.
    @torch.compiler.disable
    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, unless this very image was seen in this step. An encoder in train mode may drop out."""
        seen = self.shared_features.seen
        if seen is None or self.training:
            return self.forward_standard(pixel_values, *args, **kwargs)
        # Images are told apart by identity. Comparing pixels would cost a pass over them and wait for the GPU; and
        # student and teacher are handed the same tensors, so nothing but the same image is the same object.
        for image, features in seen:
            if image is pixel_values:
                return features
        features = self.forward_standard(pixel_values, *args, **kwargs)
        seen.append((pixel_values, features))
        return features


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


def _same_frozen_parameters(first: nn.Module, second: nn.Module) -> bool:
    of_first, of_second = dict(first.named_parameters()), dict(second.named_parameters())
    return of_first.keys() == of_second.keys() and all(
        parameter is of_second[name] and not parameter.requires_grad for name, parameter in of_first.items()
    )
