"""The fine solutions that errors are measured against, as fine as they have to be.

The number of rk4 steps is doubled until the last doubling changed the solutions by less than a tenth of the smallest
flow error in the policy's rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smolvla_reflow.distance import straightness
from smolvla_reflow.solver import TABLEAUX, Solver, VelocityField

FIRST_STEPS, MOST_STEPS = 8, 128
ENOUGH = 0.1


@dataclass(frozen=True)
class Reference:
    """How a policy's fine solutions are computed.

    Attributes:
        steps: of rk4, each of four velocity evaluations.
        rmse: what the last doubling of the steps changed, on the first batch, in standard deviations: an estimate from
            above of the fine solutions' own error, below which a flow error means nothing.
    """

    steps: int
    rmse: float


@dataclass(frozen=True)
class Fine:
    """Fine solutions.

    Attributes:
        actions: (N * K, chunk_size, max_action_dim), the ends of the paths, in the policy's normalised space.
        straightness: (N * K,), of the paths, in squared standard deviations.
        reference: how they were computed.
    """

    actions: Tensor
    straightness: Tensor
    reference: Reference


def solved_finely(
    velocity: VelocityField,
    noise: Tensor,
    in_deviations: Callable[[Tensor], Tensor],
    smallest_error: Callable[[Tensor], float],
    steps: Reference | int | None,
) -> Fine:
    """Solve the ODE finely.

    Args:
        velocity: the field.
        noise: (N * K, chunk_size, max_action_dim).
        in_deviations: from differences in the policy's normalised space to standard deviations of the robot's actions.
        smallest_error: from these actions to the smallest flow error, in standard deviations.
        steps: as chosen before; a number, whose error is then estimated; or None to choose one.
    """

    def distance(one: Tensor, other: Tensor) -> float:
        return in_deviations(one - other).square().mean().sqrt().item()

    if isinstance(steps, Reference):
        return Fine(*_solved(velocity, noise, in_deviations, steps.steps), steps)
    if steps is not None:
        half = Solver("rk4", num_steps=max(1, steps // 2)).integrate(velocity, noise)
        fine = _solved(velocity, noise, in_deviations, steps)
        return Fine(*fine, Reference(steps, distance(fine[0], half)))
    steps = FIRST_STEPS
    half, _ = _solved(velocity, noise, in_deviations, steps)
    while True:
        steps *= 2
        fine = _solved(velocity, noise, in_deviations, steps)
        change = distance(fine[0], half)
        if steps >= MOST_STEPS or change <= ENOUGH * smallest_error(fine[0]):
            return Fine(*fine, Reference(steps, change))
        half = fine[0]


def _solved(
    velocity: VelocityField, noise: Tensor, in_deviations: Callable[[Tensor], Tensor], steps: int
) -> tuple[Tensor, Tensor]:
    """Actions and straightness, from the same velocity evaluations."""
    along: list[Tensor] = []

    def noted(x: Tensor, t: float) -> Tensor:
        found = velocity(x, t)
        along.append(in_deviations(found).to(x.dtype))
        return found

    actions = Solver("rk4", num_steps=steps).integrate(noted, noise)
    weights = torch.tensor(TABLEAUX["rk4"].weights).repeat(steps) / steps
    return actions, straightness(torch.stack(along), weights)
