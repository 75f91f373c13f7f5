"""The recommended number of steps: from the bar's number down to it, the policy is shown to be no worse than the bar.

The bar is the reference policy, as a rule the teacher, with its own number of steps. The evidence is success in closed
loop, the best reward there, or without a simulator the energy distance. A number of steps is enough if the policy is
*not inferior* with it: worse, if at all, by less than a margin that is stated beforehand.

The numbers are tested from the bar's own down, and the first that fails ends the test. So each test is made at the full
level: a number that is too small can be recommended only if the test errs at the largest such number (a fixed sequence;
Maurer, Hothorn & Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays", 1995). A student of
`distill` is trained for one step alone, and tested there alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from smolvla_reflow.evaluation.intervals import Interval, over_episodes
from smolvla_reflow.evaluation.measure import Cell, by_cell
from smolvla_reflow.evaluation.success import Driven, PairedEpisodes, Success, joined

SUCCESS, BEST_REWARD, ENERGY_DISTANCE = EVIDENCE = ("success", "best_reward", "energy_distance")
FEWEST_STEPS_OF_A_BAR = 5
# With fewer, a policy that is worse by just the margin passes more often than once in twenty, where a few frames carry
# the loss (`examples/studies/intervals.py`).
FEWEST_EPISODES, FEWEST_FRAMES = 10, 128
# A number of episodes that would decide is named if it is at most this many times the number that was measured.
WORTH_NAMING = 10


@dataclass(frozen=True)
class Comparison:
    """The judged policy at one number of steps, beside the bar."""

    num_steps: int
    evidence: str  # "success", "best_reward" or "energy_distance"
    here: float  # the policy's value: a share of the episodes, a reward, or standard deviations
    bar: float  # the bar's value
    largest_loss: float | None  # that the interval allows, in the unit of the values; None if there is no bound
    not_inferior: bool  # True if the policy is shown to be worse by less than the margin, if at all
    episodes: int
    needed: int | None  # number of episodes that would show it with these values; None if no number would, or it shows
    is_tested: bool = False  # True if the number of steps is a candidate, and no larger one failed

    def figures(self) -> str:
        """The two values in words."""
        loss = "without a bound" if self.largest_loss is None else f"at most {self.in_unit(self.largest_loss)}"
        if self.evidence == SUCCESS:
            return f"succeeds in {self.here:.1%} of {self.episodes} episodes, against {self.bar:.1%} (loss {loss})"
        name = "a best reward" if self.evidence == BEST_REWARD else "an energy distance"
        of = f"over {self.episodes} episodes"
        return f"has {name} of {self.in_unit(self.here)}, against {self.in_unit(self.bar)} (loss {loss}, {of})"

    def in_unit(self, value: float) -> str:
        """A value or a difference of values as text."""
        if self.evidence == SUCCESS:
            return f"{100 * value:.1f} points"
        return f"{value:.3f}" if self.evidence == BEST_REWARD else f"{value:.4f}"

    @property
    def loss(self) -> float:
        """The policy's distance behind the bar, in the unit of the values."""
        return self.here - self.bar if self.evidence == ENERGY_DISTANCE else self.bar - self.here

    def shortfall(self, margin: float) -> str:
        """The reason why this number of steps is not enough, in words."""
        said = f" At {_steps(self.num_steps)} it {self.figures()}"
        if self.needed is None:
            return f"{said}."
        if self.needed <= WORTH_NAMING * self.episodes:
            return f"{said}; that is too few episodes to decide, some {self.needed} would do."
        return (
            f"{said}; the loss of {self.in_unit(self.loss)} is too near the margin of {self.in_unit(margin)} to decide."
        )

    def needs_reflow(self) -> str:
        """The worth of reflow, judged by one step of a policy alone."""
        if self.not_inferior:
            return " One step loses nothing that counts: reflow is not needed."
        if self.needed is not None:
            return " Until then it is open whether reflow is needed."
        lost = f"{self.in_unit(self.loss)} of {self.evidence.replace('_', ' ')}"
        return f" One step loses {lost}: reflow is needed for as few."


@dataclass(frozen=True)
class Decision:
    """The number of steps that the evidence gives."""

    policy: str  # name of the judged policy
    bar: Cell  # the policy and number of steps that it is compared with
    evidence: str  # "success", "best_reward" or "energy_distance"
    margin: float  # of the evidence
    recommended: int | None  # the smallest number of steps that is enough, None if there is none
    comparisons: tuple[Comparison, ...]  # of every number of steps that was measured, in rising order
    too_little: str | None = None  # the reason why there is too little data to recommend anything
    on_seen_frames: bool = False  # True if the energy distances are of frames that the policy was trained on
    in_time: bool = False  # True if more steps delay the chunks: then the best of the numbers is recommended
    is_alone: bool = False  # True if the policy is compared with itself

    def in_words(self) -> str:
        """The number, the evidence for it, and the reasons why the others are not enough."""
        if self.too_little is not None:
            return f"Nothing is recommended: {self.too_little}"
        failed = [each for each in self.comparisons if not each.not_inferior]
        stopped = [each.shortfall(self.margin) for each in failed if each.is_tested]
        return "".join([self._verdict(), *stopped, self._worth(), self._failures_above(failed)])

    def _verdict(self) -> str:
        bar = f"the {self.bar.policy}'s own {_steps(self.bar.num_steps)}"
        how = {
            SUCCESS: f"margin {self.margin * 100:g} points, paired one-sided test of Tango at 5 %",
            BEST_REWARD: f"margin {self.margin:g}, paired 95 % interval",
            ENERGY_DISTANCE: f"margin {self.margin:g} standard deviations, 95 % interval",
        }[self.evidence]
        if self.recommended is None:
            return f"No number of steps is shown to be as good as {bar} ({how})."
        where = " for frames seen in training" if self.on_seen_frames else ""
        chosen = f"Recommended{where}: num_steps={self.recommended}, "
        if self.is_alone and self.recommended == self.bar.num_steps and not self.in_time:
            return f"{chosen}{bar}: no smaller number is shown to be as good ({how})."
        (found,) = (each for each in self.comparisons if each.num_steps == self.recommended)
        which = "the best of the numbers" if self.in_time else "the smallest number"
        verb = "are" if self.in_time else "is"
        return (
            f"{chosen}{which} that {verb} shown to make the {self.policy} as good as {bar} ({how}): it "
            f"{found.figures()}."
        )

    def _worth(self) -> str:
        """For a policy alone, if it needs reflow; for a student, if reflow has saved no steps."""
        if self.is_alone:
            return "".join(each.needs_reflow() for each in self.comparisons if each.num_steps == 1 and each.is_tested)
        saved_none = self.recommended == self.bar.num_steps and not self.in_time
        return " So reflow has saved no steps yet." if saved_none else ""

    def _failures_above(self, failed: Sequence[Comparison]) -> str:
        """The larger numbers of steps that would fail, so that nobody takes them for safer."""
        above = [each.num_steps for each in failed if self.recommended and each.num_steps > self.recommended]
        if not above:
            return ""
        return f" More steps are not safer: at {_listed(above)} steps the {self.policy} is not shown to be as good."


def decide(
    table: pd.DataFrame,
    driven: Mapping[Cell, Driven],
    bar: Cell,
    policy: str,
    *,
    margins: Mapping[str, float],
    decide_by: str | None = None,
    one_step_only: bool = False,
    on_seen_frames: bool = False,
    in_time: bool = False,
    is_alone: bool = False,
    one_noise: bool = False,
    seed: int = 0,
) -> Decision:
    """Choose a number of steps for the policy of this name.

    Args:
        table: of `measure_batch`.
        driven: the episodes in the simulator so far.
        bar: the policy and number of steps to compare with.
        policy: name of the judged policy.
        margins: by evidence.
        decide_by: the evidence. Default is success if all rows were driven and the bar succeeds at all, else the
            energy distance.
        one_step_only: True for a student that was trained for one step alone.
        on_seen_frames: True if the policy was trained on some of the frames.
        in_time: True if more steps delay the chunks in the simulator. The number with the highest mean is recommended
            then, among the numbers that are enough, in place of the smallest.
        is_alone: True if the policy is compared with itself.
        one_noise: True if the policy starts every chunk from one noise. Its chunks have no distribution then.
        seed: of the resampling.
    """
    groups = by_cell(table)
    rows = [cell for cell in groups if cell.policy == policy]
    evidence = _evidence(decide_by, driven, (*rows, bar), bar, margins[SUCCESS])
    margin = margins[evidence]

    def compared(cell: Cell) -> Comparison:
        if evidence == SUCCESS:
            return _by_success(cell, bar, driven, margin)
        if evidence == BEST_REWARD:
            return _by_best_reward(cell, bar, driven, margin, seed)
        return _by_energy_distance(cell, bar, groups, margin, seed)

    comparisons = {cell.num_steps: compared(cell) for cell in rows}
    candidates = [n for n in sorted(comparisons, reverse=True) if n <= (1 if one_step_only else bar.num_steps)]
    too_little = _too_little(groups[bar], one_noise, bar in driven) if evidence == ENERGY_DISTANCE else None
    if not candidates:
        too_little = f"the {policy} was trained for one step alone. Measure it there: --num_steps=[1]."
    recommended = None
    for n in candidates:
        if too_little is None:
            comparisons[n] = replace(comparisons[n], is_tested=True)
            if not comparisons[n].not_inferior:
                break
            recommended = n
    in_time = in_time and evidence != ENERGY_DISTANCE
    if in_time and recommended is not None:
        enough = [each for each in comparisons.values() if each.is_tested and each.not_inferior]
        recommended = max(enough, key=lambda each: (each.here, -each.num_steps)).num_steps
    on_seen_frames = on_seen_frames and evidence == ENERGY_DISTANCE
    compared_all = tuple(comparisons.values())
    return Decision(
        policy, bar, evidence, margin, recommended, compared_all, too_little, on_seen_frames, in_time, is_alone
    )


def bar_is_low(bar: Cell) -> str | None:
    """A warning for a bar of few steps."""
    if bar.num_steps >= FEWEST_STEPS_OF_A_BAR:
        return None
    return (
        f"The bar is low: it is the {bar.policy} with {_steps(bar.num_steps)}, and may be much worse than the same "
        "policy with more steps. To compare with more steps, give --bar_num_steps=10."
    )


def _evidence(
    asked: str | None, driven: Mapping[Cell, Driven], needed: Sequence[Cell], bar: Cell, success_margin: float
) -> str:
    if not all(cell in driven for cell in needed):  # no environment, or not finished
        return ENERGY_DISTANCE
    # A policy that never succeeds would pass beside a bar that hardly ever does.
    usual = SUCCESS if Success.count(driven[bar]).rate > success_margin else ENERGY_DISTANCE
    return asked or usual


def _by_success(cell: Cell, bar: Cell, driven: Mapping[Cell, Driven], margin: float) -> Comparison:
    own, bars = joined(driven[cell]).successes, joined(driven[bar]).successes
    pairs = PairedEpisodes.count(own, bars)
    enough = cell == bar or pairs.is_not_inferior(margin)
    return Comparison(
        num_steps=cell.num_steps,
        evidence=SUCCESS,
        here=sum(own) / len(own),
        bar=sum(bars) / len(bars),
        largest_loss=pairs.largest_loss(),
        not_inferior=enough,
        episodes=len(own),
        needed=None if enough else pairs.episodes_needed(margin),
    )


def _by_best_reward(cell: Cell, bar: Cell, driven: Mapping[Cell, Driven], margin: float, seed: int) -> Comparison:
    own, bars = (np.array(joined(driven[each]).best_rewards) for each in (cell, bar))
    loss = over_episodes(bars - own, range(len(own)), seed)
    return _by_interval(cell, BEST_REWARD, own, bars, loss, margin, len(own))


def _by_energy_distance(
    cell: Cell, bar: Cell, groups: Mapping[Cell, pd.DataFrame], margin: float, seed: int
) -> Comparison:
    own, bars = (groups[each]["energy_distance"].to_numpy() for each in (cell, bar))
    episodes = groups[cell]["episode"]
    loss = over_episodes(own - bars, episodes, seed)
    return _by_interval(cell, ENERGY_DISTANCE, own, bars, loss, margin, episodes.nunique())


def _by_interval(
    cell: Cell, evidence: str, own: np.ndarray, bars: np.ndarray, loss: Interval, margin: float, episodes: int
) -> Comparison:
    enough, needed = loss.high is not None and loss.high <= margin, None
    if not enough and loss.value < margin and loss.high is not None:
        # An interval's width falls with the square root of the number of episodes.
        widths = (loss.high - loss.value) / (margin - loss.value)
        needed = math.ceil(episodes * widths**2)
    return Comparison(
        num_steps=cell.num_steps,
        evidence=evidence,
        here=float(own.mean()),
        bar=float(bars.mean()),
        largest_loss=loss.high,
        not_inferior=enough,
        episodes=episodes,
        needed=needed,
    )


def _too_little(frames: pd.DataFrame, one_noise: bool, is_driven: bool) -> str | None:
    rewards = "let the simulator's rewards decide (--decide_by=best_reward)"
    simulator = rewards if is_driven else "name a simulator (--env.type)"
    if one_noise:
        return (
            "from one noise the policy makes one chunk for each frame, and a chunk has no distribution to compare. "
            f"To have a number recommended, {simulator}."
        )
    count, episodes = len(frames), frames["episode"].nunique()
    if count >= FEWEST_FRAMES and episodes >= FEWEST_EPISODES:
        return None
    return (
        f"{count} frames of {episodes} episodes are too few, and {FEWEST_FRAMES} frames of {FEWEST_EPISODES} episodes "
        f"are needed. Raise --num_frames, name more --dataset.episodes, or {simulator}."
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, sorted(numbers))
    return f"{', '.join(first)} and {last}" if first else last
