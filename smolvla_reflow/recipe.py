"""The recipe: where between noise and actions the student learns, how couplings are weighed, and how many there are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.times import TimeSampling

HUBER_SCALE = 0.00054  # arXiv 2310.14189, section 3.3


def by_time(errors: Tensor, t: Tensor) -> Tensor:
    """The weight t, halfway from the squared error of the velocity (weight 1) to that of the actions (weight t^2).

    The actions of a line are x_t - t u, so an error of the velocity is t times as large in the actions. Near t = 0 no
    velocity can be right, and the error matters least.
    """
    return t


def huber(errors: Tensor, t: Tensor) -> Tensor:
    """The weight that makes a squared error a pseudo-Huber loss of the line (arXiv 2405.20320, section 3.2).

    With S the sum of a line's d squared errors and k = 0.00054 d, the gradient of `2 / sqrt(d) * sqrt(S + k^2)` is
    that of the mean squared error `S / d`, weighed by `1 / sqrt(S / d + k^2 / d)`. So a line counts by the length of
    its error. The lines near t = 0, where no velocity can be right, do not drown those near t = 1.
    """
    d = errors[0].numel()
    return (errors.mean(dim=(1, 2)) + HUBER_SCALE**2 * d).rsqrt()


# From the squared errors of N lines, (N, chunk_size, max_action_dim), and their times, (N,), to a factor on each, (N,).
# None: all lines count alike.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"none": None, "t": by_time, "huber": huber}


@dataclass(frozen=True)
class Recipe:
    """Times, weights and couplings of a training.

    The papers' own loss is `Recipe(weighting="none", padding_weight=1, scaled_noise=0)`.

    Attributes:
        time_sampling: distribution of t, see `smolvla_reflow.times`.
        couplings_per_frame: noises, each with its own time, for each frame of the batch. A frame is loaded, and its
            prefix encoded, once.
        weighting: the weight of each coupling, a name of `WEIGHTINGS`.
        padding_weight: weight of errors in the padded action dimensions, 0 to 1; the robot's own dimensions have 1.
        real_data_ratio: share of each batch, 0 to 1, that trains on the recorded actions with the standard loss.
        scaled_noise: share of a teacher's couplings, 0 to 1, that start from noise of a smaller scale, half of them
            from zeros (`smolvla_reflow.noise.scaled`). Stored pairs and functions have noise of their own.
    """

    time_sampling: str = "grid:1+beta"
    couplings_per_frame: int = 1
    weighting: str = "t"
    padding_weight: float = 0.1
    real_data_ratio: float = 0.0
    scaled_noise: float = 0.25

    def __post_init__(self) -> None:
        """Raises ReflowError, beginning with the field's name, if something is unknown or out of range."""
        TimeSampling(self.time_sampling)
        if self.weighting not in WEIGHTINGS:
            raise ReflowError(f"weighting '{self.weighting}' is unknown; {known_are(WEIGHTINGS, self.weighting)}")
        if self.couplings_per_frame < 1:
            raise ReflowError(f"couplings_per_frame={self.couplings_per_frame}: at least 1 is needed.")
        for name, kind in (("padding_weight", "weight"), ("real_data_ratio", "share"), ("scaled_noise", "share")):
            if not 0 <= getattr(self, name) <= 1:
                raise ReflowError(f"{name}={getattr(self, name)} is no {kind}; give a number from 0 to 1.")

    def weighed(self, errors: Tensor, t: Tensor, action_dim: int) -> Tensor:
        """Squared errors of couplings as they count: first the padded dimensions are weighed, then each line.

        Beside recorded rows the lines' weights have the mean 1, so that the recorded rows keep their share of the
        gradient.

        Args:
            errors: (N, chunk_size, max_action_dim).
            t: (N,), times of the lines.
            action_dim: number of action dimensions that are the robot's own.
        """
        errors = self.weighed_padding(errors, action_dim)
        weigh = WEIGHTINGS[self.weighting]
        if weigh is None:
            return errors
        weights = weigh(errors.detach(), t)
        if self.real_data_ratio:
            weights = weights / weights.mean()
        return errors * weights[:, None, None]

    def weighed_padding(self, errors: Tensor, action_dim: int) -> Tensor:
        """Squared errors, those in the dimensions from `action_dim` on times `padding_weight`."""
        if action_dim == errors.shape[-1] or self.padding_weight == 1:
            return errors
        weights = torch.ones(errors.shape[-1], device=errors.device)
        weights[action_dim:] = self.padding_weight
        return errors * weights

    def recorded_frames(self, batch_size: int) -> int:
        """Number of a batch's frames that train on recorded actions, rounded up or down at random."""
        share = self.real_data_ratio * batch_size
        if share != int(share):
            share = share + torch.rand(()).item()
        return int(share)
