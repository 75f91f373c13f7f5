"""The recipe: where on a coupling's line the student learns, couplings per frame, and the share of recorded data."""

from dataclasses import dataclass

import torch

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.times import TimeSampling


@dataclass(frozen=True)
class Recipe:
    """How a student learns.

    Attributes:
        time_sampling: distribution of t, see `smolvla_reflow.times`.
        couplings_per_frame: noises, each with its own time, for each frame of the batch. A frame is loaded, and its
            prefix encoded, once for all of them.
        real_data_ratio: share of each batch, 0 to 1, that trains on the recorded actions with the standard loss.
    """

    time_sampling: str = "grid:1+beta"
    couplings_per_frame: int = 1
    real_data_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Raises ReflowError, beginning with the field's name, if something is unknown or out of range."""
        TimeSampling(self.time_sampling)
        if self.couplings_per_frame < 1:
            raise ReflowError(f"couplings_per_frame={self.couplings_per_frame}: at least 1 is needed.")
        if not 0 <= self.real_data_ratio <= 1:
            raise ReflowError(f"real_data_ratio={self.real_data_ratio} is no share; give a number from 0 to 1.")

    def recorded_frames(self, batch_size: int) -> int:
        """How many of a batch's frames train on recorded actions, rounded up or down at random."""
        share = self.real_data_ratio * batch_size
        if share != int(share):
            share = share + torch.rand(()).item()
        return int(share)
