"""Success in closed loop: how often, how surely, and whether one policy succeeds as often as another."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.proportion import test_proportions_2indep

from smolvla_reflow.evaluation.intervals import CONFIDENCE

# Of a one-sided test: how often a policy that is worse by just the margin would pass for not inferior.
SIGNIFICANCE = 0.05
MOST_EPISODES = 1_000_000


@dataclass(frozen=True)
class Episodes:
    """The episodes of one task, in the order of their seeds.

    Attributes:
        successes: whether each succeeded.
        best_rewards: the largest reward in each.
    """

    successes: list[bool]
    best_rewards: list[float]


@dataclass(frozen=True)
class Success:
    """How often a policy succeeded.

    Attributes:
        rate: share of the episodes that succeeded, 0 to 1.
        low, high: ends of Wilson's 95 % confidence interval of the rate, which treats all episodes alike.
        episodes: number of episodes.
        by_task: the rate of each task.
        best_reward: mean over the episodes of the largest reward in each, `avg_max_reward` of lerobot-eval. Where an
            environment rewards progress, it tells policies apart that succeed as often as each other.
    """

    rate: float
    low: float
    high: float
    episodes: int
    by_task: dict[str, float]
    best_reward: float

    @classmethod
    def count(cls, driven: dict[str, "Episodes"]) -> "Success":
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


def is_not_inferior(here: Success, there: Success, margin: float) -> bool:
    """Whether this rate is shown to be less than `margin` below that one.

    The test of Agresti & Caffo ("Simple and effective confidence intervals for proportions and differences of
    proportions result from adding two successes and two failures", The American Statistician 54 (2000)), one-sided at
    5 %. It takes the two sets of episodes for independent; they begin in the same scenes, so that it errs on the side
    of "not shown".

    Args:
        here, there: two rates.
        margin: a share, 0 to 1.
    """
    return _passes(here.rate, here.episodes, there.rate, there.episodes, margin)


def episodes_needed(here: Success, there: Success, margin: float) -> int | None:
    """The number of episodes of each with which these two rates would pass the test; None if no number would do."""
    if here.rate <= there.rate - margin:
        return None
    few, many = 0, 1
    while not _passes(here.rate, many, there.rate, many, margin):
        few, many = many, 2 * many
        if many > MOST_EPISODES:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if _passes(here.rate, middle, there.rate, middle, margin) else (middle, many)
    return many


def _passes(rate: float, episodes: int, other_rate: float, other_episodes: int, margin: float) -> bool:
    with np.errstate(all="ignore"):  # it also computes ratios, which divide by a rate of 0
        test = test_proportions_2indep(
            rate * episodes,
            episodes,
            other_rate * other_episodes,
            other_episodes,
            value=-margin,
            method="agresti-caffo",
            compare="diff",
            alternative="larger",
        )
    return bool(test.pvalue < SIGNIFICANCE)
