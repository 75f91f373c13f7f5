"""The mean of a number over the frames of a dataset, with a confidence interval that resamples episodes.

The frames of an episode resemble each other, so the unit of chance is the episode. The interval is the bootstrap-t
(Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12.5): each resample's mean is divided by its own
standard error. With 10 to 50 episodes the bootstrap-t covers a skewed mean better than Student's t or BCa, such as a
loss that few frames carry. `examples/studies/intervals.py` measures how often a policy that is worse by just the margin
passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its 95 % confidence interval, in the mean's own unit; None where there is no bound."""

    value: float
    low: float | None
    high: float | None


def over_episodes(values: Sequence[float] | np.ndarray, episodes: Sequence[int] | np.ndarray, seed: int) -> Interval:
    """The mean of one number for each frame, and its interval; the interval of a single episode is unbounded.

    Args:
        values: (N,), a number for each frame.
        episodes: (N,), each frame's episode.
        seed: of the resampling.
    """
    numbers = np.asarray(values, dtype=float)
    _, of = np.unique(np.asarray(episodes), return_inverse=True)
    sums, counts = np.bincount(of, weights=numbers), np.bincount(of)
    mean, error = (each.item() for each in _mean_and_error(sums[None], counts[None]))
    if len(sums) < 2:
        return Interval(mean, None, None)
    # Sums that differ by rounding alone have no spread.
    if error <= 1e-9 * max(abs(mean), 1e-3):
        return Interval(mean, mean, mean)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means, errors = _mean_and_error(sums[drawn], counts[drawn])
    # A resample of equal episodes says nothing about its own error. It counts on the side that widens the interval.
    known = errors > 1e-9 * error
    t = (means - mean) / np.where(known, errors, 1.0)
    tail = (1 - CONFIDENCE) / 2
    at_most = np.quantile(np.where(known, t, -np.inf), tail, method="lower")
    at_least = np.quantile(np.where(known, t, np.inf), 1 - tail, method="higher")
    low, high = (float(mean - each * error) if np.isfinite(each) else None for each in (at_least, at_most))
    return Interval(mean, low, high)


def _mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over all frames and its standard error (R,), from sums and numbers of frames by episode (R, episodes).

    The mean is a ratio of two sums over episodes; its error is that of the linearised ratio (Cochran, "Sampling
    Techniques", 1977, chapter 6).
    """
    episodes, frames = sums.shape[-1], counts.sum(axis=-1)
    mean = sums.sum(axis=-1) / frames
    squares = np.square(sums - mean[:, None] * counts).sum(axis=-1)
    return mean, np.sqrt(squares * episodes / max(episodes - 1, 1)) / frames
