"""The two errors of a reflowed student: what more steps mend, and what they do not.

    flow error(n)^2 = r^2 + (c / n)^2

With nearly straight paths n Euler steps end where the last velocity points. What is left of the noise then is an n-th
of what the network does not reproduce of it at t = 1: that is c, and shows as spread above 1 at few steps. The rest,
r, is actions in the wrong place, at any number of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

# The law is taken to hold if it is off by less than this share of the flow errors' mean.
HOLDS_WITHIN = 0.1


@dataclass(frozen=True)
class TwoErrors:
    """A fit of the law, in standard deviations of the actions.

    Attributes:
        r: the flow error that no number of steps takes away.
        c: the part of the noise that is left after one step.
        residual: RMS by which the law misses the flow errors.
        holds: whether that is little beside them.
    """

    r: float
    c: float
    residual: float
    holds: bool


def fit(flow_errors: Mapping[int, float]) -> TwoErrors | None:
    """Fit the law to flow errors by least squares.

    Args:
        flow_errors: by number of steps.

    Returns:
        None for fewer than three numbers of steps, which any law of two constants would fit.
    """
    if len(flow_errors) < 3:
        return None
    steps, errors = (np.array(x, dtype=float) for x in zip(*sorted(flow_errors.items()), strict=True))

    def misses(constants: np.ndarray) -> np.ndarray:
        r, c = constants
        return np.hypot(r, c / steps) - errors

    start = [errors[-1], steps[0] * errors[0]]
    found = least_squares(misses, start, bounds=([0, 0], [np.inf, np.inf]), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    residual = float(np.sqrt(np.mean(found.fun**2)))
    r, c = map(float, found.x)
    return TwoErrors(r, c, residual, holds=residual <= HOLDS_WITHIN * float(errors.mean()))


def advice(errors: TwoErrors, num_steps: int) -> str | None:
    """What would bring a student's flow error down at this number of steps; None where the law does not hold."""
    if not errors.holds:
        return None
    left, place = errors.c / num_steps, errors.r
    at = f"At {num_steps} step{'s' * (num_steps > 1)}"
    if left > place:
        return (
            f"{at} most of the flow error is noise that is left over (c/n = {left:.3f} against r = {place:.3f}). What "
            "helps: training longer, more couplings for each frame (--reflow.couplings_per_frame=4), or more weight "
            "near t = 1 (--reflow.weighting=t, if it was another; --reflow.time_sampling=grid:1+grid:1+beta)."
        )
    return (
        f"{at} most of the flow error is actions in the wrong place (r = {place:.3f} against c/n = {left:.3f}), which "
        "more of the same training hardly mends. What helps: more accurate couplings (--reflow.solver=midpoint, a "
        "higher --reflow.num_steps), more couplings for each frame, more steps on the robot, or a larger action expert."
    )
