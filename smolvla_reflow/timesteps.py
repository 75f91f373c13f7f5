"""Distributions of t: at which points of a coupling's line the student learns the velocity.

A sampler of few steps looks at the velocity near t = 1 alone, where LeRobot puts the noise: with one step, nowhere
else. So where t is drawn decides which number of steps the student is best at.

    beta           SmolVLA's own: 0.001 + 0.999 Beta(1.5, 1)
    uniform        on [0, 1]; Liu et al., arXiv 2209.03003
    u_shaped       density proportional to exp(4t) + exp(4(1 - t)); Lee et al., arXiv 2405.20320
    logit_normal   sigmoid of a standard normal; Esser et al., arXiv 2403.03206, section 3.1
    exponential    density proportional to 10^t; Kim et al., arXiv 2410.07815 (Simple ReFlow)
    grid:K         the K times that K Euler steps visit, 1, (K-1)/K, ..., 1/K; arXiv 2209.03003 (distillation)

Joined by '+' they are mixed at equal shares: `grid:1+beta` has half of the samples at t = 1, the rest as in SmolVLA.
Each is the inverse of its cumulative distribution function, applied to a uniform draw.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvla_reflow.errors import ReflowError

U_SHAPE = 4.0  # a in arXiv 2405.20320, where the density is proportional to exp(at) + exp(a(1 - t))
STOCK = "beta"

StockTimes = Callable[[int, torch.device], Tensor]  # VLAFlowMatching.sample_time


def uniform(u: Tensor) -> Tensor:
    return u


def u_shaped(u: Tensor) -> Tensor:
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE


def logit_normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u).sigmoid()


def exponential(u: Tensor) -> Tensor:
    return torch.log10(1 + 9 * u)


def grid(steps: int) -> Callable[[Tensor], Tensor]:
    """The times an Euler sampler of so many steps visits, all as likely."""
    return lambda u: ((u * steps).floor() + 1) / steps


INVERSE_CDFS = {function.__name__: function for function in (uniform, u_shaped, logit_normal, exponential)}
KNOWN = (STOCK, *INVERSE_CDFS, "grid:K")


@dataclass(frozen=True)
class TimeSampling:
    """A distribution of t on [0, 1], or several at equal shares.

    Attributes:
        name: as the user wrote it, such as `grid:1+beta`.
    """

    name: str

    def __post_init__(self) -> None:
        """Raises ReflowError if a part of the name is unknown."""
        for term in self.terms:
            if term != STOCK:
                _inverse_cdf(term)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.name.split("+"))

    def draw(self, size: int, device: torch.device, stock: StockTimes) -> Tensor:
        """Times `(size,)`, float32.

        Args:
            size: how many.
            device: where.
            stock: draws SmolVLA's own, `model.sample_time`.
        """
        drawn = [
            stock(size, device) if term == STOCK else _inverse_cdf(term)(torch.rand(size, device=device))
            for term in self.terms
        ]
        if len(drawn) == 1:
            return drawn[0]
        which = torch.randint(len(drawn), (1, size), device=device)
        return torch.stack(drawn).gather(0, which)[0]


def _inverse_cdf(term: str) -> Callable[[Tensor], Tensor]:
    if term in INVERSE_CDFS:
        return INVERSE_CDFS[term]
    kind, _, steps = term.partition(":")
    if kind == "grid" and steps.isdecimal() and int(steps) > 0:
        return grid(int(steps))
    close = difflib.get_close_matches(term, KNOWN, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ReflowError(
        f"time_sampling '{term}' is unknown; known are {', '.join(KNOWN)} (K at least 1), "
        f"and several of them joined by '+'.{hint}"
    )
