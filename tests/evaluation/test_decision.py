"""The decision: each figure behind it against a derivation of its own, and the sentence it ends in."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from smolvla_reflow.evaluation.decision import Decision, decide
from smolvla_reflow.evaluation.intervals import Interval, over_frames
from smolvla_reflow.evaluation.measure import Cell
from smolvla_reflow.evaluation.success import Episodes, Success, episodes_needed, is_not_inferior
from smolvla_reflow.evaluation.two_errors import TwoErrors, advice, fit

TEACHER, ALONE = Cell("teacher", 10), Cell("policy", 10)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """400 samples of 40 skewed numbers, whose mean is known."""
    generator = np.random.default_rng(0)
    found = [over_frames(generator.exponential(size=40), seed=0) for _ in range(400)]
    covered = sum(interval.low <= 1 <= interval.high for interval in found) / len(found)
    assert 0.90 < covered < 0.98  # 95 % of infinitely many numbers, a little less of few
    assert all(interval.low < interval.value < interval.high for interval in found)


def test_the_width_is_that_of_the_central_limit():
    numbers = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    found = over_frames(numbers, seed=0)
    assert found.value == pytest.approx(numbers.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * numbers.std(ddof=1) / 1000**0.5, rel=0.06)
    assert over_frames(numbers, seed=0) == found != over_frames(numbers, seed=1)
    assert over_frames([0.25] * 5, seed=0) == Interval(0.25, 0.25, 0.25)
    assert over_frames([0.25], seed=0) == Interval(0.25, -math.inf, math.inf)


def counted(successes: int, episodes: int) -> Success:
    succeeded = [True] * successes + [False] * (episodes - successes)
    return Success.count({"a": Episodes(succeeded, [float(success) for success in succeeded])})


def adjusted_test(k: float, n: int, other_k: float, other_n: int, margin: float) -> float:
    """Agresti & Caffo: one success and one failure more in each sample, and then Wald's test of p - q = -margin."""
    p, q = (k + 1) / (n + 2), (other_k + 1) / (other_n + 2)
    return float(norm.sf((p - q + margin) / (p * (1 - p) / (n + 2) + q * (1 - q) / (other_n + 2)) ** 0.5))


@pytest.mark.parametrize("k", [150, 178, 180, 184, 186, 190, 195, 199])
@pytest.mark.parametrize("margin", [0.02, 0.05, 0.1])
def test_it_is_that_of_agresti_and_caffo_at_five_percent(k, margin):
    p = adjusted_test(k, 200, 190, 200, margin)
    assert abs(p - 0.05) > 1e-3  # none of these is so close that rounding decides
    assert is_not_inferior(counted(k, 200), counted(190, 200), margin) == (p < 0.05)


def test_both_always_and_both_never():
    assert is_not_inferior(counted(100, 100), counted(100, 100), 0.05)
    assert not is_not_inferior(counted(20, 20), counted(20, 20), 0.05)  # 20 episodes cannot show it
    assert not is_not_inferior(counted(0, 20), counted(0, 20), 0.05)


@pytest.mark.parametrize("bar", [0.6, 0.9, 0.97])
def test_a_policy_worse_by_the_margin_passes_once_in_twenty(bar):
    generator = np.random.default_rng(0)
    draws = generator.binomial(300, [bar - 0.05, bar], size=(2000, 2))
    passed = [is_not_inferior(counted(int(a), 300), counted(int(b), 300), 0.05) for a, b in draws]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.02)


def test_the_number_of_episodes_that_would_do():
    here, there = counted(95, 100), counted(98, 100)
    needed = episodes_needed(here, there, 0.05)
    assert adjusted_test(0.95 * needed, needed, 0.98 * needed, needed, 0.05) < 0.05
    assert adjusted_test(0.95 * (needed - 1), needed - 1, 0.98 * (needed - 1), needed - 1, 0.05) > 0.05
    assert episodes_needed(counted(90, 100), there, 0.05) is None  # worse by more than the margin, however many
    assert episodes_needed(counted(93, 100), there, 0.05) is None  # by just the margin


def decided(distances: dict, successes: dict | None = None, bar: Cell = TEACHER) -> Decision:
    """The decision on the last policy of these energy distances; a mere number of steps is the student's.

    An array has a distance for each frame. Frames of a mean are off it, in every policy by the same amounts.
    """
    cells = [key if isinstance(key, Cell) else Cell("student", key) for key in distances]
    frames = [of if isinstance(of, np.ndarray) else of + 0.01 * np.linspace(-1, 1, 100) for of in distances.values()]
    tables = [pd.DataFrame({**c._asdict(), "energy_distance": of}) for c, of in zip(cells, frames, strict=True)]
    driven = {cell: successes[key] for cell, key in zip(cells, distances, strict=True) if key in (successes or {})}
    return decide(pd.concat(tables), driven, bar, cells[-1].policy, success_margin=0.05, energy_margin=0.01)


def test_the_smallest_number_whose_energy_distance_is_within_the_margin():
    decision = decided({TEACHER: 0.003, 1: 0.2, 2: 0.011, 5: 0.002, 10: 0.001})
    assert (decision.recommended, decision.evidence, decision.margin) == (2, "energy distance", 0.01)
    said = decision.in_words()
    assert "Recommended: num_steps=2" in said
    assert "an energy distance of 0.0110, against 0.0030 (the difference is at most 0.0080" in said
    assert "At 1 step it has an energy distance of 0.2000" in said


def test_too_few_frames_are_said_as_such_with_the_number_that_would_do():
    noise = np.random.default_rng(0).normal(0, 0.05, 30)
    noise -= noise.mean()
    decision = decided({TEACHER: np.full(30, 0.003), 1: 0.003 + noise})
    (only,) = decision.comparisons
    assert decision.recommended is None
    assert not only.not_inferior
    width = 1.96 * noise.std(ddof=1) / 30**0.5  # of a normal interval, which the bootstrap's is close to
    assert only.needed == pytest.approx(30 * (width / 0.01) ** 2, rel=0.25)
    said = decision.in_words()
    assert said.startswith("No number of steps that was measured is shown to be as good as the teacher's own 10 steps")
    assert f"too few frames to decide, some {only.needed} would do" in said


def test_success_decides_where_it_was_driven():
    """The same energy distances as above would have given 2."""
    successes = {key: counted(k, 200) for key, k in {TEACHER: 196, 1: 178, 2: 189, 5: 197, 10: 198}.items()}
    decision = decided({TEACHER: 0.003, 1: 0.2, 2: 0.011, 5: 0.002, 10: 0.001}, successes)
    assert (decision.recommended, decision.evidence) == (5, "success")
    said = decision.in_words()
    assert "it succeeds in 98.5% of 200 episodes, against 98.0%" in said
    assert "margin 5 points, one-sided test of Agresti & Caffo at 5 %" in said
    assert "At 1 step it succeeds in 89.0% of 200 episodes, against 98.0%." in said
    needed = episodes_needed(counted(189, 200), counted(196, 200), 0.05)
    too_few = f"that is too few episodes to decide, some {needed} would do."
    assert f"At 2 steps it succeeds in 94.5% of 200 episodes, against 98.0%; {too_few}" in said


@pytest.mark.parametrize("driven", [{TEACHER: 8, 1: 0, 2: 0}, {TEACHER: 198, 1: 100}], ids=["failing", "unfinished"])
def test_success_decides_nothing_if_the_teacher_hardly_ever_succeeds_or_the_closed_loop_is_not_finished(driven):
    decision = decided({TEACHER: 0.003, 1: 0.5, 2: 0.5}, {key: counted(k, 200) for key, k in driven.items()})
    assert (decision.recommended, decision.evidence) == (None, "energy distance")


def test_a_policy_alone_is_told_whether_it_needs_reflow():
    def said(one_step: float) -> str:
        return decided({Cell("policy", 1): one_step, Cell("policy", 2): 0.02, ALONE: 0.003}, bar=ALONE).in_words()

    assert "Recommended: num_steps=1, " in said(0.004)
    assert "One step loses nothing that counts: reflow is not needed." in said(0.004)
    multimodal = said(0.3)
    assert "Recommended: num_steps=10, the policy's own 10 steps" in multimodal
    assert "At 1 step it has an energy distance of 0.3000, against 0.0030" in multimodal
    assert "One step loses 0.2970 of energy distance: reflow is needed for as few." in multimodal
    assert "reflow" not in decided({ALONE: 0.003}, bar=ALONE).in_words()


def test_a_policy_alone_by_success():
    def said(successes: int) -> str:
        driven = {ALONE: counted(98, 100), Cell("policy", 1): counted(successes, 100)}
        return decided({Cell("policy", 1): 0.3, ALONE: 0.003}, driven, ALONE).in_words()

    assert "One step loses 58.0 points of success: reflow is needed for as few." in said(40)
    assert "too few episodes to decide" in said(95)
    assert said(95).endswith("Until then it is open whether reflow is needed.")
    assert "reflow is not needed" in said(98)


def test_a_student_that_needs_as_many_steps_as_its_teacher_is_told_so():
    assert "So reflow has saved no steps yet." in decided({TEACHER: 0.003, 1: 0.3, 10: 0.003}).in_words()


def test_the_bar_itself_is_never_short_of_episodes():
    """A policy alone, on 20 episodes, too few to show that anything is as good as itself."""
    assert decided({ALONE: 0.003}, {ALONE: counted(20, 20)}, ALONE).recommended == 10


@pytest.mark.parametrize(("r", "c"), [(0.032, 0.076), (0.08, 0.01), (0.0, 0.3)])
def test_the_fit_finds_what_a_synthetic_student_was_made_of(r, c):
    """Each chunk is off by r in one direction and by c/n in another; only the flow errors are handed over."""
    generator = np.random.default_rng(0)
    place, noise = np.linalg.qr(generator.standard_normal((64, 2)))[0].T * 8  # orthogonal, RMS 1
    errors = {n: float(np.sqrt(np.mean((r * place + c / n * noise) ** 2))) for n in (1, 2, 5, 10)}
    found = fit(errors)
    assert found.holds
    assert (found.r, found.c) == (pytest.approx(r, abs=1e-4), pytest.approx(c, abs=1e-4))
    assert found.residual < 1e-4


def test_advice_follows_the_larger_error_and_nothing_is_said_where_the_law_does_not_hold():
    noisy, misplaced = TwoErrors(0.02, 0.1, 0.0, True), TwoErrors(0.06, 0.1, 0.0, True)
    assert "noise that is left over (c/n = 0.100 against r = 0.020)" in advice(noisy, 1)
    assert "noise that is left over" in advice(misplaced, 1)
    assert "actions in the wrong place (r = 0.060 against c/n = 0.050)" in advice(misplaced, 2)
    spoilt = fit({1: 0.05, 2: 0.05, 5: 0.09, 10: 0.15})  # a student that more steps spoil
    assert (spoilt.holds, advice(spoilt, 1)) == (False, None)
    assert spoilt.residual > 0.02
    assert fit({1: 0.1, 10: 0.05}) is None
