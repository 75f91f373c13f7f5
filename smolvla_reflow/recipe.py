"""The recipe: where between noise and actions the student learns, how couplings are weighed, and how many there are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.times import TimeSampling

HUBER_SCALE = 0.00054  # arXiv 2310.14189, section 3.3


def by_time(values: Tensor, t: Tensor) -> Tensor:
    """The weight t: halfway from the squared error of the velocity, of weight 1, to that of the actions, of t^2.

    The actions of a line are x_t - t u, so that an error of the velocity is one of t times its size in them. Near t = 0
    no velocity can be right, and it matters least.
    """
    return t


def huber(values: Tensor, t: Tensor) -> Tensor:
    """The weight that makes a squared error a pseudo-Huber loss of the line (arXiv 2405.20320, section 3.2).

    With S the sum of a line's d squared errors and k = 0.00054 d, the gradient of `2 / sqrt(d) * sqrt(S + k^2)` is
    that of the mean squared error `S / d`, weighed by `1 / sqrt(S / d + k^2 / d)`. So a line counts by the length of
    its error, not by its square: those near t = 0, where no velocity can be right, do not drown those near t = 1.
    """
    d = values[0].numel()
    return (values.mean(dim=(1, 2)) + HUBER_SCALE**2 * d).rsqrt()


# From the squared errors of N lines, (N, chunk_size, max_action_dim), and their times, (N,), to a factor on each, (N,).
# None: all count alike.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"none": None, "t": by_time, "huber": huber}


@dataclass(frozen=True)
class Recipe:
    """How a student learns.

    Attributes:
        time_sampling: distribution of t, see `smolvla_reflow.times`.
        couplings_per_frame: noises, each with its own time, for each frame of the batch. A frame is loaded, and its
            prefix encoded, once for all of them.
        weighting: how each coupling is weighed, by its time or its own error, a name of `WEIGHTINGS`.
        padding_weight: what a coupling's errors in the padded action dimensions weigh, 0 to 1, where those in the
            robot's own weigh 1.
        real_data_ratio: share of each batch, 0 to 1, that trains on the recorded actions with the standard loss.
    """

    time_sampling: str = "grid:1+beta"
    couplings_per_frame: int = 1
    weighting: str = "none"
    padding_weight: float = 1.0
    real_data_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Raises ReflowError, beginning with the field's name, if something is unknown or out of range."""
        TimeSampling(self.time_sampling)
        if self.weighting not in WEIGHTINGS:
            raise ReflowError(f"weighting '{self.weighting}' is unknown; {known_are(WEIGHTINGS, self.weighting)}")
        if self.couplings_per_frame < 1:
            raise ReflowError(f"couplings_per_frame={self.couplings_per_frame}: at least 1 is needed.")
        for name, kind in (("padding_weight", "weight"), ("real_data_ratio", "share")):
            if not 0 <= getattr(self, name) <= 1:
                raise ReflowError(f"{name}={getattr(self, name)} is no {kind}; give a number from 0 to 1.")

    def weights(self, values: Tensor, t: Tensor) -> Tensor | None:
        """A factor on each of N lines, (N,), without gradient; None if all count alike.

        Args:
            values: squared errors of the lines, (N, chunk_size, max_action_dim).
            t: their times, (N,).
        """
        weigh = WEIGHTINGS[self.weighting]
        return None if weigh is None else weigh(values.detach(), t)

    def recorded_frames(self, batch_size: int) -> int:
        """How many of a batch's frames train on recorded actions, rounded up or down at random."""
        share = self.real_data_ratio * batch_size
        if share != int(share):
            share = share + torch.rand(()).item()
        return int(share)
