"""The two errors of a reflowed student: more steps reduce one, and not the other.

    flow error(n)^2 = r^2 + (c / n)^2

With nearly straight paths n Euler steps end where the last velocity points. An n-th of the noise that the network does
not reproduce at t = 1 is left over then: that is c, and shows as spread above 1 at few steps. The rest, r, is actions
in the wrong place, at any number of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

# The law is taken to hold if it misses the flow errors by less than this share of their mean.
HOLDS_WITHIN = 0.1
ITERATIONS = 20


@dataclass(frozen=True)
class TwoErrors:
    """A fit of the law, in standard deviations of the actions."""

    r: float  # the flow error that no number of steps takes away
    c: float  # the part of the noise that is left after one step
    residual: float  # RMS difference between the law and the flow errors
    holds: bool  # True if the residual is small beside the flow errors


def fit(flow_errors: Mapping[int, float]) -> TwoErrors | None:
    """Fit the law to flow errors by number of steps; None for fewer than three, which any two constants would fit."""
    if len(flow_errors) < 3:
        return None
    steps, errors = (np.array(x, dtype=float) for x in zip(*sorted(flow_errors.items()), strict=True))
    # The law's square is linear in r^2 and c^2, and near a law its root is (law + square / law) / 2 (Gauss-Newton).
    terms, law = np.stack([np.ones_like(steps), steps**-2.0], axis=1), errors
    for _ in range(ITERATIONS):
        squares, _ = nnls(terms / (2 * law[:, None]), errors - law / 2)
        law = np.sqrt(terms @ squares)
    r, c = np.sqrt(squares)
    residual = float(np.sqrt(np.mean((law - errors) ** 2)))
    return TwoErrors(float(r), float(c), residual, holds=residual <= HOLDS_WITHIN * float(errors.mean()))


def advice(errors: TwoErrors, num_steps: int) -> str | None:
    """Advice to reduce a student's flow error at this number of steps; None if the law does not hold."""
    if not errors.holds:
        return None
    left, place = errors.c / num_steps, errors.r
    at = f"At {num_steps} step{'s' * (num_steps > 1)}"
    if left > place:
        return (
            f"{at} most of the flow error is noise that is left over (c/n = {left:.3f} against r = {place:.3f}). To "
            "reduce it, train longer, use more couplings for each frame (--reflow.couplings_per_frame=4), or put more "
            "weight near t = 1 (--reflow.weighting=t, if it was another; --reflow.time_sampling=grid:1+grid:1+beta)."
        )
    return (
        f"{at} most of the flow error is actions in the wrong place (r = {place:.3f} against c/n = {left:.3f}). More "
        "of the same training changes little. Use more accurate couplings (--reflow.solver=midpoint, a higher "
        "--reflow.num_steps), more couplings for each frame, more steps on the robot, or a larger action expert."
    )
