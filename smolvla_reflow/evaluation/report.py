"""The report of an evaluation: a table, `report.json`, `report.md` for a model card, `report.png` for a paper."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import write_json, write_whole
from smolvla_reflow.evaluation.decision import Decision
from smolvla_reflow.evaluation.frames import Seen
from smolvla_reflow.evaluation.intervals import Interval
from smolvla_reflow.evaluation.latency import ChunkTime, left_to_gain
from smolvla_reflow.evaluation.measure import Row
from smolvla_reflow.evaluation.picture import draw
from smolvla_reflow.evaluation.success import Success
from smolvla_reflow.evaluation.two_errors import TwoErrors

NAMES = ("report.json", "report.md", "report.png")
# Fine solutions are called out if their own error is above this share of the smallest flow error.
COARSE = 0.2

# The settings that a model card names; report.json has all.
MADE_WITH = {
    *("dataset.repo_id", "num_frames", "num_noises", "reference_steps", "bar_num_steps", "seed", "policy.device"),
    *("success_margin", "reward_margin", "energy_margin", "env.type", "env.task", "env_task", "eval.n_episodes"),
}

COLUMNS_IN_WORDS = (
    "Energy distance compares the distribution of the actions with that of the reference policy's fine solutions: a "
    "robot does not care which noise becomes which of the good ways. Flow error compares them noise by noise. Spread "
    "is the variance over noises, relative to the reference's. Both explain a gap. Action error compares with one "
    "recording for each frame, so averaging the ways of doing a task gives as small an action error as choosing a way."
)


@dataclass(frozen=True)
class Report:
    """The content of `report.json`."""

    rows: list[Row]  # for each policy and number of steps, see `smolvla_reflow.evaluation.measure.summary`
    recommended_num_steps: int | None  # the smallest number that is enough, or None
    recommendation: str  # the same in some sentences
    decision: Decision  # its evidence, see `smolvla_reflow.evaluation.decision.Decision`
    # by student, how its flow error depends on the number of steps, see
    # `smolvla_reflow.evaluation.two_errors.TwoErrors`; None for fewer than three numbers of steps
    two_errors: dict[str, TwoErrors | None]
    # how to reduce the judged policy's flow error, None if it need not be reduced, or nothing can be said
    advice: str | None
    # by policy, the rk4 "steps" of its fine solutions and their own error, "rmse"
    references: dict[str, Mapping[str, float]]
    # of the judged policy, see `smolvla_reflow.evaluation.latency.ChunkTime`; None until measured
    chunk_time: ChunkTime | None
    seen: Seen  # how many of the episodes the policies were trained on, see `smolvla_reflow.evaluation.frames.Seen`
    notes: list[str]  # warnings
    made_with: dict[str, Any]  # everything that the numbers depend on, see `smolvla_reflow.evaluation.key`
    complete: bool  # True if everything that was asked for is in it
    schema_version: int = 2  # of this file

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and report.png into a folder, made if needed. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", self)
        write_whole(folder / "report.md", self.markdown().encode())
        draw(self.rows, self.decision, self.seen, folder / "report.png")

    def sentences(self) -> list[str]:
        """The report in words, the recommendation first."""
        said = [] if self.complete else ["This report is unfinished: the same command goes on with it."]
        said += [self.recommendation, self.seen.in_words()]
        for policy, fit in self.two_errors.items():
            if fit is not None and fit.holds:
                said.append(
                    f"Flow error of the {policy} over the number of steps n: sqrt(r^2 + (c/n)^2) with r = {fit.r:.3f} "
                    f"and c = {fit.c:.3f}, to {fit.residual:.4f}."
                )
        if self.advice is not None:
            said.append(self.advice)
        if self.chunk_time is not None:
            said.append(left_to_gain(self.chunk_time, self.recommended_num_steps or self.decision.bar.num_steps))
        return [*said, self._fine_solutions(), *self.notes]

    def _fine_solutions(self) -> str:
        steps, error = (max(each[name] for each in self.references.values()) for name in ("steps", "rmse"))
        said = f"The fine solutions are by rk4 with {steps} steps. With half as many they change by {error:.1g}."
        if error <= COARSE * min(row["flow_rmse"] for row in self.rows):
            return said
        return f"{said} This is much beside the smallest flow error; give --reference_steps={2 * steps}."

    def markdown(self) -> str:
        """The report as a section of a model card."""
        made = "\n".join(
            f"- {name}: `{value}`"
            for name, value in self.made_with.items()
            if value is not None and (name in MADE_WITH or name.endswith("'s path") or name.startswith("version of"))
        )
        said = "\n\n".join(self.sentences())
        return (
            f"## How many ODE steps\n\n{said}\n\n{markdown_table(self.rows)}\n\n"
            f"Distances are in standard deviations of the actions, action error is in the robot's units. "
            f"{COLUMNS_IN_WORDS}\n\n{made}\n"
        )


EVERY_COLUMN: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("policy", lambda row: row["policy"]),
    ("steps", lambda row: str(row["num_steps"])),
    ("energy distance (95 % interval)", lambda row: as_interval(row["energy_distance"])),
    ("flow error", lambda row: f"{row['flow_rmse']:.4f}"),
    ("own flow error", lambda row: f"{row['own_flow_rmse']:.4f}"),
    ("spread", lambda row: f"{row['spread_ratio']:.3f}"),
    ("straightness", lambda row: f"{row['straightness']:.4f}"),
    ("delay", lambda row: "" if row["delay"] is None else row["delay"].in_words()),
    ("success (95 % interval)", lambda row: in_percent(row["success"])),
    ("best reward", lambda row: "" if row["success"] is None else f"{row['success'].best_reward:.3f}"),
    ("action error", lambda row: f"{row['action_mae']:.4g}"),
    ("latency", lambda row: "" if row["latency_ms_p50"] is None else f"{row['latency_ms_p50']:.1f} ms"),
    ("speed-up", lambda row: "" if row["speedup"] is None else f"{row['speedup']:.2f}x"),
)
DETAILS = ("own flow error", "straightness", "action error")


def as_interval(found: Interval | None) -> str:
    """A mean and its confidence interval as text, empty if there is none."""
    if found is None:
        return ""
    low, high = ("no bound" if end is None else f"{end:.4f}" for end in (found.low, found.high))
    return f"{found.value:.4f} ({low} to {high})"


def in_percent(success: Success | None) -> str:
    """The rate and its confidence interval as text."""
    return "" if success is None else f"{success.rate:.1%} ({success.low:.0%} to {success.high:.0%})"


def cells_of(rows: Sequence[Row], left_out: Collection[str] = ()) -> list[list[str]]:
    """The table's titles and rows as text, without the columns left out, or empty in every row."""
    driven = [row["success"] for row in rows if row["success"] is not None]
    if all(success.best_reward == success.rate for success in driven):
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
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *cells))
