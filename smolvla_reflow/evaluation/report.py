"""The report of an evaluation: a table, `report.json`, `report.md` for a model card, `report.png` for a paper."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from smolvla_reflow.evaluation.decision import ENERGY_DISTANCE, Decision
from smolvla_reflow.evaluation.intervals import Interval
from smolvla_reflow.evaluation.latency import ChunkParts
from smolvla_reflow.evaluation.measure import Row
from smolvla_reflow.evaluation.reference import Reference
from smolvla_reflow.evaluation.success import Success
from smolvla_reflow.evaluation.two_errors import TwoErrors
from smolvla_reflow.files import write_whole

SCHEMA_VERSION = 2
NAMES = ("report.json", "report.md", "report.png")
COLUMN_WIDTH_INCHES = 3.4
FIRST, LAST = ("#D55E00", "s"), ("#0072B2", "o")
BETWEEN = (("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#56B4E9", "P"))

WHAT_THE_COLUMNS_SAY = (
    "Energy distance compares the distribution of the actions with that of the reference policy's fine solutions: a "
    "robot does not care which noise becomes which of the good ways. Flow error compares them noise by noise, spread "
    "is the variance over noises, relative to the reference's; both explain a gap. Against one recording per frame, a "
    "policy that averages the ways of doing a task has as small an action error as one that chooses a way."
)


@dataclass(frozen=True)
class Report:
    """Contents of `report.json`, schema version 2.

    Attributes:
        rows: one per policy and number of steps; their fields are those of `smolvla_reflow.evaluation.measure.Row`.
        recommended_num_steps: the smallest number that is enough, or None.
        recommendation: the same in some sentences.
        decision: what it stands on: judged policy, bar, evidence, margin, and the comparisons, one per number of steps;
            see `smolvla_reflow.evaluation.decision.Decision`.
        two_errors: by student, how its flow error depends on the number of steps, see
            `smolvla_reflow.evaluation.two_errors.TwoErrors`; None for fewer than three numbers of steps.
        advice: what would bring the judged policy's flow error down, None if it need not be, or nothing can be said.
        references: by policy, how its fine solutions were computed, and their own error.
        chunk_parts: of the judged policy, milliseconds of the prefix and of one ODE step; None until they are measured.
        notes: what else has to be known.
        made_with: policy and teacher paths, dataset, seed, numbers of frames and noises, margins, versions.
        complete: whether everything that was asked for is in it.
        schema_version: of this file.
    """

    rows: list[Row]
    recommended_num_steps: int | None
    recommendation: str
    decision: Decision
    two_errors: dict[str, TwoErrors | None]
    advice: str | None
    references: dict[str, Reference]
    chunk_parts: ChunkParts | None
    notes: list[str]
    made_with: dict[str, Any]
    complete: bool
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and report.png into a folder, made if needed. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_whole(folder / "report.md", self.markdown().encode())
        draw(self, folder / "report.png")

    def sentences(self) -> list[str]:
        """What the report says in words: the recommendation first."""
        unfinished = [] if self.complete else ["This report is unfinished: the same command goes on with it."]
        fits = [
            f"Flow error of the {policy} over the number of steps n: sqrt(r^2 + (c/n)^2) with r = {fit.r:.3f} and "
            f"c = {fit.c:.3f}, to {fit.residual:.4f}."
            for policy, fit in self.two_errors.items()
            if fit is not None and fit.holds
        ]
        parts = []
        if self.chunk_parts is not None:
            parts = [self.chunk_parts.left_to_gain(self.recommended_num_steps or self.decision.bar.num_steps)]
        advice = [self.advice] if self.advice else []
        return [*unfinished, self.recommendation, *fits, *advice, *parts, self._fine_solutions(), *self.notes]

    def _fine_solutions(self) -> str:
        steps = ", ".join(f"{found.steps} steps for the {policy}" for policy, found in self.references.items())
        error = max(found.rmse for found in self.references.values())
        return f"The fine solutions are by rk4, {steps}; their own error is at most about {error:.1g}."

    def markdown(self) -> str:
        """The report as a section of a model card."""
        made = "\n".join(f"- {name}: `{value}`" for name, value in self.made_with.items())
        said = "\n\n".join(self.sentences())
        return (
            f"## How many ODE steps\n\n{said}\n\n{markdown_table(self.rows)}\n\n"
            f"Distances are in standard deviations of the actions, action error is in the robot's units. "
            f"{WHAT_THE_COLUMNS_SAY}\n\n{made}\n"
        )


EVERY_COLUMN: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("policy", lambda r: r.policy),
    ("steps", lambda r: str(r.num_steps)),
    ("energy distance (95 % interval)", lambda r: as_interval(r.energy_distance)),
    ("flow error", lambda r: f"{r.flow_rmse:.4f}"),
    ("own flow error", lambda r: f"{r.own_flow_rmse:.4f}"),
    ("spread", lambda r: f"{r.spread_ratio:.3f}"),
    ("straightness", lambda r: f"{r.straightness:.4f}"),
    ("success (95 % interval)", lambda r: "" if r.success is None else in_percent(r.success)),
    ("action error", lambda r: f"{r.action_mae:.4g}"),
    ("latency", lambda r: "" if r.latency_ms_p50 is None else f"{r.latency_ms_p50:.1f} ms"),
    ("speed-up", lambda r: "" if r.speedup is None else f"{r.speedup:.2f}x"),
)


DETAILS = ("own flow error", "straightness", "action error")


def as_interval(found: Interval) -> str:
    """A mean and its confidence interval as text."""
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def in_percent(success: Success) -> str:
    """The rate and its confidence interval as text."""
    return f"{success.rate:.1%} ({success.low:.0%} to {success.high:.0%})"


def cells_of(rows: Sequence[Row], left_out: Collection[str] = ()) -> list[list[str]]:
    """The table's titles and rows as text, without some columns and those that are empty in every row."""
    columns = [[title, *map(show, rows)] for title, show in EVERY_COLUMN if title not in left_out]
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def table(rows: Sequence[Row]) -> str:
    """The table as aligned text, narrow enough for a terminal."""
    cells = cells_of(rows, DETAILS)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    titles, *cells = cells_of(rows)
    cells = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def draw(report: Report, file: Path) -> None:
    """Plot what decides, success or energy distance, over the number of steps, and below it flow error.

    There is one line per policy. The picture is as wide as a column of a paper, and readable at that width.
    """
    figure = Figure(figsize=(COLUMN_WIDTH_INCHES, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    if any(row.success is not None for row in report.rows):
        draw_success(report, above)
    else:
        draw_energy_distance(report, above)
    draw_flow_error(report, below)
    steps = sorted({row.num_steps for row in report.rows})
    below.set_xscale("log")
    below.set_xlabel("ODE steps", fontsize=8)
    below.set_xticks(steps, [str(n) for n in steps])
    below.set_xticks([], minor=True)
    above.legend(fontsize=7, frameon=False)
    for axis in (above, below):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, lw=0.5)
    figure.savefig(file, dpi=300)


def draw_success(report: Report, axis: Axes) -> None:
    """Plot success with its confidence interval."""
    found = [(row, row.success) for row in report.rows if row.success is not None]
    intervals = {(row.policy, row.num_steps): 100 * np.array([s.low, s.rate, s.high]) for row, s in found}
    draw_intervals(report, axis, intervals)
    axis.set_ylim(-3, 103)
    axis.set_ylabel("success (%)", fontsize=8)


def draw_energy_distance(report: Report, axis: Axes) -> None:
    """Plot energy distances with their confidence intervals, and how high the judged policy's may be."""
    distances = {(row.policy, row.num_steps): row.energy_distance for row in report.rows}
    draw_intervals(report, axis, {key: np.array([d.low, d.value, d.high]) for key, d in distances.items()})
    decision = report.decision
    if decision.evidence == ENERGY_DISTANCE:
        highest = distances[decision.bar].value + decision.margin
        axis.axhline(highest, color="black", lw=0.8, ls=":", label="bar + margin")
    axis.set_yscale("symlog", linthresh=decision.margin if decision.evidence == ENERGY_DISTANCE else 0.01)
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_ylabel("energy distance (std.)", fontsize=8)


def draw_intervals(report: Report, axis: Axes, intervals: Mapping[tuple[str, int], np.ndarray]) -> None:
    """Plot (low, value, high) of policies and numbers of steps, with a circle around the recommended one.

    The policies are moved apart, so that none covers another.
    """
    for place, (name, rows) in enumerate(by_policy(report.rows).items()):
        shown = [row for row in rows if (name, row.num_steps) in intervals]
        if not shown:
            continue
        colour, marker = styles(report.rows)[place]
        low, value, high = np.array([intervals[name, row.num_steps] for row in shown]).T
        at = np.array(steps_of(shown)) * (1.0 + 0.04 * place)
        finite = np.nan_to_num([value - low, high - value], posinf=0.0)
        axis.errorbar(
            at,
            value,
            yerr=np.clip(finite, 0.0, None),
            color=colour,
            marker=marker,
            ms=4,
            lw=1.2,
            elinewidth=0.8,
            capsize=2,
            label=name,
        )
        for x, y, row in zip(at, value, shown, strict=True):
            if (name, row.num_steps) == (report.decision.policy, report.recommended_num_steps):
                faster = "" if row.speedup is None else f", {row.speedup:.1f}x as fast"
                label = f"recommended: {row.num_steps}{faster}"
                axis.plot(x, y, "o", ms=11, mfc="none", mec="black", mew=1.0, ls="", label=label)


def draw_flow_error(report: Report, axis: Axes) -> None:
    """Plot flow errors."""
    for rows, (colour, marker) in zip(by_policy(report.rows).values(), styles(report.rows), strict=True):
        axis.plot(steps_of(rows), [row.flow_rmse for row in rows], color=colour, marker=marker, ms=4, lw=1.2)
    axis.set_yscale("log")
    axis.set_ylabel("flow error (std.)", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())


def by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each policy by its name, in the order of the report."""
    return {name: [row for row in rows if row.policy == name] for name in dict.fromkeys(row.policy for row in rows)}


def styles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour and marker of each policy; the last one, which the recommendation is for, always looks the same."""
    between = len(by_policy(rows)) - 2
    return [LAST] if between < 0 else [FIRST, *(BETWEEN[i % len(BETWEEN)] for i in range(between)), LAST]


def steps_of(rows: Sequence[Row]) -> list[int]:
    """The number of steps of each row."""
    return [row.num_steps for row in rows]
