"""The recommended number of steps: the smallest number with a policy that is shown to be no worse than the bar.

The bar is the reference policy, as a rule the teacher, with its own number of steps. The evidence is success in closed
loop, or without a simulator the energy distance. A number of steps is enough if the policy is *not inferior* with it:
worse, if at all, by less than a margin that is stated beforehand, at the 5 % level. If the data are too few to decide,
the number of steps does not count as enough, and the sentence says how many frames or episodes would decide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from smolvla_reflow.evaluation.intervals import over_frames
from smolvla_reflow.evaluation.measure import Cell, by_cell
from smolvla_reflow.evaluation.success import Success, episodes_needed, is_not_inferior

SUCCESS, ENERGY_DISTANCE = "success", "energy distance"
FEWEST_STEPS_OF_A_BAR = 5
TEST = "one-sided test of Agresti & Caffo at 5 %"


@dataclass(frozen=True)
class Comparison:
    """The judged policy at one number of steps, beside the bar."""

    num_steps: int
    evidence: str  # "success" or "energy distance"
    here: float  # the policy's value, a share of the episodes or standard deviations
    bar: float  # the bar's value
    worst: float | None  # upper end of the 95 % interval of the difference of energy distances, None for success
    not_inferior: bool  # True if the policy is shown to be worse by less than the margin, if at all
    sample: int  # number of episodes or frames
    needed: int | None  # number that would show it with these values, None if it is shown or if no number would

    def figures(self) -> str:
        """The two values in words."""
        if self.evidence == SUCCESS:
            return f"succeeds in {self.here:.1%} of {self.sample} episodes, against {self.bar:.1%}"
        return (
            f"has an energy distance of {self.here:.4f}, against {self.bar:.4f} (the difference is at most "
            f"{self.worst:.4f} by its 95 % interval over {self.sample} frames)"
        )

    def shortfall(self) -> str:
        """The reason why this number of steps is not enough, in words."""
        unit = "episodes" if self.evidence == SUCCESS else "frames"
        few = "" if self.needed is None else f"; that is too few {unit} to decide, some {self.needed} would do"
        return f" At {_steps(self.num_steps)} it {self.figures()}{few}."

    def needs_reflow(self) -> str:
        """The worth of reflow, judged by one step of a policy alone."""
        if self.not_inferior:
            return " One step loses nothing that counts: reflow is not needed."
        if self.needed is not None:
            return " Until then it is open whether reflow is needed."
        points, distance = 100 * (self.bar - self.here), self.here - self.bar
        lost = f"{points:.1f} points of success" if self.evidence == SUCCESS else f"{distance:.4f} of energy distance"
        return f" One step loses {lost}: reflow is needed for as few."


@dataclass(frozen=True)
class Decision:
    """The number of steps that the evidence gives."""

    policy: str  # name of the judged policy
    bar: Cell  # the policy and number of steps that it is compared with
    evidence: str  # "success" or "energy distance"
    margin: float  # of the evidence
    recommended: int | None  # the smallest number of steps that is enough, None if there is none
    comparisons: tuple[Comparison, ...]  # of every number of steps that was measured, in rising order

    @property
    def is_alone(self) -> bool:
        """True if the policy is compared with itself."""
        return self.policy == self.bar.policy

    def in_words(self) -> str:
        """The number, the evidence for it, and the reason why it is no smaller."""
        fewer = [
            each.shortfall()
            for each in self.comparisons
            if not each.not_inferior and (self.recommended is None or each.num_steps < self.recommended)
        ]
        return "".join([self._verdict(), *fewer, self._worth()])

    def _verdict(self) -> str:
        bar = f"the {self.bar.policy}'s own {_steps(self.bar.num_steps)}"
        how = f"margin {self.margin:g} standard deviations"
        if self.evidence == SUCCESS:
            how = f"margin {self.margin * 100:g} points, {TEST}"
        if self.recommended is None:
            return f"No number of steps that was measured is shown to be as good as {bar} ({how})."
        chosen = f"Recommended: num_steps={self.recommended}, "
        if self.is_alone and self.recommended == self.bar.num_steps:
            return f"{chosen}{bar}: no smaller number is shown to be as good ({how})."
        (found,) = (each for each in self.comparisons if each.num_steps == self.recommended)
        return (
            f"{chosen}the smallest number that is shown to make the {self.policy} as good as {bar} ({how}): it "
            f"{found.figures()}."
        )

    def _worth(self) -> str:
        """For a policy alone, if it needs reflow; for a student, if reflow has saved no steps."""
        if self.is_alone:
            return "".join(each.needs_reflow() for each in self.comparisons if each.num_steps == 1)
        saved_none = self.recommended is not None and self.recommended >= self.bar.num_steps
        return " So reflow has saved no steps yet." if saved_none else ""


def decide(
    table: pd.DataFrame,
    successes: Mapping[Cell, Success],
    bar: Cell,
    policy: str,
    *,
    success_margin: float,
    energy_margin: float,
    seed: int = 0,
) -> Decision:
    """Choose a number of steps for the policy of this name, from the table of `measure_batch` and the successes so far.

    Success decides if every row of the policy and the bar were driven, unless the bar succeeds so rarely that a policy
    that never does would pass.
    """
    distances = {cell: group["energy_distance"].to_numpy() for cell, group in by_cell(table).items()}
    rows = [cell for cell in distances if cell.policy == policy]
    if all(cell in successes for cell in (*rows, bar)) and successes[bar].rate > success_margin:
        evidence, margin = SUCCESS, success_margin
        comparisons = [_by_success(cell, bar, successes, margin) for cell in rows]
    else:
        evidence, margin = ENERGY_DISTANCE, energy_margin
        comparisons = [_by_energy_distance(cell, distances[cell], distances[bar], margin, seed) for cell in rows]
    recommended = min((each.num_steps for each in comparisons if each.not_inferior), default=None)
    return Decision(policy, bar, evidence, margin, recommended, tuple(comparisons))


def bar_is_low(bar: Cell) -> str | None:
    """A warning for a bar of few steps."""
    if bar.num_steps >= FEWEST_STEPS_OF_A_BAR:
        return None
    return (
        f"The bar is low: it is the {bar.policy} with {_steps(bar.num_steps)}, and may be much worse than the same "
        "policy with more steps. To compare with more steps, give --bar_num_steps=10."
    )


def _by_success(cell: Cell, bar: Cell, successes: Mapping[Cell, Success], margin: float) -> Comparison:
    own, bars = successes[cell], successes[bar]
    enough = cell == bar or is_not_inferior(own, bars, margin)
    needed = None if enough else episodes_needed(own, bars, margin)
    return Comparison(cell.num_steps, SUCCESS, own.rate, bars.rate, None, enough, own.episodes, needed)


def _by_energy_distance(cell: Cell, own: np.ndarray, bars: np.ndarray, margin: float, seed: int) -> Comparison:
    difference, needed = over_frames(own - bars, seed), None
    enough = difference.high <= margin
    if not enough and difference.value < margin and math.isfinite(difference.high):
        # An interval's width falls with the square root of the number of frames.
        widths = (difference.high - difference.value) / (margin - difference.value)
        needed = math.ceil(len(own) * widths**2)
    means = float(own.mean()), float(bars.mean())
    return Comparison(cell.num_steps, ENERGY_DISTANCE, *means, difference.high, enough, len(own), needed)


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"
