"""Metrics of a few-step sampler: distance to a fine solution, spread over noises, straightness, action error, success.

`N` frames, `K` noises for each, chunks of `T` steps in `D` action dimensions. Distance, spread and straightness take
actions in units of each dimension's standard deviation, so that 0.1 means the same for every robot.
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

    A policy that averages several ways of doing a task, instead of choosing one, has less of it than its teacher.
    """
    return actions.var(dim=1, unbiased=True).mean(dim=(-2, -1))


def straightness(path: Tensor, velocities: Tensor, times: Tensor) -> Tensor:
    """S = int || (x_1 - x_0) - v(x_t, t) ||^2 dt, averaged over the chunk; 0 for straight paths.

    Liu, Gong & Liu, arXiv 2209.03003, section 2.2, in LeRobot's direction: x_1 is noise, x_0 actions, v = dx/dt.

    Args:
        path: (S, ..., T, D), x at each of `times`.
        velocities: (S, ..., T, D), v at the same points.
        times: (S,), from 1 down to 0.
    """
    off = (path[0] - path[-1] - velocities).square().mean(dim=(-2, -1))
    return torch.trapezoid(off.flip(0), times.flip(0), dim=0)


def absolute_error(actions: Tensor, recorded: Tensor, exists: Tensor) -> Tensor:
    """Absolute error of each dimension, averaged over the noises and summed over the steps that were recorded: (N, D).

    Args:
        actions: (N, K, T, D).
        recorded: (N, T, D), in the same units.
        exists: (N, T) bool, False for the steps past the end of the episode.
    """
    return ((actions - recorded[:, None]).abs().mean(dim=1) * exists[..., None]).sum(dim=1)


@dataclass(frozen=True)
class Success:
    """How often a policy succeeded.

    Attributes:
        rate: share of the episodes that succeeded, 0 to 1.
        low, high: ends of Wilson's 95 % confidence interval of the rate, which treats all episodes alike.
        episodes: number of episodes.
        by_task: the rate of each task.
    """

    rate: float
    low: float
    high: float
    episodes: int
    by_task: dict[str, float]

    @classmethod
    def count(cls, successes: dict[str, list[bool]]) -> "Success":
        """Count the episodes of each task."""
        every = [success for episodes in successes.values() for success in episodes]
        interval = binomtest(sum(every), len(every)).proportion_ci(CONFIDENCE, method="wilson")
        by_task = {task: sum(episodes) / len(episodes) for task, episodes in successes.items()}
        return cls(sum(every) / len(every), float(interval.low), float(interval.high), len(every), by_task)
