"""Success in closed loop: its rate, and the paired comparison of two policies that start in the same scenes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from smolvla_reflow.evaluation.intervals import CONFIDENCE

# A policy that is worse by just the margin passes the one-sided test in this share of the evaluations.
SIGNIFICANCE = 0.05


class Episodes(NamedTuple):
    """The episodes of one task, in the order of their seeds."""

    successes: list[bool]
    best_rewards: list[float]  # the largest reward in each


Driven = Mapping[str, Episodes]  # by task


def joined(driven: Driven) -> Episodes:
    """All episodes, task after task."""
    return Episodes(*([x for of_task in each for x in of_task] for each in zip(*driven.values(), strict=True)))


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
    def count(cls, driven: Driven) -> "Success":
        """Count the episodes of each task."""
        successes, rewards = joined(driven)
        interval = binomtest(sum(successes), len(successes)).proportion_ci(CONFIDENCE, method="wilson")
        return cls(
            rate=sum(successes) / len(successes),
            low=float(interval.low),
            high=float(interval.high),
            episodes=len(successes),
            by_task={task: sum(each.successes) / len(each.successes) for task, each in driven.items()},
            best_reward=sum(rewards) / len(rewards),
        )


@dataclass(frozen=True)
class PairedEpisodes:
    """The episodes of two policies in the same scenes: the numbers of scenes where a single policy succeeded."""

    gained: int  # only the policy succeeded
    lost: int  # only the bar succeeded
    episodes: int

    @classmethod
    def count(cls, policy: Sequence[bool], bar: Sequence[bool]) -> "PairedEpisodes":
        """Count two lists of equal length, scene by scene."""
        both = list(zip(policy, bar, strict=True))
        return cls(sum(p and not b for p, b in both), sum(b and not p for p, b in both), len(both))

    def score(self, difference: float) -> float:
        """The score statistic of `policy's rate - bar's rate = difference`, standard normal if that is true.

        Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
        design", Statistics in Medicine 17 (1998). `share` is the most likely share of lost scenes that the difference
        allows.
        """
        n, gained, lost = self.episodes, self.gained, self.lost
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        ahead = gained - lost - n * difference
        return ahead / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, ahead)

    def is_not_inferior(self, margin: float) -> bool:
        """True if the policy's rate is shown to be less than `margin` below the bar's, one-sided at 5 %."""
        return bool(self.score(-margin) > norm.isf(SIGNIFICANCE))

    def largest_loss(self) -> float:
        """The end of the one-sided 95 % interval of `bar's rate - policy's rate`."""
        quantile, observed = float(norm.isf(SIGNIFICANCE)), (self.gained - self.lost) / self.episodes
        if self.score(-1 + 1e-9) < quantile:  # not even this much is excluded
            return 1.0
        return -float(brentq(lambda difference: self.score(difference) - quantile, -1 + 1e-9, observed - 1e-12))

    def episodes_needed(self, margin: float) -> int | None:
        """The number of episodes that would pass with the same shares; None if no number would."""
        score = self.score(-margin)
        return math.ceil(self.episodes * (norm.isf(SIGNIFICANCE) / score) ** 2) if score > 0 else None
