"""How good a few-step sampler is: distances between ends of paths, spread over noises, straightness, success.

The first three take actions in units of each action dimension's standard deviation, so that 0.1 means the same for
every robot. `N` observations, `K` noises for each, chunks of `T` steps in `D` action dimensions.
"""

from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

CONFIDENCE = 0.95


def squared_error(actions: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance of each chunk to its reference, (N, K) from two (N, K, T, D)."""
    return (actions - reference).square().mean(dim=(-2, -1))


def spread(actions: Tensor) -> Tensor:
    """Variance over the noises, averaged over the chunk: (N,) from (N, K, T, D), K > 1.

    A policy that averages the ways of doing a task, rather than choosing one, has less of it than its teacher.
    """
    return actions.var(dim=1, unbiased=True).mean(dim=(-2, -1))


def straightness(path: Tensor, velocities: Tensor, times: Tensor) -> Tensor:
    """S = int || (x_1 - x_0) - v(x_t, t) ||^2 dt per entry of the chunk; 0 for straight paths.

    Liu, Gong & Liu, arXiv 2209.03003, section 2.2, in LeRobot's direction: x_1 is noise, x_0 actions, v = dx/dt.

    Args:
        path: (S, ..., T, D), x at each of `times`.
        velocities: like `path`, v at the same points.
        times: (S,), from 1 down to 0.
    """
    off = (path[0] - path[-1] - velocities).square().mean(dim=(-2, -1))
    return torch.trapezoid(off.flip(0), times.flip(0), dim=0)


@dataclass(frozen=True)
class Success:
    """How often a policy succeeded.

    Attributes:
        rate: of the episodes that succeeded, 0 to 1.
        low, high: Wilson's score interval at 95 % confidence, over all episodes alike.
        episodes: how many were driven.
        by_task: the rate in each task, for an environment that has several.
    """

    rate: float
    low: float
    high: float
    episodes: int
    by_task: dict[str, float]

    @classmethod
    def count(cls, successes: dict[str, list[bool]]) -> "Success":
        """From each task's episodes."""
        every = [success for episodes in successes.values() for success in episodes]
        interval = binomtest(sum(every), len(every)).proportion_ci(CONFIDENCE, method="wilson")
        by_task = {task: sum(episodes) / len(episodes) for task, episodes in successes.items()}
        return cls(sum(every) / len(every), float(interval.low), float(interval.high), len(every), by_task)
