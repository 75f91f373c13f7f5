"""ODE solvers: how a velocity field carries noise at t = 1 to actions at t = 0.

    dx = v(x, t) dt, from t = 1 down to t = 0

A fixed-step method is a loop over numbers with the method's own table, so a GPU is never waited for. An adaptive method
looks at its error before it goes on; it is torchdiffeq's (https://github.com/rtqichen/torchdiffeq).

`jittered` is the midpoint rule on a grid that is shifted at random in each solve. The velocity of a network is rough in
time. A fixed grid biases every coupling of a training in the same way; the bias of shifted grids averages out, so half
as many evaluations do as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from smolvla_reflow.errors import ReflowError, known_are


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method (Butcher's table; Hairer, Norsett & Wanner, "Solving Ordinary Differential
    Equations I", section II.1).

    Attributes:
        stages: for each evaluation of the velocity, the weights of the earlier ones in its x.
        weights: of all evaluations in x at the end of the step.
    """

    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def step(self, velocity: "VelocityField", x: Tensor, t: float, dt: float) -> Tensor:
        """x at t + dt."""
        slopes: list[Tensor] = []
        for stage in self.stages:
            slopes.append(velocity(_moved(x, dt, stage, slopes), t + sum(stage) * dt))
        return _moved(x, dt, self.weights, slopes)


TABLEAUX = {
    "euler": Tableau(stages=((),), weights=(1.0,)),
    "midpoint": Tableau(stages=((), (1 / 2,)), weights=(0.0, 1.0)),
    # Kutta's 3/8 rule, which torchdiffeq has under this name too.
    "rk4": Tableau(stages=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), weights=(1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
JITTERED = "jittered"
FIXED_STEP = (*TABLEAUX, JITTERED)
ADAPTIVE = ("dopri5",)
DEFAULT_TOLERANCE = 1e-5
# A student whose config.json says 1 or 2 steps is good enough for its robot. As the teacher of the next round its
# errors at so few steps would be handed on.
LEAST_STEPS = 10

# (x, t) -> dx/dt; x is (B, chunk_size, max_action_dim), t in [0, 1], a number or a scalar tensor.
VelocityField = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Solver:
    """An ODE method and its accuracy.

    Attributes:
        method: a name of `FIXED_STEP` (`euler`, `midpoint`, `rk4`, `jittered`, with 1, 2, 4, 2 velocity evaluations a
            step and of that order) or of `ADAPTIVE` (`dopri5`, order 5).
        num_steps: of a fixed-step method. All steps are equal, except that the first and last step of `jittered` add up
            to one. None: the policy's own `config.num_steps` (for couplings at least 10), or half of that for
            `jittered`, which then evaluates the velocity as often as the stock sampler.
        rtol: relative tolerance of an adaptive method, default 1e-5. The error estimate is one norm over the whole
            batch, so a sample's last digits depend on its neighbours.
        atol: absolute tolerance in normalised units, default 1e-5.

    Raises:
        ReflowError: the method is unknown, or a value is out of range or means nothing to the method.
    """

    method: str = JITTERED
    num_steps: int | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        known = (*FIXED_STEP, *ADAPTIVE)
        if self.method not in known:
            raise ReflowError(f"solver={self.method} is unknown; {known_are(known, self.method)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ReflowError(f"num_steps={self.num_steps}: a solver needs at least one ODE step.")
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        for name, value in tolerances.items():
            if value is not None and not 0 < value < float("inf"):
                raise ReflowError(f"{name}={value}: a tolerance is a positive number.")
        if self.method in ADAPTIVE and self.num_steps is not None:
            raise ReflowError(f"solver={self.method} chooses its own steps; give rtol and atol instead of num_steps.")
        if self.method in FIXED_STEP and any(value is not None for value in tolerances.values()):
            raise ReflowError(f"solver={self.method} has fixed steps; give num_steps instead of rtol and atol.")

    def resolved(self, num_steps: int) -> "Solver":
        """This solver with every value set; a fixed-step method without steps gets `num_steps`, `jittered` half."""
        if self.method in ADAPTIVE:
            return replace(self, rtol=self.rtol or DEFAULT_TOLERANCE, atol=self.atol or DEFAULT_TOLERANCE)
        return replace(self, num_steps=self.num_steps or (-(-num_steps // 2) if self.method == JITTERED else num_steps))

    def of_couplings(self, num_steps: int) -> "Solver":
        """This solver as it makes couplings of a teacher whose config says `num_steps`, or 10 if that is less."""
        return self.resolved(max(num_steps, LEAST_STEPS))

    def in_words(self) -> str:
        """Method, steps and velocity evaluations of a resolved solver."""
        if self.method in ADAPTIVE:
            return f"{self.method} with rtol {self.rtol:g} and atol {self.atol:g}"
        assert self.num_steps is not None
        evaluations = self.num_steps * len(self._tableau.stages)
        return f"{self.method} with num_steps {self.num_steps} ({evaluations} velocity evaluations)"

    def integrate(self, velocity: VelocityField, noise: Tensor, num_steps: int | None = None) -> Tensor:
        """Solve the ODE from `noise` at t = 1; returns x at t = 0, in the shape and dtype of `noise`.

        Args:
            velocity: the field.
            noise: (B, chunk_size, max_action_dim).
            num_steps: of the policy's own config, used if `self.num_steps` is None.

        Raises:
            ReflowError: no number of steps is known, or the adaptive method gives up.
        """
        if self.method in ADAPTIVE:
            return self._adaptive(velocity, noise)
        if self.num_steps is None and num_steps is None:
            raise ReflowError(f"{self.method} needs num_steps.")
        count = self.resolved(num_steps or 0).num_steps
        assert count is not None
        x = noise
        for interval in _jittered(count) if self.method == JITTERED else _equal(count):
            x = self._tableau.step(velocity, x, interval.start, interval.length)
        return x

    @property
    def _tableau(self) -> Tableau:
        return TABLEAUX["midpoint" if self.method == JITTERED else self.method]

    def _adaptive(self, velocity: VelocityField, noise: Tensor) -> Tensor:
        times = torch.tensor([1, 0], dtype=noise.dtype, device=noise.device)
        tolerances = {"rtol": self.rtol or DEFAULT_TOLERANCE, "atol": self.atol or DEFAULT_TOLERANCE}
        try:
            return odeint(lambda t, x: velocity(x, t).to(x.dtype), noise, times, method=self.method, **tolerances)[-1]
        except AssertionError as error:
            raise ReflowError(f"The ODE cannot be solved by {self.method} ({error}).") from None


class _Interval(NamedTuple):
    """From t = start to start + length; lengths are negative."""

    start: float
    length: float


def _equal(count: int) -> list[_Interval]:
    dt = -1 / count
    return [_Interval(1 + k * dt, dt) for k in range(count)]


def _jittered(count: int) -> list[_Interval]:
    """Steps whose ends, except 1 and 0, are shifted by one random part of a step."""
    if count == 1:
        return _equal(1)
    dt, shift = -1 / (count - 1), torch.rand(()).item()
    ends = [1.0, *(1 + (k + shift) * dt for k in range(count - 1)), 0.0]
    return [_Interval(start, end - start) for start, end in pairwise(ends)]


def _moved(x: Tensor, dt: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + dt * (the weighed sum of the slopes)."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (dt * weight) * slope
    return x


# The strings below the fields are their --help texts; draccus drops a text with a colon in it.
@dataclass
class SolverFlags:
    """The flags of a `Solver`, which `--reflow.*` has in every command that solves a teacher's ODE."""

    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'jittered' (the midpoint rule on a grid that is shifted at random in each
    batch), 'midpoint', 'euler' (the stock sampler), 'rk4' or 'dopri5'."""
    num_steps: int | None = None
    """Steps of the solver (not for dopri5). Default is the num_steps of the teacher's own config, but at least 10;
    'jittered' takes half as many. A training run fills the number in, and keeps it when resumed."""
    rtol: float | None = None
    """Relative tolerance of dopri5 (default 1e-5)."""
    atol: float | None = None
    """Absolute tolerance of dopri5 in normalised units (default 1e-5)."""

    def to_solver(self) -> Solver:
        """The solver that the flags name. Raises ReflowError, naming the flag, if something is wrong with them."""
        try:
            return Solver(self.solver, self.num_steps, self.rtol, self.atol)
        except ReflowError as error:
            raise ReflowError(f"--reflow.{error}") from None
