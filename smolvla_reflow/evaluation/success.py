"""Success in closed loop: its rate, the rate's confidence interval, and the test that compares two policies."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.proportion import test_proportions_2indep

from smolvla_reflow.evaluation.intervals import CONFIDENCE

# The share of policies worse by just the margin that pass the one-sided test.
SIGNIFICANCE = 0.05
MOST_EPISODES = 2**19


class Episodes(NamedTuple):
    """The episodes of one task, in the order of their seeds."""

    successes: list[bool]
    best_rewards: list[float]  # the largest reward in each


@dataclass(frozen=True)
class Success:
    """The success of a policy at one number of steps."""

    rate: float  # share of the episodes that succeeded, 0 to 1
    low: float  # ends of Wilson's 95 % confidence interval of the rate, which treats all episodes alike
    high: float
    episodes: int
    by_task: dict[str, float]  # the rate of each task
    # Mean over the episodes of the largest reward in each, `avg_max_reward` of lerobot-eval. If an environment rewards
    # progress, it distinguishes policies that succeed equally often.
    best_reward: float

    @classmethod
    def count(cls, driven: Mapping[str, Episodes]) -> "Success":
        """Count the episodes of each task."""
        successes = [success for episodes in driven.values() for success in episodes.successes]
        rewards = [reward for episodes in driven.values() for reward in episodes.best_rewards]
        interval = binomtest(sum(successes), len(successes)).proportion_ci(CONFIDENCE, method="wilson")
        return cls(
            rate=sum(successes) / len(successes),
            low=float(interval.low),
            high=float(interval.high),
            episodes=len(successes),
            by_task={task: sum(each.successes) / len(each.successes) for task, each in driven.items()},
            best_reward=sum(rewards) / len(rewards),
        )


def is_not_inferior(policy: Success, bar: Success, margin: float) -> bool:
    """True if the policy's rate is shown to be less than `margin` (a share, 0 to 1) below the bar's.

    The test is that of Agresti & Caffo, "Simple and effective confidence intervals for proportions and differences of
    proportions result from adding two successes and two failures", The American Statistician 54 (2000). It is one-sided
    at 5 %, and takes the two sets of episodes for independent. They begin in the same scenes, so it errs on the side of
    "not shown".
    """
    return _passes(policy.rate, policy.episodes, bar.rate, bar.episodes, margin)


def episodes_needed(policy: Success, bar: Success, margin: float) -> int | None:
    """The number of episodes of each that would pass the test with these two rates; None if no number would."""
    if policy.rate <= bar.rate - margin:
        return None
    numbers = range(1, MOST_EPISODES + 1)
    place = bisect_left(numbers, True, key=lambda number: _passes(policy.rate, number, bar.rate, number, margin))
    return numbers[place] if place < len(numbers) else None


def _passes(rate: float, episodes: int, bar_rate: float, bar_episodes: int, margin: float) -> bool:
    with np.errstate(all="ignore"):  # it also computes ratios, which divide by a rate of 0
        test = test_proportions_2indep(
            rate * episodes,
            episodes,
            bar_rate * bar_episodes,
            bar_episodes,
            value=-margin,
            method="agresti-caffo",
            compare="diff",
            alternative="larger",
        )
    return bool(test.pvalue < SIGNIFICANCE)
