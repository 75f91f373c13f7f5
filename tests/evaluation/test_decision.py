"""The decision: each figure behind it against a derivation of its own, and the sentence it ends in."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from smolvla_reflow.evaluation.decision import FEWEST_EPISODES, FEWEST_FRAMES, Decision, decide
from smolvla_reflow.evaluation.intervals import Interval, over_episodes
from smolvla_reflow.evaluation.measure import Cell
from smolvla_reflow.evaluation.success import Episodes, PairedEpisodes
from smolvla_reflow.evaluation.two_errors import TwoErrors, advice, fit

TEACHER, ALONE = Cell("teacher", 10), Cell("policy", 10)


def test_the_interval_is_a_bootstrap_t_over_episodes():
    """Against the same by hand, on episodes of unequal length: ratio, linearised error, quantiles of t."""
    lengths, generator = [3, 7, 5, 2, 9, 4], np.random.default_rng(3)
    episodes = np.repeat([4, 1, 7, 9, 2, 3], lengths)
    values = generator.exponential(size=30) + np.repeat(generator.normal(size=6), lengths)
    per_episode = [values[episodes == each] for each in sorted(set(episodes))]

    def mean_and_error(chosen):
        every = np.concatenate(chosen)
        off = [each.sum() - every.mean() * len(each) for each in chosen]
        return every.mean(), math.sqrt(sum(each**2 for each in off) * 6 / 5) / len(every)

    mean, error = mean_and_error(per_episode)
    found = [
        mean_and_error([per_episode[i] for i in indices])
        for indices in np.random.default_rng(11).integers(6, size=(2000, 6))
    ]
    t = sorted((m - mean) / e for m, e in found)
    low, high = mean - t[1950] * error, mean - t[49] * error  # the 2.5 % and 97.5 % points, outwards
    result = over_episodes(values, episodes, seed=11)
    assert (result.value, result.low, result.high) == pytest.approx((mean, low, high), rel=1e-6)


def test_the_width_is_that_of_the_central_limit():
    """Frames of an episode that are all alike count once."""
    numbers = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    found = over_episodes(numbers, range(1000), seed=0)
    assert found.value == pytest.approx(numbers.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * numbers.std(ddof=1) / 1000**0.5, rel=0.06)
    repeated = over_episodes(np.repeat(numbers, 5), np.repeat(range(1000), 5), seed=0)
    assert (repeated.low, repeated.high) == pytest.approx((found.low, found.high))
    assert over_episodes(numbers, range(1000), seed=1) != found
    assert over_episodes([0.25] * 5, range(5), seed=0) == Interval(0.25, 0.25, 0.25)


def test_too_few_episodes_bound_nothing():
    assert over_episodes([0.25, 0.5], [3, 3], seed=0) == Interval(0.375, None, None)
    one_carries_all = over_episodes(np.eye(1, 40, 5)[0], np.repeat(range(10), 4), seed=0)
    assert one_carries_all == Interval(0.025, None, None)  # a third of the resamples have no spread


def carried_by_few(generator, episodes, frames):
    """One frame in twenty carries the loss, and the frames of an episode resemble each other."""
    latent = math.sqrt(0.2) * generator.normal(size=(episodes, 1)) + math.sqrt(0.8) * generator.normal(
        size=(episodes, frames)
    )
    return np.where(latent > norm.ppf(0.95), generator.exponential(size=latent.shape), 0.0) / 0.05


def lognormal(generator, episodes, frames):
    latent = generator.normal(size=(episodes, 1)) + 2 * generator.normal(size=(episodes, frames))
    return np.exp(latent / math.sqrt(5)) / math.exp(0.5)


def normal(generator, episodes, frames):
    return 1 + generator.normal(size=(episodes, 1)) + generator.normal(size=(episodes, frames))


@pytest.mark.parametrize("draw", [normal, lognormal, carried_by_few])
@pytest.mark.parametrize(("episodes", "frames"), [(FEWEST_EPISODES, 25), (20, 12), (50, 5)])
def test_a_loss_of_just_the_margin_passes_once_in_twenty_at_most(draw, episodes, frames):
    """The true mean is 1. Of 300 samples, up to 23 would pass by chance if 5 % did (99 %)."""
    generator, of = np.random.default_rng(0), np.repeat(range(episodes), frames)
    highest = [over_episodes(draw(generator, episodes, frames).ravel(), of, seed=0).high for _ in range(300)]
    assert sum(high is not None and high <= 1 for high in highest) <= 23


def driven(successes: Sequence[bool], rewards: Sequence[float] | None = None) -> dict[str, Episodes]:
    found = [bool(success) for success in successes]
    return {"a/0": Episodes(found, [float(each) for each in (found if rewards is None else rewards)])}


def first(count: int, of: int) -> dict[str, Episodes]:
    """Success in the first scenes."""
    return driven([i < count for i in range(of)])


def most_likely_score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's statistic, by maximising the likelihood of the four outcomes under the difference numerically."""

    def against(share):  # of the scenes that are lost
        won = share + difference
        return -(gained * math.log(won) + lost * math.log(share) + (n - gained - lost) * math.log(1 - won - share))

    edge = 1e-12
    low, high = max(edge, edge - difference), (1 - difference) / 2 - edge
    share = minimize_scalar(against, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    variance = (2 * share + difference - difference**2) / n
    return ((gained - lost) / n - difference) / math.sqrt(variance)


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 12, 200), (1, 30, 1000), (20, 25, 300), (2, 1, 60)])
@pytest.mark.parametrize("difference", [-0.1, -0.05, -0.01])
def test_the_paired_score_is_tangos(gained, lost, n, difference):
    found = PairedEpisodes(gained, lost, n).score(difference)
    assert found == pytest.approx(most_likely_score(gained, lost, n, difference), rel=1e-4)


def test_the_largest_loss_ends_the_one_sided_interval():
    pairs = PairedEpisodes.count([True] * 90 + [False] * 10, [True] * 80 + [False] * 10 + [True] * 10)
    assert pairs == PairedEpisodes(10, 10, 100)
    worst = pairs.largest_loss()
    assert most_likely_score(10, 10, 100, -worst) == pytest.approx(norm.isf(0.05), rel=1e-4)
    assert pairs.is_not_inferior(worst + 1e-4)
    assert not pairs.is_not_inferior(worst - 1e-4)
    assert PairedEpisodes(0, 20, 20).largest_loss() == 1.0


@pytest.mark.parametrize("bar", [0.6, 0.95])
def test_a_policy_worse_by_the_margin_passes_once_in_twenty(bar):
    """Half of the scenes decide for both policies alike."""
    generator, passed = np.random.default_rng(0), 0
    for _ in range(2000):
        luck, own = generator.random((2, 300))
        alike = generator.random(300) < 0.5
        policy = np.where(alike, luck, own) < bar - 0.05
        passed += PairedEpisodes.count(policy, luck < bar).is_not_inferior(0.05)
    assert passed / 2000 == pytest.approx(0.05, abs=0.015)


def test_the_number_of_episodes_that_would_do():
    pairs = PairedEpisodes(4, 6, 100)
    needed = pairs.episodes_needed(0.05)
    assert most_likely_score(4 * needed / 100, 6 * needed / 100, needed, -0.05) >= norm.isf(0.05)
    fewer = needed - 1
    assert most_likely_score(4 * fewer / 100, 6 * fewer / 100, fewer, -0.05) < norm.isf(0.05)
    assert PairedEpisodes(1, 6, 100).episodes_needed(0.05) is None  # worse by just the margin, however many


def decided(
    distances: dict, episodes: dict | None = None, bar: Cell = TEACHER, per_episode: int = 5, **how
) -> Decision:
    """The decision on the last policy of these energy distances; a mere number of steps is the student's.

    An array has a distance for each frame. Frames of a mean are off it, in every policy by the same amounts.
    """
    cells = [key if isinstance(key, Cell) else Cell("student", key) for key in distances]
    off = 0.01 * np.random.default_rng(0).uniform(-1, 1, 200)
    frames = [of if isinstance(of, np.ndarray) else of + off - off.mean() for of in distances.values()]
    tables = [
        pd.DataFrame({**c._asdict(), "energy_distance": of, "episode": np.arange(len(of)) // per_episode})
        for c, of in zip(cells, frames, strict=True)
    ]
    found = {cell: episodes[key] for cell, key in zip(cells, distances, strict=True) if key in (episodes or {})}
    margins = {"success": 0.05, "best_reward": 0.03, "energy_distance": 0.01}
    how = {"is_alone": cells[-1].policy == bar.policy, **how}
    return decide(pd.concat(tables), found, bar, cells[-1].policy, margins=margins, **how)


def test_the_smallest_number_down_to_which_the_energy_distance_is_within_the_margin():
    decision = decided({TEACHER: 0.003, 1: 0.2, 2: 0.011, 5: 0.002, 10: 0.001})
    assert (decision.recommended, decision.evidence, decision.margin) == (2, "energy_distance", 0.01)
    said = decision.in_words()
    assert "Recommended: num_steps=2" in said
    assert "an energy distance of 0.0110, against 0.0030 (loss at most 0.0080, over 40 episodes)" in said
    assert "At 1 step it has an energy distance of 0.2000" in said
    seen = decided({TEACHER: 0.003, 1: 0.2, 2: 0.011}, on_seen_frames=True)
    assert seen.in_words().startswith("Recommended for frames seen in training: num_steps=2")


def test_the_test_stops_at_the_first_number_that_fails():
    """Below it nothing is recommended, and nothing is called tested."""
    decision = decided({TEACHER: 0.003, 1: 0.002, 2: 0.002, 5: 0.2, 10: 0.002})
    assert decision.recommended == 10
    assert [(each.num_steps, each.is_tested) for each in decision.comparisons] == [
        (1, False),
        (2, False),
        (5, True),
        (10, True),
    ]
    said = decision.in_words()
    assert "At 5 steps it has an energy distance of 0.2000" in said
    assert "At 2 steps" not in said
    assert decided({TEACHER: 0.003, 1: 0.002, 10: 0.2}).recommended is None


def test_numbers_above_the_bars_are_no_candidates_and_their_failures_are_said():
    five = Cell("teacher", 5)
    decision = decided({five: 0.003, 1: 0.002, 5: 0.003, 10: 0.2, 20: 0.3}, bar=five)
    assert decision.recommended == 1
    more = "More steps are not safer: at 10 and 20 steps the student is not shown to be as good."
    assert decision.in_words().endswith(more)


def test_a_student_of_distill_is_tested_at_one_step_alone():
    decision = decided({TEACHER: 0.003, 1: 0.002, 2: 0.2, 10: 0.3}, one_step_only=True)
    assert decision.recommended == 1
    assert "More steps are not safer: at 2 and 10 steps" in decision.in_words()
    assert decided({TEACHER: 0.003, 1: 0.2, 2: 0.002, 10: 0.002}, one_step_only=True).recommended is None
    unmeasured = decided({TEACHER: 0.003, 2: 0.002, 10: 0.002}, one_step_only=True)
    assert unmeasured.in_words().endswith("trained for one step alone. Measure it there: --num_steps=[1].")


def test_two_numbers_of_steps_that_are_too_bad_by_just_the_margin_pass_once_in_twenty_at_most():
    """At 1 and 2 steps; at 5 and 10 the student is the teacher. The two are tested in turn, at the full level each."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        bar = generator.normal(0.05, 0.01, 200)
        bad = [bar + 0.01 + generator.normal(0, 0.02, 200) for _ in range(2)]
        found = decided({TEACHER: bar, 1: bad[0], 2: bad[1], 5: bar, 10: bar})
        wrong += found.recommended in (1, 2)
    assert wrong <= 10


@pytest.mark.parametrize(("frames", "per_episode"), [(FEWEST_FRAMES - 1, 5), (200, 23)])
def test_too_few_frames_or_episodes_recommend_nothing(frames, per_episode):
    same = np.random.default_rng(0).uniform(0.0, 0.004, frames)
    decision = decided({TEACHER: same, 1: same, 10: same}, per_episode=per_episode)
    episodes = math.ceil(frames / per_episode)
    assert decision.recommended is None
    assert decision.in_words().startswith(
        f"Nothing is recommended: {frames} frames of {episodes} episodes are too few, and {FEWEST_FRAMES} frames of "
        f"{FEWEST_EPISODES} episodes are needed."
    )
    enough = np.random.default_rng(0).uniform(0.0, 0.004, 128)
    assert decided({TEACHER: enough, 1: enough, 10: enough}, per_episode=12).recommended == 1


def test_too_few_episodes_to_decide_are_said_with_the_number_that_would_do():
    noise = np.random.default_rng(0).normal(0, 0.08, 150)
    noise -= noise.mean()
    decision = decided({TEACHER: np.full(150, 0.003), 1: 0.003 + noise, 10: np.full(150, 0.003)})
    few = decision.comparisons[0]
    assert decision.recommended == 10
    assert not few.not_inferior
    width = (
        1.96 * noise.reshape(30, 5).mean(axis=1).std(ddof=1) / 30**0.5
    )  # of a normal interval, which this is close to
    assert few.needed == pytest.approx(30 * (width / 0.01) ** 2, rel=0.3)
    assert f"that is too few episodes to decide, some {few.needed} would do" in decision.in_words()
    near = decided({TEACHER: np.full(150, 0.003), 1: 0.0127 + noise, 10: np.full(150, 0.003)})
    assert "the loss of 0.0097 is too near the margin of 0.0100 to decide" in near.in_words()


def test_success_decides_where_it_was_driven():
    """The same energy distances as above would have given 2."""
    successes = {key: first(k, 200) for key, k in {TEACHER: 196, 1: 178, 2: 189, 5: 197, 10: 198}.items()}
    decision = decided({TEACHER: 0.003, 1: 0.2, 2: 0.011, 5: 0.002, 10: 0.001}, successes)
    assert (decision.recommended, decision.evidence) == (5, "success")
    said = decision.in_words()
    assert "it succeeds in 98.5% of 200 episodes, against 98.0% (loss at most" in said
    assert "margin 5 points, paired one-sided test of Tango at 5 %" in said
    needed = PairedEpisodes(0, 7, 200).episodes_needed(0.05)
    assert (
        f"At 2 steps it succeeds in 94.5% of 200 episodes, against 98.0% (loss at most {worst(0, 7):.1f} points)"
        in said
    )
    assert f"that is too few episodes to decide, some {needed} would do." in said
    assert "At 1 step" not in said
    assert decided({TEACHER: 0.003, 1: 0.002, 10: 0.001}, successes, decide_by="energy_distance").recommended == 1


def test_where_chunks_arrive_late_the_best_of_the_enough_is_recommended():
    successes = {key: first(k, 200) for key, k in {TEACHER: 180, 1: 184, 2: 190, 5: 190, 10: 179}.items()}
    distances = {TEACHER: 0.003, 1: 0.2, 2: 0.011, 5: 0.002, 10: 0.001}
    decision = decided(distances, successes, in_time=True)
    assert decision.recommended == 2  # of the two best the one with fewer steps
    assert "the best of the numbers that are shown to make the student as good as" in decision.in_words()
    assert decided(distances, successes).recommended == 1
    # The bar's own number may be the best of several that are enough.
    best = decided(distances, {**successes, 10: first(192, 200)}, in_time=True)
    assert best.recommended == 10
    assert "saved no steps" not in best.in_words()
    # By energy distance nothing is late.
    assert not decided(distances, successes, in_time=True, decide_by="energy_distance").in_time


def test_one_chunk_for_each_frame_recommends_nothing_by_energy_distance():
    distances = {TEACHER: 0.003, 1: 0.002, 10: 0.001}
    decision = decided(distances, one_noise=True)
    assert decision.recommended is None
    assert decision.in_words().endswith("name a simulator (--env.type).")
    hardly = dict.fromkeys(distances, first(1, 200))
    assert "--decide_by=best_reward" in decided(distances, hardly, one_noise=True).in_words()
    successes = {key: first(k, 200) for key, k in {TEACHER: 180, 1: 184, 10: 179}.items()}
    assert decided(distances, successes, one_noise=True).recommended == 1


def worst(gained: int, lost: int) -> float:
    """The end of the interval of the loss in 200 episodes, in points."""
    return 100 * brentq(lambda loss: most_likely_score(gained or 1e-9, lost, 200, -loss) - norm.isf(0.05), 0.04, 0.3)


def test_a_difference_near_the_margin_names_no_number_of_episodes():
    successes = {TEACHER: first(978, 1000), 1: first(930, 1000), 10: first(978, 1000)}
    said = decided({TEACHER: 0.003, 1: 0.2, 10: 0.003}, successes).in_words()
    assert "the loss of 4.8 points is too near the margin of 5.0 points to decide" in said
    assert "would do" not in said


def test_pairs_of_the_same_scenes_decide_with_fewer_episodes():
    """95 % and 97 % of 300 scenes. In other scenes, Agresti & Caffo's test would need 1.7 times as many."""
    pairs = PairedEpisodes.count([i >= 15 for i in range(300)], [i >= 9 for i in range(300)])
    p, q = (285 + 1) / 302, (291 + 1) / 302
    unpaired = (p - q + 0.05) / math.sqrt(p * (1 - p) / 302 + q * (1 - q) / 302)
    assert pairs.score(-0.05) > math.sqrt(1.7) * unpaired


def test_best_reward_decides_if_asked():
    generator = np.random.default_rng(0)
    bar = generator.uniform(0.5, 1.0, 200)
    rewards = {TEACHER: bar, 1: bar - 0.02 + generator.normal(0, 0.1, 200), 2: bar - 0.01, 10: bar}
    found = {key: driven([True] * 100 + [False] * 100, each) for key, each in rewards.items()}
    decision = decided(dict.fromkeys(rewards, 0.003), found, decide_by="best_reward")
    assert (decision.recommended, decision.evidence, decision.margin) == (2, "best_reward", 0.03)
    one, two = decision.comparisons[:2]
    expected = np.mean(bar - rewards[1]) + 1.96 * np.std(bar - rewards[1], ddof=1) / 200**0.5
    assert one.largest_loss == pytest.approx(expected, rel=0.05)
    assert two.largest_loss == pytest.approx(0.01)
    assert (
        f"a best reward of {np.mean(rewards[2]):.3f}, against {bar.mean():.3f} (loss at most 0.010"
        in decision.in_words()
    )


@pytest.mark.parametrize("counts", [{TEACHER: 8, 1: 0, 2: 0}, {TEACHER: 198, 1: 100}], ids=["failing", "unfinished"])
def test_success_decides_nothing_if_the_teacher_hardly_ever_succeeds_or_the_closed_loop_is_not_finished(counts):
    decision = decided({TEACHER: 0.003, 1: 0.5, 2: 0.5}, {key: first(k, 200) for key, k in counts.items()})
    assert (decision.recommended, decision.evidence) == (None, "energy_distance")


def test_a_policy_alone_is_told_whether_it_needs_reflow():
    def said(one_step: float) -> str:
        return decided({Cell("policy", 1): one_step, ALONE: 0.003}, bar=ALONE).in_words()

    assert "Recommended: num_steps=1, " in said(0.004)
    assert "One step loses nothing that counts: reflow is not needed." in said(0.004)
    multimodal = said(0.3)
    assert "Recommended: num_steps=10, the policy's own 10 steps" in multimodal
    assert "At 1 step it has an energy distance of 0.3000, against 0.0030" in multimodal
    assert "One step loses 0.2970 of energy distance: reflow is needed for as few." in multimodal
    assert "reflow" not in decided({ALONE: 0.003}, bar=ALONE).in_words()


def test_a_policy_alone_by_success():
    def said(successes: int) -> str:
        found = {ALONE: first(98, 100), Cell("policy", 1): first(successes, 100)}
        return decided({Cell("policy", 1): 0.3, ALONE: 0.003}, found, ALONE).in_words()

    assert "One step loses 58.0 points of success: reflow is needed for as few." in said(40)
    assert "too few episodes to decide" in said(95)
    assert said(95).endswith("Until then it is open whether reflow is needed.")
    assert "reflow is not needed" in said(98)


def test_a_policy_alone_that_starts_from_zeros_is_no_student():
    cells = {Cell("policy", 1): 50, ALONE: 98, Cell("policy from zeros", 1): 50, Cell("policy from zeros", 10): 98}
    found = {cell: first(successes, 100) for cell, successes in cells.items()}
    said = decided(dict.fromkeys(cells, 0.003), found, ALONE, one_noise=True, is_alone=True).in_words()
    assert "One step loses 48.0 points of success: reflow is needed for as few." in said
    assert "So reflow has saved" not in said


def test_a_student_that_needs_as_many_steps_as_its_teacher_is_told_so():
    assert "So reflow has saved no steps yet." in decided({TEACHER: 0.003, 1: 0.3, 10: 0.003}).in_words()


def test_the_bar_itself_is_never_short_of_episodes():
    """A policy alone, on 20 episodes, too few to show that anything is as good as itself."""
    assert decided({ALONE: 0.003}, {ALONE: first(20, 20)}, ALONE).recommended == 10


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
