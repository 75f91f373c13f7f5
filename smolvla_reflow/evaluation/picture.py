"""The report's picture: what decides, success or energy distance, over the number of steps, and below it flow error."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from smolvla_reflow.evaluation.decision import ENERGY_DISTANCE, Decision
from smolvla_reflow.evaluation.measure import Cell, Row

COLUMN_WIDTH_INCHES = 3.4
FIRST, LAST = ("#D55E00", "s"), ("#0072B2", "o")
BETWEEN = (("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#56B4E9", "P"))


def draw(rows: Sequence[Row], decision: Decision, file: Path) -> None:
    """Draw the rows, one line per policy, as wide as a column of a paper and readable at that width."""
    figure = Figure(figsize=(COLUMN_WIDTH_INCHES, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    if any(row.success is not None for row in rows):
        draw_success(rows, decision, above)
    else:
        draw_energy_distance(rows, decision, above)
    draw_flow_error(rows, below)
    steps = sorted({row.num_steps for row in rows})
    below.set_xscale("log")
    below.set_xlabel("ODE steps", fontsize=8)
    below.set_xticks(steps, [str(n) for n in steps])
    below.set_xticks([], minor=True)
    above.legend(fontsize=7, frameon=False)
    for axis in (above, below):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, lw=0.5)
    figure.savefig(file, dpi=300)


def draw_success(rows: Sequence[Row], decision: Decision, axis: Axes) -> None:
    """Plot success with its confidence interval."""
    found = [(row, row.success) for row in rows if row.success is not None]
    intervals = {cell_of(row): 100 * np.array([s.low, s.rate, s.high]) for row, s in found}
    draw_intervals(rows, decision, axis, intervals)
    axis.set_ylim(-3, 103)
    axis.set_ylabel("success (%)", fontsize=8)


def draw_energy_distance(rows: Sequence[Row], decision: Decision, axis: Axes) -> None:
    """Plot energy distances with their confidence intervals, and how high the judged policy's may be."""
    distances = {cell_of(row): row.energy_distance for row in rows}
    draw_intervals(rows, decision, axis, {key: np.array([d.low, d.value, d.high]) for key, d in distances.items()})
    if decision.evidence == ENERGY_DISTANCE:
        highest = distances[decision.bar].value + decision.margin
        axis.axhline(highest, color="black", lw=0.8, ls=":", label="bar + margin")
    axis.set_yscale("symlog", linthresh=decision.margin if decision.evidence == ENERGY_DISTANCE else 0.01)
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_ylabel("energy distance (std.)", fontsize=8)


def draw_intervals(rows: Sequence[Row], decision: Decision, axis: Axes, intervals: Mapping[Cell, np.ndarray]) -> None:
    """Plot (low, value, high) of policies and numbers of steps, with a circle around the recommended one.

    The policies are moved apart, so that none covers another.
    """
    for place, (its_rows, (colour, marker)) in enumerate(zip(by_policy(rows), styles(rows), strict=True)):
        shown = [row for row in its_rows if cell_of(row) in intervals]
        if not shown:
            continue
        low, value, high = np.array([intervals[cell_of(row)] for row in shown]).T
        at = np.array(steps_of(shown)) * (1.0 + 0.04 * place)
        ends = np.clip([value - low, high - value], 0.0, None)
        look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2, "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(at, value, yerr=ends, label=shown[0].policy, **look)
        for x, y, row in zip(at, value, shown, strict=True):
            if cell_of(row) == (decision.policy, decision.recommended):
                faster = "" if row.speedup is None else f", {row.speedup:.1f}x as fast"
                label = f"recommended: {row.num_steps}{faster}"
                axis.plot(x, y, "o", ms=11, mfc="none", mec="black", mew=1.0, ls="", label=label)


def draw_flow_error(rows: Sequence[Row], axis: Axes) -> None:
    """Plot flow errors."""
    for its_rows, (colour, marker) in zip(by_policy(rows), styles(rows), strict=True):
        errors = [row.flow_rmse for row in its_rows]
        axis.plot(steps_of(its_rows), errors, color=colour, marker=marker, ms=4, lw=1.2)
    axis.set_yscale("log")
    axis.set_ylabel("flow error (std.)", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())


def by_policy(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each policy, in the order of the report."""
    return [[row for row in rows if row.policy == name] for name in dict.fromkeys(row.policy for row in rows)]


def styles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour and marker of each policy; the last one, which the recommendation is for, always looks the same."""
    between = len(by_policy(rows)) - 2
    return [LAST] if between < 0 else [FIRST, *(BETWEEN[i % len(BETWEEN)] for i in range(between)), LAST]


def cell_of(row: Row) -> Cell:
    """Its policy and number of steps."""
    return Cell(row.policy, row.num_steps)


def steps_of(rows: Sequence[Row]) -> list[int]:
    """The number of steps of each row."""
    return [row.num_steps for row in rows]
