"""The report of an evaluation: a table, `report.json`, `report.md` for a model card, `report.png` for a paper."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from smolvla_reflow.evaluation.measure import Row
from smolvla_reflow.evaluation.metrics import Success
from smolvla_reflow.files import write_whole

SCHEMA_VERSION = 1
COLUMN_WIDTH_INCHES = 3.4
FIRST, LAST = ("#D55E00", "s"), ("#0072B2", "o")
BETWEEN = (("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#56B4E9", "P"))

WHY_FLOW_ERROR_LEADS = (
    "Flow error and spread come first: against one recording per frame, a policy that averages the ways of doing a "
    "task has as small a mean error as one that chooses a way."
)


@dataclass(frozen=True)
class Report:
    """Contents of `report.json`, schema version 1.

    Attributes:
        rows: one per policy and number of steps; their fields are those of `smolvla_reflow.evaluation.measure.Row`.
        recommended_num_steps: the smallest number that is enough, or None.
        recommendation: the same in a sentence.
        reference_rmse: estimated error of the fine solution that flow errors are measured against, in standard
            deviations, see `smolvla_reflow.evaluation.measure.Evaluation`.
        made_with: policy and teacher paths, dataset, seed, reference, numbers of frames and noises, versions.
        schema_version: of this file.
    """

    rows: list[Row]
    recommended_num_steps: int | None
    recommendation: str
    reference_rmse: float
    made_with: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and report.png into a folder, made if needed. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_whole(folder / "report.md", self.markdown().encode())
        draw(self, folder / "report.png")

    def markdown(self) -> str:
        """The report as a section of a model card."""
        made = "\n".join(f"- {name}: `{value}`" for name, value in self.made_with.items())
        return (
            f"## How many ODE steps\n\n{self.recommendation}\n\n{markdown_table(self.rows)}\n\n"
            f"Flow error is the RMS distance to the reference policy's fine solution from the same noise, in standard "
            f"deviations of the actions (that solution's own error is about {self.reference_rmse:.1g}); spread is the "
            f"variance over noises, relative to that solution's; action error is the mean distance to the recorded "
            f"actions, in the robot's units. "
            f"{WHY_FLOW_ERROR_LEADS}\n\n{made}\n"
        )


EVERY_COLUMN: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("policy", lambda r: r.policy),
    ("steps", lambda r: str(r.num_steps)),
    ("flow error", lambda r: f"{r.flow_rmse:.4f}"),
    ("own flow error", lambda r: f"{r.own_flow_rmse:.4f}"),
    ("spread", lambda r: f"{r.spread_ratio:.3f}"),
    ("straightness", lambda r: f"{r.straightness:.4f}"),
    ("success (95 % interval)", lambda r: "" if r.success is None else in_percent(r.success)),
    ("action error", lambda r: f"{r.action_mae:.4g}"),
    ("latency", lambda r: f"{r.latency_ms_p50:.1f} ms"),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
)


def in_percent(success: Success) -> str:
    """The rate and its confidence interval as text."""
    return f"{success.rate:.1%} ({success.low:.0%} to {success.high:.0%})"


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """The table's titles and rows as text, without columns that are empty in every row."""
    columns = [[title, *map(show, rows)] for title, show in EVERY_COLUMN]
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def table(rows: Sequence[Row]) -> str:
    """The table as aligned text, for a terminal."""
    cells = cells_of(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    titles, *cells = cells_of(rows)
    cells = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def draw(report: Report, file: Path) -> None:
    """Plot flow error and, where it was measured, success over the number of steps, one line per policy.

    The picture is as wide as a column of a paper, and readable at that width.
    """
    driven = any(row.success is not None for row in report.rows)
    figure = Figure(figsize=(COLUMN_WIDTH_INCHES, 4.3 if driven else 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + driven, sharex=True, squeeze=False)[:, 0]
    draw_flow_error(report, axes[0])
    if driven:
        draw_success(report, axes[1])
    steps = sorted({row.num_steps for row in report.rows})
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("ODE steps", fontsize=8)
    axes[-1].set_xticks(steps, [str(n) for n in steps])
    axes[-1].set_xticks([], minor=True)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, lw=0.5)
    figure.savefig(file, dpi=300)


def draw_flow_error(report: Report, axis: Axes) -> None:
    """Plot flow errors, with a circle around the recommended one."""
    for (name, rows), (colour, marker) in zip(by_policy(report.rows).items(), styles(report.rows), strict=True):
        errors = [row.flow_rmse for row in rows]
        axis.plot(steps_of(rows), errors, color=colour, marker=marker, ms=4, lw=1.2, label=name)
    for row in rows:
        if row.num_steps == report.recommended_num_steps:
            label = f"recommended: {row.num_steps}, {row.speedup:.1f}x as fast"
            axis.plot(row.num_steps, row.flow_rmse, "o", ms=11, mfc="none", mec="black", mew=1.0, ls="", label=label)
    axis.set_yscale("log")
    axis.set_ylabel("flow error (standard deviations)", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.legend(fontsize=7, frameon=False)


def draw_success(report: Report, axis: Axes) -> None:
    """Plot success with its confidence interval; the policies are moved apart, so that none covers another."""
    for place, (rows, (colour, marker)) in enumerate(
        zip(by_policy(report.rows).values(), styles(report.rows), strict=True)
    ):
        rates = [(r.success.low, r.success.rate, r.success.high) for r in rows if r.success is not None]
        low, rate, high = 100 * np.array(rates).T
        axis.errorbar(
            np.array(steps_of(rows)) * (1.0 + 0.04 * place),
            rate,
            yerr=np.clip([rate - low, high - rate], 0.0, None),
            color=colour,
            marker=marker,
            ms=4,
            lw=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    axis.set_ylim(-3, 103)
    axis.set_ylabel("success (%)", fontsize=8)


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
