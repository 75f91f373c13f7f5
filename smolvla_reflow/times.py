"""Distributions of t: the points of a coupling's line at which the student learns the velocity.

A sampler of few steps looks at the velocity only near t = 1, where LeRobot puts the noise: with one step, nowhere
else. So where t is drawn decides which number of steps the student is best at.

    beta      SmolVLA's own: 0.001 + 0.999 Beta(1.5, 1)
    grid:K    the K times that K Euler steps visit, 1, (K-1)/K, ..., 1/K; arXiv 2209.03003 (distillation)

Joined by '+' they are mixed at equal shares: `grid:1+beta` has half of the samples at t = 1, the rest as in SmolVLA.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvla_reflow.errors import ReflowError, known_are

STOCK = "beta"
KNOWN = (STOCK, "grid:K")

StockTimes = Callable[[int, torch.device], Tensor]  # VLAFlowMatching.sample_time


@dataclass(frozen=True)
class TimeSampling:
    """A distribution of t on [0, 1], or several at equal shares."""

    name: str  # as the user wrote it, such as `grid:1+beta`

    def __post_init__(self) -> None:
        """Raises ReflowError if a part of the name is unknown."""
        for term in self.terms:
            if term != STOCK:
                _grid_steps(term)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.name.split("+"))

    @property
    def visits_one(self) -> bool:
        """True if t = 1 is among the times, as on every grid. (A draw of `beta` reaches 1 only by rounding.)"""
        return self.terms != (STOCK,) * len(self.terms)

    @property
    def tenths(self) -> frozenset[int]:
        """The tenths k that the times can fall into, [k/10, (k+1)/10); the last tenth includes 1."""
        if STOCK in self.terms:
            return frozenset(range(10))
        grids = [_grid_steps(term) for term in self.terms]
        return frozenset(min(9, 10 * i // steps) for steps in grids for i in range(1, steps + 1))

    def draw(self, size: int, device: torch.device, stock: StockTimes) -> Tensor:
        """Times `(size,)`, float32; `stock` draws SmolVLA's own, `model.sample_time`."""
        drawn = [
            stock(size, device) if term == STOCK else _on_grid(_grid_steps(term), size, device) for term in self.terms
        ]
        if len(drawn) == 1:
            return drawn[0]
        which = torch.randint(len(drawn), (1, size), device=device)
        return torch.stack(drawn).gather(0, which)[0]


def _on_grid(steps: int, size: int, device: torch.device) -> Tensor:
    return ((torch.rand(size, device=device) * steps).floor() + 1) / steps


def _grid_steps(term: str) -> int:
    kind, _, steps = term.partition(":")
    if kind == "grid" and steps.isdecimal() and int(steps) > 0:
        return int(steps)
    raise ReflowError(
        f"time_sampling '{term}' is unknown; {known_are(KNOWN, term)} K is at least 1; several are joined by '+'."
    )
