"""The report's picture: the evidence over the number of steps, and below it flow error."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from smolvla_reflow.evaluation.decision import BEST_REWARD, ENERGY_DISTANCE, Decision
from smolvla_reflow.evaluation.frames import Seen
from smolvla_reflow.evaluation.measure import Row

COLUMN_WIDTH_INCHES = 3.4
FIRST, LAST = ("#D55E00", "s"), ("#0072B2", "o")
BETWEEN = (("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#56B4E9", "P"))


def draw(rows: Sequence[Row], decision: Decision, seen: Seen, file: Path) -> None:
    """Draw the rows, one line per policy, as wide as a column of a paper and readable at that width."""
    figure = Figure(figsize=(COLUMN_WIDTH_INCHES, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    draw_evidence(rows, decision, above)
    draw_flow_error(rows, below)
    steps = sorted({row["num_steps"] for row in rows})
    below.set_xscale("log")
    below.set_xlabel("ODE steps", fontsize=8)
    below.set_xticks(steps, [str(n) for n in steps])
    below.set_xticks([], minor=True)
    above.legend(fontsize=7, frameon=False)
    figure.suptitle(seen.in_short(), fontsize=7)
    for axis in (above, below):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, lw=0.5)
    figure.savefig(file, dpi=300)


def draw_evidence(rows: Sequence[Row], decision: Decision, axis: Axes) -> None:
    """Plot best rewards, success or energy distances, and the worst value that the judged policy's may have."""
    bar, margin = decision.comparisons[0].bar, decision.margin
    limit: dict[str, Any] = {"color": "black", "lw": 0.8, "ls": ":"}
    driven = {i: row["success"] for i, row in enumerate(rows) if row["success"] is not None}
    if decision.evidence == BEST_REWARD:
        ends, label = {i: (s.best_reward,) * 3 for i, s in driven.items()}, "best reward"
        axis.axhline(bar - margin, label="bar - margin", **limit)
    elif driven:
        ends, label = {i: (100 * s.low, 100 * s.rate, 100 * s.high) for i, s in driven.items()}, "success (%)"
        axis.set_ylim(-3, 103)
    else:
        found = {i: row["energy_distance"] for i, row in enumerate(rows) if row["energy_distance"] is not None}
        # A side without a bound has no bar.
        ends = {i: tuple(x.value if end is None else end for end in (x.low, x.value, x.high)) for i, x in found.items()}
        decides, label = decision.evidence == ENERGY_DISTANCE, "energy distance (std.)"
        if decides:
            axis.axhline(bar + margin, label="bar + margin", **limit)
        axis.set_yscale("symlog", linthresh=margin if decides else 0.01)
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    draw_intervals(rows, decision, axis, ends)
    axis.set_ylabel(label, fontsize=8)


def draw_intervals(rows: Sequence[Row], decision: Decision, axis: Axes, intervals: Mapping[int, tuple]) -> None:
    """Plot the intervals of some rows, by their index, with a circle around the recommended number of steps.

    The policies are moved sideways, so that none covers another.
    """
    for place, (policy, indices, (colour, marker)) in enumerate(by_policy(rows)):
        shown = [i for i in indices if i in intervals]
        if not shown:
            continue
        low, value, high = np.array([intervals[i] for i in shown]).T
        at = np.array([rows[i]["num_steps"] for i in shown]) * (1.0 + 0.04 * place)
        ends = np.clip([value - low, high - value], 0.0, None)
        axis.errorbar(
            at, value, yerr=ends, label=policy, color=colour, marker=marker, ms=4, lw=1.2, elinewidth=0.8, capsize=2
        )
        for x, y, row in zip(at, value, (rows[i] for i in shown), strict=True):
            if (policy, row["num_steps"]) == (decision.policy, decision.recommended):
                faster = "" if row["speedup"] is None else f", {row['speedup']:.1f}x as fast"
                label = f"recommended: {row['num_steps']}{faster}"
                axis.plot(x, y, "o", ms=11, mfc="none", mec="black", mew=1.0, ls="", label=label)


def draw_flow_error(rows: Sequence[Row], axis: Axes) -> None:
    """Plot flow errors."""
    for _, indices, (colour, marker) in by_policy(rows):
        steps, errors = ([rows[i][name] for i in indices] for name in ("num_steps", "flow_rmse"))
        axis.plot(steps, errors, color=colour, marker=marker, ms=4, lw=1.2)
    axis.set_yscale("log")
    axis.set_ylabel("flow error (std.)", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())


def by_policy(rows: Sequence[Row]) -> list[tuple[str, list[int], tuple[str, str]]]:
    """Each policy's name, the indices of its rows, and its colour and marker, always the same for the judged policy."""
    groups = [(name, list(its)) for name, its in groupby(range(len(rows)), lambda i: rows[i]["policy"])]
    between = len(groups) - 2
    looks = [LAST] if between < 0 else [FIRST, *(BETWEEN[i % len(BETWEEN)] for i in range(between)), LAST]
    return [(name, indices, look) for (name, indices), look in zip(groups, looks, strict=True)]
