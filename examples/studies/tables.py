"""The tables of a study: means over seeds, and differences in best reward, paired by start."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from smolvla_reflow.evaluation.intervals import over_episodes

# Measurements of one training, by number of steps. Success and best reward have a value for each episode, or are None.
Measured = Mapping[str, Mapping[str, Any]]

# Columns: name, factor, digits.
DRIVEN = (
    ("best_reward", 1, 3),
    ("success", 100, 1),
    ("best_reward_from_zeros", 1, 3),
    ("success_from_zeros", 100, 1),
)
ON_FRAMES = (("energy_distance", 1, 4), ("flow_rmse", 1, 3), ("spread_ratio", 1, 2))


def table(found: Mapping[str, Sequence[Measured]]) -> str:
    """A Markdown table with a row for each variant: mean ± standard deviation over seeds."""
    first = found["teacher"][0]
    steps = list(first)
    columns = [each for each in (*DRIVEN, *ON_FRAMES) if first[steps[0]].get(each[0]) is not None]
    head = [f"{name}, {n}" for name, _, _ in columns for n in steps]
    lines = []
    for variant, runs in found.items():
        if runs:
            values = [[scale * _mean(run[n][name]) for run in runs] for name, scale, _ in columns for n in steps]
            digits = [digits for _, _, digits in columns for _ in steps]
            lines.append([_named(variant), *map(_mean_and_deviation, values, digits)])
    return markdown(["", *head], lines)


def differences(found: Mapping[str, Sequence[Measured]]) -> str:
    """Difference in best reward to the teacher at its largest number of steps, with a 95 % interval over the starts.

    Every policy begins at the teacher's starts, so each difference compares two drives from the same start.
    """
    bars = found["teacher"]
    steps = list(bars[0])
    if bars[0][steps[0]]["success"] is None:
        return ""
    lines = []
    for variant, runs in found.items():
        cells = []
        for n in steps if runs else ():
            pairs = [
                (here, there)
                for run, bar in zip(runs, bars, strict=False)
                for here, there in zip(run[n]["best_reward"], bar[steps[-1]]["best_reward"], strict=True)
            ]
            interval = over_episodes([here - there for here, there in pairs], range(len(pairs)), seed=0)
            low, high = ("no bound" if end is None else f"{end:+.3f}" for end in (interval.low, interval.high))
            cells.append(f"{interval.value:+.3f} ({low} to {high})")
        if cells:
            lines.append([_named(variant), *cells])
    title = f"best reward, less the teacher's at {steps[-1]} steps"
    return markdown([title, *steps], lines)


def _named(variant: str) -> str:
    return f"`{variant}`" if variant else "default"


def _mean(value: float | Sequence[float]) -> float:
    return value if isinstance(value, float | int) else mean(map(float, value))


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])
