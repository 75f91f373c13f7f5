"""ODE solvers: how a velocity field carries noise at t = 1 to actions at t = 0.

    dx = v(x, t) dt, from t = 1 down to t = 0

The methods are torchdiffeq's (https://github.com/rtqichen/torchdiffeq).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from smolvla_reflow.errors import ReflowError, known_are

FIXED_STEP = ("euler", "midpoint", "heun3", "rk4")
ADAPTIVE = ("dopri5",)
DEFAULT_TOLERANCE = 1e-5

# (x, t) -> dx/dt; x is (B, chunk_size, max_action_dim), t a scalar tensor in [0, 1].
VelocityField = Callable[[Tensor, Tensor], Tensor]


class Path(NamedTuple):
    """A solution of the ODE."""

    times: Tensor  # (S,), from 1 to 0
    points: Tensor  # (S, B, chunk_size, max_action_dim), x at those times


@dataclass(frozen=True)
class Solver:
    """An ODE method and how finely it works.

    Attributes:
        method: one of `FIXED_STEP`, of order 1, 2, 3 and 4 at 1, 2, 3 and 4 velocity evaluations a step, or of
            `ADAPTIVE`, of order 5.
        num_steps: equal steps of a fixed-step method; None for the policy's own `config.num_steps`.
        rtol: relative tolerance of an adaptive method, default 1e-5. Its error estimate is one norm over the
            whole batch, so that a sample's last digits depend on its neighbours.
        atol: absolute tolerance, in normalised units, default 1e-5.

    Raises:
        ReflowError: the method is unknown, a value is out of range, or has no meaning for the method.
    """

    method: str = "midpoint"
    num_steps: int | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        known = (*FIXED_STEP, *ADAPTIVE)
        if self.method not in known:
            raise ReflowError(f"solver={self.method} is unknown; {known_are(known, self.method)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ReflowError(f"num_steps={self.num_steps}: the teacher needs at least one ODE step.")
        tolerances = {"rtol": self.rtol, "atol": self.atol}
        for name, value in tolerances.items():
            if value is not None and not 0 < value < float("inf"):
                raise ReflowError(f"{name}={value}: a tolerance is a positive number.")
        if self.method in ADAPTIVE and self.num_steps is not None:
            raise ReflowError(f"solver={self.method} chooses its own steps; give rtol and atol instead of num_steps.")
        if self.method in FIXED_STEP and any(value is not None for value in tolerances.values()):
            raise ReflowError(f"solver={self.method} takes equal steps; give num_steps instead of rtol and atol.")

    def resolved(self, num_steps: int) -> "Solver":
        """This solver with every value filled in; a fixed-step method without steps gets `num_steps`."""
        if self.method in ADAPTIVE:
            return replace(self, rtol=self.rtol or DEFAULT_TOLERANCE, atol=self.atol or DEFAULT_TOLERANCE)
        return replace(self, num_steps=self.num_steps or num_steps)

    def integrate(self, velocity: VelocityField, noise: Tensor, num_steps: int | None = None) -> Tensor:
        """Solve the ODE from `noise` at t = 1; returns x at t = 0, in the shape and dtype of `noise`.

        Args:
            velocity: the field.
            noise: (B, chunk_size, max_action_dim).
            num_steps: equal steps where `self.num_steps` is None.
        """
        return self.path(velocity, noise, num_steps).points[-1]

    def path(self, velocity: VelocityField, noise: Tensor, num_steps: int | None = None) -> Path:
        """Solve the ODE and keep x after each step; an adaptive method keeps only the two ends."""
        steps = 1 if self.method in ADAPTIVE else self.num_steps or num_steps
        if steps is None:
            raise ReflowError(f"{self.method} needs num_steps.")
        times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
        try:
            points = odeint(
                lambda t, x: velocity(x, t),
                noise,
                times,
                method=self.method,
                rtol=self.rtol or DEFAULT_TOLERANCE,
                atol=self.atol or DEFAULT_TOLERANCE,
            )
        except AssertionError as error:
            raise ReflowError(f"The ODE cannot be solved by {self.method} ({error}).") from None
        return Path(times, points)


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class SolverFlags:
    """The flags of a `Solver`, which `--reflow.*` has in every command that solves a teacher's ODE."""

    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'midpoint', 'euler' (its stock sampler), 'heun3', 'rk4' or 'dopri5'."""
    num_steps: int | None = None
    """Steps of the solver (not for dopri5), by default the num_steps of the teacher's own config."""
    rtol: float | None = None
    """Relative tolerance of dopri5, by default 1e-5."""
    atol: float | None = None
    """Absolute tolerance of dopri5 in normalised units, by default 1e-5."""

    def to_solver(self) -> Solver:
        """The solver that the flags name. Raises ReflowError, naming the flag, if something is wrong with them."""
        try:
            return Solver(self.solver, self.num_steps, self.rtol, self.atol)
        except ReflowError as error:
            raise ReflowError(f"--reflow.{error}") from None
