"""How many steps are enough: the smallest number at which a policy is shown to be no worse than the bar.

The bar is the reference policy, as a rule the teacher, with its own number of steps. The evidence is success in closed
loop, where an environment was driven, and otherwise the energy distance. A number of steps is enough if the policy is
*not inferior* with it: worse, if at all, by less than a margin that is stated beforehand, at the 5 % level. Too little
data never passes for enough; it is said how much would do.
"""

import math
from dataclasses import dataclass

from smolvla_reflow.evaluation.intervals import over_frames
from smolvla_reflow.evaluation.measure import Cell, Evaluation
from smolvla_reflow.evaluation.success import episodes_needed, is_not_inferior

SUCCESS, ENERGY_DISTANCE = "success", "energy distance"
FEWEST_STEPS_OF_A_BAR = 5
TEST = "one-sided test of Agresti & Caffo at 5 %"


@dataclass(frozen=True)
class Margins:
    """By how much worse than the bar is still no worse.

    Attributes:
        success: a share of the episodes, 0 to 1.
        energy_distance: in standard deviations.
    """

    success: float
    energy_distance: float


@dataclass(frozen=True)
class Comparison:
    """The judged policy at one number of steps, beside the bar.

    Attributes:
        num_steps: its number of steps.
        evidence: what is compared, "success" or "energy distance".
        here: the policy's, a share of the episodes or standard deviations.
        bar: the bar's.
        worst: the upper end of the 95 % interval of the difference of energy distances; None for success.
        not_inferior: whether it is shown to be worse by less than the margin, if at all.
        sample: how many episodes or frames it was measured on.
        needed: where it is not shown, how many would show it if the figures stay what they are; None if none would.
    """

    num_steps: int
    evidence: str
    here: float
    bar: float
    worst: float | None
    not_inferior: bool
    sample: int
    needed: int | None

    def figures(self) -> str:
        """The two numbers in words."""
        if self.evidence == SUCCESS:
            return f"succeeds in {self.here:.1%} of {self.sample} episodes, against {self.bar:.1%}"
        return (
            f"has an energy distance of {self.here:.4f}, against {self.bar:.4f} (the difference is at most "
            f"{self.worst:.4f} by its 95 % interval over {self.sample} frames)"
        )

    def needs_reflow(self) -> str:
        """Of a policy alone, with one step: whether reflow is worth it."""
        if self.not_inferior:
            return "One step loses nothing that counts: reflow is not needed."
        if self.needed is not None:
            return "Until then it is open whether reflow is needed."
        points, distance = 100 * (self.bar - self.here), self.here - self.bar
        lost = f"{points:.1f} points of success" if self.evidence == SUCCESS else f"{distance:.4f} of energy distance"
        return f"One step loses {lost}: reflow is needed for as few."

    def shortfall(self) -> str:
        """Why it is not enough, in words."""
        unit = "episodes" if self.evidence == SUCCESS else "frames"
        if self.needed is None:
            return f"it {self.figures()}"
        return f"it {self.figures()}; that is too few {unit} to decide, some {self.needed} would do"


@dataclass(frozen=True)
class Decision:
    """The number of steps that the evidence gives.

    Attributes:
        policy: name of the judged policy.
        bar: the policy and number of steps it is compared with.
        evidence: "success" or "energy distance".
        margin: of the evidence.
        recommended: the smallest number of steps that is enough, None if none is.
        comparisons: of every number of steps that was measured, in rising order.
    """

    policy: str
    bar: Cell
    evidence: str
    margin: float
    recommended: int | None
    comparisons: tuple[Comparison, ...]

    @property
    def is_alone(self) -> bool:
        """Whether the policy is compared with itself."""
        return self.policy == self.bar.policy

    def in_words(self) -> str:
        """The decision in some sentences: the number, what decided it, and why it is no smaller."""
        return f"{self._verdict()}{self._fewer()} {self._worth()}".strip()

    def _verdict(self) -> str:
        bar = f"the {self.bar.policy}'s own {_steps(self.bar.num_steps)}"
        how = (
            f"margin {self.margin * 100:g} points, {TEST}"
            if self.evidence == SUCCESS
            else f"margin {self.margin:g} standard deviations"
        )
        if self.recommended is None:
            return f"No number of steps that was measured is shown to be as good as {bar} ({how})."
        if self.is_alone and self.recommended == self.bar.num_steps:
            return (
                f"Recommended: num_steps={self.recommended}, {bar}: no smaller number is shown to be as good ({how})."
            )
        (found,) = (each for each in self.comparisons if each.num_steps == self.recommended)
        return (
            f"Recommended: num_steps={self.recommended}, the smallest at which the {self.policy} is shown to be as "
            f"good as {bar} ({how}): it {found.figures()}."
        )

    def _fewer(self) -> str:
        fewer = [each for each in self.comparisons if not each.not_inferior]
        if self.recommended is not None:
            fewer = [each for each in fewer if each.num_steps < self.recommended]
        return "".join(f" At {_steps(each.num_steps)} {each.shortfall()}." for each in fewer)

    def _worth(self) -> str:
        """Whether reflow is worth it, for a policy alone; and for a student, whether it was."""
        if self.is_alone:
            one_step = [each for each in self.comparisons if each.num_steps == 1]
            return one_step[0].needs_reflow() if one_step else ""
        if self.recommended is not None and self.recommended >= self.bar.num_steps:
            return "So reflow has saved no steps yet."
        return ""


def decide(evaluation: Evaluation, policy: str, margins: Margins) -> Decision:
    """Choose a number of steps for the policy of this name.

    Success decides where every row of it and the bar were driven, unless the bar succeeds so rarely that a policy that
    never does would pass.
    """
    bar = evaluation.bar
    rows = sorted(cell for cell in evaluation.records if cell.policy == policy)
    driven = all(cell in evaluation.successes for cell in (*rows, bar))
    if driven and evaluation.successes[bar].rate > margins.success:
        evidence, margin = SUCCESS, margins.success
        comparisons = tuple(_by_success(evaluation, cell, margin) for cell in rows)
    else:
        evidence, margin = ENERGY_DISTANCE, margins.energy_distance
        comparisons = tuple(_by_energy_distance(evaluation, cell, margin) for cell in rows)
    recommended = min((each.num_steps for each in comparisons if each.not_inferior), default=None)
    return Decision(policy, bar, evidence, margin, recommended, comparisons)


def bar_is_low(bar: Cell) -> str | None:
    """What to say of a bar of few steps; None if it has enough."""
    if bar.num_steps >= FEWEST_STEPS_OF_A_BAR:
        return None
    return (
        f"The bar is low: it is the {bar.policy} with {_steps(bar.num_steps)}, with which it may be much worse than it "
        "can be. To compare with more steps, give --bar_num_steps=10."
    )


def _by_success(evaluation: Evaluation, cell: Cell, margin: float) -> Comparison:
    here, there = evaluation.successes[cell], evaluation.successes[evaluation.bar]
    enough = cell == evaluation.bar or is_not_inferior(here, there, margin)
    needed = None if enough else episodes_needed(here, there, margin)
    return Comparison(cell.num_steps, SUCCESS, here.rate, there.rate, None, enough, here.episodes, needed)


def _by_energy_distance(evaluation: Evaluation, cell: Cell, margin: float) -> Comparison:
    here, there = evaluation.energy_distances(cell), evaluation.energy_distances(evaluation.bar)
    difference = over_frames(here - there, evaluation.seed)
    enough = difference.high <= margin
    needed = None
    if not enough and difference.value < margin and math.isfinite(difference.high):
        # An interval's width falls with the square root of the number of frames.
        widths = (difference.high - difference.value) / (margin - difference.value)
        needed = math.ceil(len(here) * widths**2)
    return Comparison(
        cell.num_steps,
        ENERGY_DISTANCE,
        float(here.mean()),
        float(there.mean()),
        difference.high,
        enough,
        len(here),
        needed,
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"
