"""The one ruler: solve the same frames from the same noises, and compare the chunks of actions.

    flow = frame_flow(velocity, frames, per_frame=K, seed=0)
    ends = flow.solve(Solver("euler", num_steps=2))           (N, K, T, W)
    fine, straightness = flow.solve_finely(32, in_deviations)
    distance(ends, fine) -> flow error, energy distance       as in smolvla-reflow-eval, and while a student trains

`N` frames, `K` noises for each, chunks of `T` steps in `D` action dimensions, `W` with padding. All metrics but the
action error take actions in units of each dimension's standard deviation, so that 0.1 means the same for every robot.
The k-th of a frame's chunks comes from its k-th noise in every argument.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smolvla_reflow.noise import evaluation_noise
from smolvla_reflow.smolvla.velocity import Velocity
from smolvla_reflow.solver import TABLEAUX, Solver, VelocityField

# Steps of rk4 for fine solutions, each of four velocity evaluations.
FINE_STEPS = 32


@dataclass(frozen=True, eq=False)
class FrameFlow:
    """One policy's flow on N frames, from K noises for each frame."""

    velocity: VelocityField  # the field, for each frame K times in a row
    noise: Tensor  # (N * K, T, W)
    per_frame: int  # K

    def solve(self, solver: Solver) -> Tensor:
        """The ends of the paths, (N, K, T, W), in the policy's normalised space."""
        return solver.integrate(self.velocity, self.noise).unflatten(0, (-1, self.per_frame))

    def solve_finely(self, num_steps: int, in_deviations: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The ends by rk4, and the paths' straightness (N, K) from the same velocity evaluations.

        Args:
            num_steps: of rk4.
            in_deviations: from velocities (N * K, T, W) to standard deviations of the robot's actions.
        """
        along: list[Tensor] = []

        def noted(x: Tensor, t: float) -> Tensor:
            found = self.velocity(x, t)
            along.append(in_deviations(found).to(x.dtype))
            return found

        ends = Solver("rk4", num_steps=num_steps).integrate(noted, self.noise)
        weights = torch.tensor(TABLEAUX["rk4"].weights).repeat(num_steps) / num_steps
        bends = straightness(torch.stack(along), weights)
        return ends.unflatten(0, (-1, self.per_frame)), bends.unflatten(0, (-1, self.per_frame))


def frame_flow(velocity: Velocity, frames: Sequence[int], per_frame: int, seed: int) -> FrameFlow:
    """A policy's flow on these encoded frames, from noises of the seed and the frames' indices, which no pair has."""
    config, device = velocity.model.config, next(velocity.model.parameters()).device
    noise = evaluation_noise(seed, frames, per_frame, (config.chunk_size, config.max_action_dim))
    return FrameFlow(velocity.repeated(per_frame), noise.to(device), per_frame)


class Distance(NamedTuple):
    """The distance of some actions to their reference, in standard deviations."""

    flow_error: float  # root mean square, noise by noise
    energy_distance: float  # of the distributions, averaged over the frames


def distance(actions: Tensor, reference: Tensor) -> Distance:
    """Compare two (N, K, T, D) in standard deviations, K > 1."""
    flow_error = squared_error(actions, reference).mean().sqrt().item()
    return Distance(flow_error, energy_distance(actions, reference).mean().item())


def energy_distance(actions: Tensor, reference: Tensor) -> Tensor:
    """The energy distance of two distributions of chunks, (N,) from two (N, K, T, D), K > 1, without bias.

        E = 2 E|X - Y| - E|X - X'| - E|Y - Y'|        |x| is the RMS of a chunk's entries

    Székely & Rizzo, "Energy statistics: A class of statistics based on distances", Journal of Statistical Planning and
    Inference 143 (2013), equation 2.5. E is 0 if and only if the distributions are the same, whichever noise becomes
    which chunk. The estimate can be below 0.

    The two sets have to be of independent noises, so each term is a mean over the pairs of different noises, i != j.
    This is the U-statistic of Gretton et al., "A Kernel Two-Sample Test", JMLR 13 (2012), lemma 6, with the kernel
    -|x - y|. It equals the mean over all ways of giving half of the noises to one set and half to the other. Since both
    policies make similar chunks of the same noise, the mean varies less than any single way.
    """
    x, y = actions.double(), reference.double()
    entries = x.shape[-2] * x.shape[-1]
    return (2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)) / entries**0.5


def _mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the pairs of different noises, (N,)."""
    # Products of matrices would lose the digits of a small distance.
    between = torch.cdist(a.flatten(2), b.flatten(2), compute_mode="donot_use_mm_for_euclid_dist")
    count = between.shape[1]
    same_noise = between.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (between.sum(dim=(1, 2)) - same_noise) / (count * (count - 1))


def squared_error(actions: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance of each chunk to its reference, (N, K) from two (N, K, T, D)."""
    return (actions - reference).square().mean(dim=(-2, -1))


def spread(actions: Tensor) -> Tensor:
    """Variance over the noises, averaged over the chunk: (N,) from (N, K, T, D), K > 1.

    A policy that averages several ways of doing a task, instead of choosing a way, has less spread than its teacher.
    """
    return actions.var(dim=1, unbiased=True).mean(dim=(-2, -1))


def straightness(velocities: Tensor, weights: Tensor) -> Tensor:
    """S = int || (x_1 - x_0) - v(x_t, t) ||^2 dt, averaged over the chunk; 0 for straight paths.

    Liu, Gong & Liu, arXiv 2209.03003, section 2.2, in LeRobot's direction: x_1 is noise, x_0 actions, v = dx/dt. As
    x_1 - x_0 is the integral of v, S is the variance of v along the path, and the solver's own velocities are enough.

    Args:
        velocities: (S, ..., T, D), v along the path, as a solver asked for it.
        weights: (S,), of these velocities in x_1 - x_0, which sum up to 1.
    """
    weights = weights.to(velocities).reshape(-1, *[1] * (velocities.ndim - 1))
    mean = (weights * velocities).sum(dim=0)
    return (weights * (velocities - mean).square()).sum(dim=0).mean(dim=(-2, -1))


def absolute_error(actions: Tensor, recorded: Tensor, exists: Tensor) -> Tensor:
    """Absolute error of each dimension, averaged over the noises and summed over the steps that were recorded: (N, D).

    Args:
        actions: (N, K, T, D).
        recorded: (N, T, D), in the same units.
        exists: (N, T) bool, False for the steps past the end of the episode.
    """
    return ((actions - recorded[:, None]).abs().mean(dim=1) * exists[..., None]).sum(dim=1)
