"""What an evaluation says: a table, `report.json`, `report.md` for a model card, and `report.png` for a paper."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from smolvla_reflow.evaluation import Row
from smolvla_reflow.pairs import write_whole

SCHEMA_VERSION = 1
COLUMN_WIDTH_INCHES = 3.4
STYLES = {"teacher": ("#D55E00", "s"), "student": ("#0072B2", "o"), "policy": ("#0072B2", "o")}

WHY_FLOW_ERROR_LEADS = (
    "Flow error and spread come first: against one recording per frame, a policy that averages the ways of doing a "
    "task has as small a mean error as one that chooses a way."
)


@dataclass(frozen=True)
class Report:
    """`report.json`, schema version 1. The fields of `rows` are those of `smolvla_reflow.evaluation.Row`.

    Attributes:
        rows: one per policy and number of steps.
        recommended_num_steps: the smallest that is enough, or None.
        recommendation: the same in a sentence.
        reference_rmse: how far the fine reference is from one with half the steps, in standard deviations.
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
        """Write all three files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.json", (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_whole(folder / "report.md", self.markdown().encode())
        draw(self, folder / "report.png")

    def markdown(self) -> str:
        """For a model card."""
        made = "\n".join(f"- {name}: `{value}`" for name, value in self.made_with.items())
        return (
            f"## How many ODE steps\n\n{self.recommendation}\n\n{markdown_table(self.rows)}\n\n"
            f"Flow error is the RMS distance to the reference policy's fine solution on the same noise, in standard "
            f"deviations of the actions (the reference itself is good to {self.reference_rmse:.1g}); spread is the "
            f"variance over noises relative to it; action error is against the recording, in the robot's units. "
            f"{WHY_FLOW_ERROR_LEADS}\n\n{made}\n"
        )


COLUMNS = (
    ("policy", lambda r: r.policy),
    ("steps", lambda r: str(r.num_steps)),
    ("flow error", lambda r: f"{r.flow_rmse:.4f}"),
    ("own flow error", lambda r: f"{r.own_flow_rmse:.4f}"),
    ("spread", lambda r: f"{r.spread_ratio:.3f}"),
    ("straightness", lambda r: f"{r.straightness:.4f}"),
    ("action error", lambda r: f"{r.action_mae:.4g}"),
    ("latency", lambda r: f"{r.latency_ms_p50:.1f} ms"),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
)


def table(rows: Sequence[Row]) -> str:
    """Aligned text for a terminal."""
    cells = [[title for title, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same in Markdown."""
    cells = [
        [title for title, _ in COLUMNS],
        ["---"] * len(COLUMNS),
        *([s(row) for _, s in COLUMNS] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def draw(report: Report, file: Path) -> None:
    """Flow error over steps, one line per policy, with the recommended point marked; readable in a paper column."""
    figure = Figure(figsize=(COLUMN_WIDTH_INCHES, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name in dict.fromkeys(row.policy for row in report.rows):
        rows = [row for row in report.rows if row.policy == name]
        colour, marker = STYLES[name]
        axis.plot(
            [r.num_steps for r in rows],
            [r.flow_rmse for r in rows],
            color=colour,
            marker=marker,
            ms=4,
            lw=1.2,
            label=name,
        )
    for row in report.rows:
        if row.policy == report.rows[-1].policy and row.num_steps == report.recommended_num_steps:
            label = f"recommended: {row.num_steps}, {row.speedup:.1f}x as fast"
            axis.plot(row.num_steps, row.flow_rmse, "o", ms=11, mfc="none", mec="black", mew=1.0, ls="", label=label)
    steps = sorted({row.num_steps for row in report.rows})
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("ODE steps", fontsize=8)
    axis.set_ylabel("flow error (standard deviations)", fontsize=8)
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3, lw=0.5)
    axis.legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=300)
