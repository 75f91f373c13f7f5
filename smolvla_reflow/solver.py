"""ODE solvers: how a velocity field carries noise at t = 1 to actions at t = 0.

    dx = v(x, t) dt, from t = 1 down to t = 0

A fixed-step method is a loop over a grid of numbers, which are known before the first step. So a GPU is never waited
for, and a solve can be recorded with the grid as an input (`smolvla/graph.py`). An adaptive method looks at its error
before it goes on; it is torchdiffeq's (https://github.com/rtqichen/torchdiffeq).

`jittered` reads the velocity once in each interval of a grid that is shifted at random in each solve. It reaches the
middle of an interval along the velocity before, as the leapfrog method does. The velocity of a network is rough in
time. A fixed grid biases every coupling of a training in the same way. On shifted grids every time has the same weight,
and most of the bias averages out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchdiffeq import odeint

from smolvla_reflow.errors import ReflowError, known_are

# A number, or a scalar float32 tensor.
Number: TypeAlias = float | Tensor
# (x, t) -> dx/dt; x is (B, chunk_size, max_action_dim), t in [0, 1].
VelocityField = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method (Butcher's table; Hairer, Norsett & Wanner, "Solving Ordinary Differential
    Equations I", section II.1).
    """

    # for each evaluation of the velocity, the weights of the earlier ones in its x
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]  # of all evaluations in x at the end of the step

    def numbers(self, start: float, length: float) -> list[float]:
        """The numbers of a step from t = start to start + length: the stages' times, then all weights times length."""
        times = [start + sum(stage) * length for stage in self.stages]
        return times + [length * weight for weights in (*self.stages, self.weights) for weight in weights]

    def step(self, velocity: VelocityField, x: Tensor, numbers: Sequence[Number]) -> Tensor:
        """x at the end of a step."""
        times, weights = numbers[: len(self.stages)], iter(numbers[len(self.stages) :])
        slopes: list[Tensor] = []
        for t, stage in zip(times, self.stages, strict=True):
            slopes.append(velocity(_moved(x, stage, weights, slopes), t))
        return _moved(x, self.weights, weights, slopes)


TABLEAUX = {
    "euler": Tableau(stages=((),), weights=(1.0,)),
    "midpoint": Tableau(stages=((), (1 / 2,)), weights=(0.0, 1.0)),
    # Kutta's 3/8 rule, which torchdiffeq has under this name too.
    "rk4": Tableau(stages=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), weights=(1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
JITTERED = "jittered"
INTERVALS = 2  # of `jittered` in each of its steps, each with one velocity evaluation
FIXED_STEP = (*TABLEAUX, JITTERED)
ADAPTIVE = ("dopri5",)
DEFAULT_TOLERANCE = 1e-5
# A student whose config.json says 1 or 2 steps is good enough for its robot. As the teacher of the next round its
# errors at so few steps would be handed on.
LEAST_STEPS = 10


@dataclass(frozen=True)
class Solver:
    """An ODE method and its accuracy.

    Attributes:
        method: a name of `FIXED_STEP` (`euler`, `midpoint`, `rk4`, with 1, 2, 4 velocity evaluations a step and of that
            order; `jittered`, with 2, of order 2) or of `ADAPTIVE` (`dopri5`, order 5).
        num_steps: of a fixed-step method, all equal. None: the policy's own `config.num_steps` (for couplings at least
            10), or half of that for `jittered`, which then evaluates the velocity as often as the stock sampler.
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
        each = INTERVALS if self.method == JITTERED else len(TABLEAUX[self.method].stages)
        evaluations = self.num_steps * each
        return f"{self.method} with num_steps {self.num_steps} ({evaluations} velocity evaluations)"

    def integrate(self, velocity: VelocityField, noise: Tensor) -> Tensor:
        """Solve the ODE from `noise` (B, chunk_size, max_action_dim) at t = 1; x at t = 0, in its shape and dtype.

        Raises ReflowError if a fixed-step method has no `num_steps` (see `resolved`), or an adaptive one gives up.
        """
        if self.method in ADAPTIVE:
            return self._adaptive(velocity, noise)
        return self.follow(self.grid(), velocity, noise)

    def grid(self) -> list[list[float]]:
        """The numbers of each step of one solve by a fixed-step method; `jittered` draws its numbers at random."""
        if self.num_steps is None:
            raise ReflowError(f"{self.method} needs num_steps.")
        if self.method == JITTERED:
            return _shifted(INTERVALS * self.num_steps)
        dt = -1 / self.num_steps
        return [TABLEAUX[self.method].numbers(1 + k * dt, dt) for k in range(self.num_steps)]

    def follow(self, grid: Sequence[Sequence[Number]] | Tensor, velocity: VelocityField, noise: Tensor) -> Tensor:
        """Solve on a grid of `self.grid`, lists of numbers or a float32 tensor (steps, numbers of a step)."""
        if self.method == JITTERED:
            return _along_slopes(grid, velocity, noise)
        x = noise
        for numbers in grid:
            x = TABLEAUX[self.method].step(velocity, x, list(numbers))
        return x

    def _adaptive(self, velocity: VelocityField, noise: Tensor) -> Tensor:
        times = torch.tensor([1, 0], dtype=noise.dtype, device=noise.device)
        tolerances = {"rtol": self.rtol or DEFAULT_TOLERANCE, "atol": self.atol or DEFAULT_TOLERANCE}
        try:
            return odeint(lambda t, x: velocity(x, t).to(x.dtype), noise, times, method=self.method, **tolerances)[-1]
        except AssertionError as error:
            raise ReflowError(f"The ODE cannot be solved by {self.method} ({error}).") from None


def _shifted(intervals: int) -> list[list[float]]:
    """For each interval the time where its velocity is read, the way there from its start, and its length.

    Ways and lengths are negative. All ends but 1 and 0 are shifted by a random part u of an interval h. So the first
    interval is u h long, the last (1 - u) h. In whole intervals the velocity is read in the middle. In the first it is
    read s = u^2 h / 2 from t = 1, and in the last (1 - u)^2 h / 2 from t = 0. Their middles would give the times near
    the ends too little weight. So the velocity at s has the expected weight u h du / ds = 1 on the first and the last
    half of an h. In between, the middles are uniform, and every time has the same weight.
    """
    u, h = torch.rand(()).item(), 1 / (intervals - 1)
    first = (0.0, u**2 * h / 2, u * h)
    whole = [((u + k) * h, h / 2, h) for k in range(intervals - 2)]
    last = (1 - (1 - u) * h, (1 - u) * h * (1 + u) / 2, (1 - u) * h)
    return [[1 - start - way, -way, -length] for start, way, length in (first, *whole, last)]


def _along_slopes(grid: Sequence[Sequence[Number]] | Tensor, velocity: VelocityField, noise: Tensor) -> Tensor:
    """Solve with one velocity for each interval, read at a point that is reached along the velocity before."""
    x, slope = noise, None
    for t, way, length in grid:
        slope = velocity(x if slope is None else x + _scaled(slope, way), t)
        x = x + _scaled(slope, length)
    return x


def _moved(x: Tensor, pattern: Sequence[float], weights: Iterator[Number], slopes: Sequence[Tensor]) -> Tensor:
    """x plus the weighed sum of the slopes, without those whose weight in the pattern is 0."""
    for kept, slope in zip(pattern, slopes, strict=True):
        weight = next(weights)
        if kept:
            x = x + _scaled(slope, weight)
    return x


def _scaled(slope: Tensor, weight: Number) -> Tensor:
    # A number multiplies a bfloat16 slope in float32. A scalar tensor would be rounded to bfloat16 first.
    return (weight * slope.float()).to(slope.dtype) if isinstance(weight, Tensor) else weight * slope


# The strings below the fields are their --help texts; draccus drops a text with a colon in it.
@dataclass
class SolverFlags:
    """The flags of a `Solver`, which `--reflow.*` has in every command that solves a teacher's ODE."""

    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'jittered' (one velocity in each interval of a grid that is shifted at
    random in each batch), 'midpoint', 'euler' (the stock sampler), 'rk4' or 'dopri5'."""
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
