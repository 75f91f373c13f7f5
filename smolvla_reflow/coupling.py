"""A coupling, noise and the actions it is carried to; and a source of couplings.

LeRobot puts noise at t = 1 and actions at t = 0 (the rectified-flow papers put them the other way round):

    x_t = t * noise + (1 - t) * actions        u = noise - actions        dx = v(x, t) dt, from t = 1 to t = 0

Flow matching draws noise and recorded actions independently. Reflow (Liu, Gong & Liu, "Flow Straight and
Fast", arXiv 2209.03003, section 2 and algorithm 1) couples each noise to the end of the noise's path instead:
`actions = ODE_teacher(noise)`. Paths of such a coupling do not cross, so they can be straight.

This package has two sources: a frozen teacher, solved on demand (`teacher.py`), and stored pairs, which a teacher made
before (`pairs/store.py`). Any function with the signature of `CouplingSource` is another.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from smolvla_reflow.smolvla.observation import Observation


@dataclass(frozen=True, eq=False)
class Coupling:
    """Both ends of `N` straight lines, in the normalised space of the student's batches.

    Attributes:
        noise: (N, chunk_size, max_action_dim) float32, at t = 1.
        actions: (N, chunk_size, max_action_dim) float32, at t = 0.
        recorded: True if the actions are recorded ones, which train with SmolVLA's own times and without weights.
    """

    noise: Tensor
    actions: Tensor
    recorded: bool = False

    @property
    def velocity(self) -> Tensor:
        """u of each line, constant along the line, in the shape of `noise`."""
        return self.noise - self.actions

    def at(self, times: Tensor) -> Tensor:
        """x_t, a point on each line, in the shape of `noise`; `times` is (N,)."""
        t = times[:, None, None]
        return t * self.noise + (1 - t) * self.actions


class CouplingSource(Protocol):
    """Anything that couples: a frozen teacher, stored pairs, or a function of yours."""

    def __call__(
        self, observation: Observation, *, frames: Tensor | None, noise: Tensor | None, per_frame: int
    ) -> Coupling:
        """Couplings of a batch of `B` frames, `per_frame` in a row for each.

        Args:
            observation: the teacher's view, which is the student's unless their cameras differ.
            frames: (B,) int64, the frames' indices in the dataset; None if the batch does not hold any.
            noise: (B * per_frame, chunk_size, max_action_dim) float32 if the caller fixed it; None to draw it.
            per_frame: couplings for each frame.

        Returns:
            `B * per_frame` lines, without gradient.
        """
        ...
