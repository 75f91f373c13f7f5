"""How often does a policy that is worse by just the margin pass, by an interval of the energy distance?

    python examples/studies/intervals.py          # the tables of README.md

Differences of energy distances are drawn with a mean of just the margin, so every policy that passes is one too many;
2.5 % are meant to pass. The frames of an episode resemble each other. Four intervals are compared on the same draws:
BCa over frames, and over episodes Student's t, BCa, and the bootstrap-t that `smolvla-reflow-eval` uses.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import draccus
import numpy as np
import pandas as pd
from scipy.stats import bootstrap, norm, t
from tables import markdown
from tqdm import tqdm

from smolvla_reflow.evaluation.decision import decide
from smolvla_reflow.evaluation.intervals import CONFIDENCE, RESAMPLES, over_episodes
from smolvla_reflow.evaluation.measure import Cell
from smolvla_reflow.evaluation.success import Episodes

SIZES = ((5, 50), (10, 13), (10, 25), (20, 13), (50, 5))  # episodes, and frames of each
CARRIED_BY = 0.05  # share of the frames that carry the loss
# Correlation of two frames of an episode. With 20 episodes of 13 frames, the interval over episodes is then 1.7 times
# as wide as an interval over frames.
ALIKE = 0.15
TAIL = (1 - CONFIDENCE) / 2
NAMES = ("BCa over frames", "Student's t", "BCa", "bootstrap-t")


@dataclass
class IntervalsConfig:
    repeats: int = 1000
    """Samples of each row."""


def normal(latent: np.ndarray) -> np.ndarray:
    """Differences of mean 1."""
    return 1 + latent


def lognormal(latent: np.ndarray) -> np.ndarray:
    """The same, skewed."""
    return np.exp(latent - 0.5)


def few(latent: np.ndarray) -> np.ndarray:
    """The same, where few frames carry the loss and the others none, as at the forks of a task."""
    surprise = norm.sf(latent) / CARRIED_BY
    return np.where(surprise < 1, -np.log(np.clip(surprise, 1e-300, 1.0)), 0.0) / CARRIED_BY


def correlated(draw, wanted: float, generator: np.random.Generator) -> float:
    """The correlation of the latent numbers that gives their differences the wanted correlation within an episode."""
    shared, own = generator.standard_normal((2, 400_000))
    other = generator.standard_normal(400_000)

    def found(latent: float) -> float:
        first, second = (np.sqrt(latent) * shared + np.sqrt(1 - latent) * each for each in (own, other))
        return float(np.corrcoef(draw(first), draw(second))[0, 1])

    return min(np.linspace(0, 0.95, 39), key=lambda latent: abs(found(latent) - wanted))


def upper_ends(values: np.ndarray) -> Iterator[float]:
    """The upper ends of the intervals in NAMES, from (episodes, frames)."""
    episodes, frames = values.shape
    means = values.mean(axis=1)
    flat = np.ptp(means) == 0

    def bca(numbers: np.ndarray) -> float:
        if np.ptp(numbers) == 0:
            return float(numbers[0])
        found = bootstrap((numbers,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, random_state=0)
        return float(found.confidence_interval.high)

    yield bca(values.ravel())
    yield means.mean() + t.isf(TAIL, episodes - 1) * means.std(ddof=1) / np.sqrt(episodes)
    yield means[0] if flat else bca(means)
    high = over_episodes(values.ravel(), np.repeat(np.arange(episodes), frames), seed=0).high
    yield np.inf if high is None else high


def simulate(repeats: int) -> str:
    """The table: in % of the samples, the share that passes with a loss of the margin, and with half of it."""
    lines = []
    for name, draw in (("normal", normal), ("log-normal", lognormal), ("carried by 5 % of the frames", few)):
        for alike in (0.0, ALIKE):
            latent = correlated(draw, alike, np.random.default_rng(1))
            for episodes, frames in SIZES:
                generator = np.random.default_rng(0)
                ends = []
                for _ in tqdm(range(repeats), desc=f"{name}, {episodes} x {frames}", leave=False):
                    shared = generator.standard_normal((episodes, 1))
                    own = generator.standard_normal((episodes, frames))
                    ends.append([*upper_ends(draw(np.sqrt(latent) * shared + np.sqrt(1 - latent) * own))])
                passed = np.array(ends) <= 1
                half = np.array(ends) <= 2  # the same differences less half of the margin, in units of that half
                shares = [f"{100 * share:.1f}" for share in passed.mean(axis=0)]
                lines.append([name, f"{alike:g}", f"{episodes} x {frames}", *shares, f"{100 * half[:, -1].mean():.0f}"])
    head = ["differences", "correlation", "episodes x frames", *NAMES, "bootstrap-t at half the margin"]
    return markdown(head, lines)


def in_turn(repeats: int) -> str:
    """The table: in % of the samples, how often a number of steps is recommended though each loses just the margin."""
    generator, rows = np.random.default_rng(0), {evidence: [] for evidence in ("success", "energy_distance")}
    bar, student = Cell("teacher", 10), [Cell("student", n) for n in (1, 2, 5, 10)]
    margins = {"success": 0.05, "energy_distance": 1.0}
    for _ in tqdm(range(repeats), leave=False):
        luck = generator.random((5, 300))
        luck[1:] = np.where(generator.random((4, 300)) < 0.5, luck[0], luck[1:])  # half of the scenes decide
        succeeded = (luck < np.array([0.95, 0.9, 0.9, 0.9, 0.9])[:, None]).tolist()
        driven = {cell: {"a": Episodes(each, [0.0])} for cell, each in zip([bar, *student], succeeded, strict=True)}
        frames = generator.standard_normal((20, 13)) + generator.standard_normal((20, 1))
        distances = [frames, *(1 + frames + 2 * generator.standard_normal((4, 20, 13)))]
        table = pd.concat(
            pd.DataFrame({**cell._asdict(), "episode": np.repeat(np.arange(20), 13), "energy_distance": each.ravel()})
            for cell, each in zip([bar, *student], distances, strict=True)
        )
        for evidence, passed in rows.items():
            decision = decide(table, driven, bar, "student", margins=margins, decide_by=evidence)
            each = [comparison.not_inferior for comparison in decision.comparisons]
            passed.append([each[-1], any(each), decision.recommended is not None])
    lines = [[name, *(f"{100 * share:.1f}" for share in np.mean(each, axis=0))] for name, each in rows.items()]
    return markdown(["evidence", "one number passes", "any of four passes", "one of four is recommended"], lines)


def main(cfg: IntervalsConfig) -> None:
    """Print both tables."""
    print(simulate(cfg.repeats), in_turn(cfg.repeats), sep="\n\n")


if __name__ == "__main__":
    main(draccus.parse(IntervalsConfig))
