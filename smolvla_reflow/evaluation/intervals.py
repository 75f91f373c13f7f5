"""A mean over frames, with its confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its 95 % confidence interval, in the mean's own unit."""

    value: float
    low: float
    high: float


def over_frames(values: Sequence[float] | np.ndarray, seed: int) -> Interval:
    """The mean of one number for each frame, with its bootstrap interval (BCa: Efron, "Better Bootstrap Confidence
    Intervals", JASA 82 (1987)); the interval of a single frame is unbounded."""
    numbers = np.asarray(values, dtype=float)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, -np.inf, np.inf)
    if np.allclose(numbers, mean, rtol=1e-9, atol=1e-12):  # BCa divides by the spread
        return Interval(mean, mean, mean)
    found = bootstrap((numbers,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, random_state=seed)
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))
