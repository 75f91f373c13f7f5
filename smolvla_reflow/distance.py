"""Metrics of a few-step sampler: energy distance, flow error, spread over noises, straightness, action error.

`N` frames, `K` noises for each, chunks of `T` steps in `D` action dimensions. All but the action error take actions in
units of each dimension's standard deviation, so that 0.1 means the same for every robot. The k-th of a frame's chunks
comes from its k-th noise in every argument.
"""

import torch
from torch import Tensor


def energy_distance(actions: Tensor, reference: Tensor) -> Tensor:
    """How far two distributions of chunks are apart, (N,) from two (N, K, T, D), K > 1, without bias.

        E = 2 E|X - Y| - E|X - X'| - E|Y - Y'|        |x| is the RMS of a chunk's entries

    Székely & Rizzo, "Energy statistics: A class of statistics based on distances", Journal of Statistical Planning and
    Inference 143 (2013), equation 2.5. It is 0 if and only if the distributions are the same, whichever noise becomes
    which chunk, and the estimate can come out below 0.

    The two sets have to be of independent noises. So each term is a mean over the pairs of different noises, i != j.
    That is the mean over all ways of giving half of the noises to one set and half to the other, and it varies less
    than any one of them, since what both policies make of a noise is alike (the U-statistic of Gretton et al., "A
    Kernel Two-Sample Test", JMLR 13 (2012), lemma 6, with the kernel -|x - y|).
    """

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        # Not by products of matrices, which lose the digits of a small distance.
        between = torch.cdist(a.flatten(2), b.flatten(2), compute_mode="donot_use_mm_for_euclid_dist")
        count = between.shape[1]
        same_noise = between.diagonal(dim1=1, dim2=2).sum(dim=1)
        return (between.sum(dim=(1, 2)) - same_noise) / (count * (count - 1))

    x, y = actions.double(), reference.double()
    entries = x.shape[-2] * x.shape[-1]
    return (2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)) / entries**0.5


def squared_error(actions: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance of each chunk to its reference, (N, K) from two (N, K, T, D)."""
    return (actions - reference).square().mean(dim=(-2, -1))


def spread(actions: Tensor) -> Tensor:
    """Variance over the noises, averaged over the chunk: (N,) from (N, K, T, D), K > 1.

    A policy that averages several ways of doing a task, instead of choosing one, has less of it than its teacher.
    """
    return actions.var(dim=1, unbiased=True).mean(dim=(-2, -1))


def straightness(velocities: Tensor, weights: Tensor) -> Tensor:
    """S = int || (x_1 - x_0) - v(x_t, t) ||^2 dt, averaged over the chunk; 0 for straight paths.

    Liu, Gong & Liu, arXiv 2209.03003, section 2.2, in LeRobot's direction: x_1 is noise, x_0 actions, v = dx/dt. As
    x_1 - x_0 is the integral of v, S is the variance of v along the path, and needs nothing that solving the ODE does
    not ask for.

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
