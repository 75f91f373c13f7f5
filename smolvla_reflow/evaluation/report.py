"""The report of an evaluation: a table, `report.json`, `report.md` for a model card, `report.png` for a paper."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import write_whole
from smolvla_reflow.evaluation.decision import Decision
from smolvla_reflow.evaluation.intervals import Interval
from smolvla_reflow.evaluation.latency import ChunkParts
from smolvla_reflow.evaluation.measure import Row
from smolvla_reflow.evaluation.picture import draw
from smolvla_reflow.evaluation.reference import Reference
from smolvla_reflow.evaluation.success import Success
from smolvla_reflow.evaluation.two_errors import TwoErrors

SCHEMA_VERSION = 2
NAMES = ("report.json", "report.md", "report.png")

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
        draw(self.rows, self.decision, folder / "report.png")

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
    ("best reward", lambda r: "" if r.success is None else f"{r.success.best_reward:.3f}"),
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
    """The table's titles and rows as text, without some columns, and those that say nothing in any row."""
    if all(row.success is None or row.success.best_reward == row.success.rate for row in rows):
        left_out = [*left_out, "best reward"]  # 1 for a success and 0 otherwise
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
