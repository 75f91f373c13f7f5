"""What latency costs on PushT: the coverage of teacher and student over the delay of their chunks.

    python examples/studies/latency.py --study=outputs/study_pusht --student=steps-1000-lr-5e-4-batch_size-64

A chunk is there `delay` control steps (of 100 ms) after its observation. Its first `delay` actions are dropped, and the
robot meanwhile executes the rest of the chunk before (`smolvla_reflow/evaluation/late.py`). The study is a folder of
`recipes.py --pusht_root=...`, with a teacher and a student for each seed. Finished blocks of starts are kept in
`latency.json` beside the teacher, so an interrupted command goes on, and more starts can be added.

The picture has the coverage over the time of one ODE step on the robot. Encoding images, language and state takes as
long as `--prefix` such steps, once for each chunk.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import draccus
import numpy as np
import torch
from lerobot.configs.default import EvalConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import markdown
from torch import Tensor
from tqdm import tqdm

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.intervals import Interval, over_episodes
from smolvla_reflow.evaluation.late import LATEST, LateChunks, aggregation
from smolvla_reflow.evaluation.policy import MeasuredPolicy, load_measured_policy

sys.path.append(str(Path(__file__).parents[1]))
from pusht.environment import PushTPoseConfig

BLOCK = 100  # starts that are driven at once
FIRST_START, STARTS_OF_A_SEED = 1000, 10  # seeds are at least 100 apart, so that no two share a start
HORIZON = 8  # control steps over which real-time chunking guides
NAME = "latency.json"
# Milliseconds of a chunk of SmolVLA in ten steps: on an H200 as measured (see the benchmarks), on a Mac as the authors
# of mlx-smolvla 0.1.2 say. Two CPU cores take 4876, which is beyond the axis.
MACHINES = {"H200, PyTorch": 203, "Apple M5 Pro, MLX (by its author)": 111}


class Run(NamedTuple):
    """A policy at a number of steps, with its delays, in control steps."""

    policy: str
    num_steps: int
    delays: tuple[int, ...]
    colour: str = ""
    guided: float | None = None  # largest weight of the guidance towards the chunk before (real-time chunking)
    mixed: str = LATEST  # what the robot does with two chunks' actions for one control step
    executed: int = 8  # actions of each chunk

    def __str__(self) -> str:
        guidance = "" if self.guided is None else f", guided ({self.guided:g})"
        mixture = "" if self.mixed == LATEST else f", {self.mixed}"
        replanning = "" if self.executed == 8 else f", {self.executed} executed"
        return f"{self.policy}, {self.num_steps} step{'s' * (self.num_steps > 1)}{guidance}{mixture}{replanning}"


IN_TIME = Run("teacher", 1, (0,))  # without delay only
RUNS = (
    Run("teacher", 10, (0, 2, 4, 6, 8), "#D55E00"),
    Run("student", 1, (0, 1, 2, 4, 6, 8), "#0072B2"),
    Run("student", 2, (0, 2, 4, 8), "#56B4E9"),
)
CLIENTS = (
    Run("teacher", 10, (2, 4), mixed="weighted_average"),
    Run("student", 1, (1, 2), mixed="weighted_average"),
    Run("student", 2, (2,), mixed="weighted_average"),
    Run("teacher", 10, (4, 8), guided=10.0),
    Run("student", 2, (2, 4), guided=10.0),
    Run("student", 2, (2, 4), guided=2.0),
    Run("student", 1, (2, 4), guided=1.0),
    Run("teacher", 10, (0,), executed=4),
    Run("student", 1, (0,), executed=4),
    Run("teacher", 10, (0,), mixed="weighted_average", executed=4),
    Run("student", 1, (0,), mixed="weighted_average", executed=4),
    Run("teacher", 10, (0,), guided=10.0, executed=4),
    Run("student", 1, (0,), guided=1.0, executed=4),
)


class GuidedChunks(LateChunks):
    """Chunks that LeRobot guides towards what is left of the chunk before (RTC, arXiv 2506.07339)."""

    def next_chunk(self, batch: dict[str, Any]) -> Tensor:
        """The chunk of an observation, given the actions that are executed until the chunk is there."""
        left = None if self.current is None else self.current[1][:, self.clock - self.current[0] :]
        with torch.inference_mode(False):  # LeRobot evaluates in this mode, and guidance needs a gradient
            return self.policy.predict_action_chunk(batch, inference_delay=self.delay, prev_chunk_left_over=left)


@dataclass
class LatencyConfig:
    study: Path
    """Folder of `recipes.py --pusht_root=...`."""
    student: str
    """Name of the student's folder for each seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 100, 200])
    """Seeds of the study."""
    starts: int = 200
    """Starts for each seed and delay."""
    starts_in_time: int = 400
    """Starts for each seed without delay, where teacher and student differ least."""
    clients: bool = False
    """Measure other clients as well: mixed chunks, real-time chunking, and chunks that are replaced earlier."""
    prefix: float = 1.76
    """Time of the prefix, in ODE steps. An NVIDIA H200 takes 30.4 ms and 17.3 ms."""
    picture: Path | None = None
    """PNG to draw."""


def measure(cfg: LatencyConfig) -> dict[str, np.ndarray]:
    """Best coverage by cell, (seeds, starts); drives what is missing."""
    found = [of_seed(cfg, seed) for seed in cfg.seeds]
    return {cell: np.array([of[cell] for of in found]) for cell in found[0]}


def of_seed(cfg: LatencyConfig, seed: int) -> dict[str, list[float]]:
    """Best coverage of each start by cell, for the policies of one seed."""
    folder = cfg.study / f"seed-{seed}"
    file = folder / NAME
    kept: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    policies = {
        name: load_measured_policy(name, open_checkpoint(str(folder / place)), "cpu", {})
        for name, place in (("teacher", "teacher"), ("student", cfg.student))
    }
    cells = [(run, delay) for run in (*RUNS, IN_TIME, *(CLIENTS if cfg.clients else ())) for delay in run.delays]
    found = {}
    for run, delay in tqdm(cells, desc=f"seed {seed}"):
        coverage = kept.setdefault(cell_of(run, delay), [])
        starts = cfg.starts_in_time if run in (*RUNS, IN_TIME) and not delay else cfg.starts
        while len(coverage) < starts:
            first = FIRST_START + STARTS_OF_A_SEED * seed + len(coverage)
            coverage += best_coverage(policies[run.policy], run, delay, first)
            file.write_text(json.dumps(kept) + "\n")
        found[cell_of(run, delay)] = coverage[:starts]
    return found


def best_coverage(policy: MeasuredPolicy, run: Run, delay: int, first: int) -> list[float]:
    """The best coverage of each drive of a block of starts."""
    config = policy.policy.config
    config.n_action_steps = run.executed
    if run.guided is not None:
        config.rtc_config = RTCConfig(enabled=True, max_guidance_weight=run.guided, execution_horizon=HORIZON)
    policy.policy.init_rtc_processor()
    chunks = LateChunks if run.guided is None else GuidedChunks
    late = chunks(policy.policy, delay, aggregation(run.mixed))
    # Up to a delay of half a chunk, observations are taken at the same control steps as without delay.
    env = PushTPoseConfig(image_every=run.executed)
    settings = EvalConfig(n_episodes=BLOCK, batch_size=BLOCK, use_async_envs=False)
    try:
        (driven,) = drive(policy, env, settings, run.num_steps, first, late=late).values()
    finally:
        config.rtc_config = None
    return driven.best_rewards


def cell_of(run: Run, delay: int) -> str:
    """The name of a run at a delay."""
    return f"{run}, delay {delay}"


def difference(found: dict[str, np.ndarray], one: str, other: str) -> Interval:
    """Mean of one cell's coverage less another's, with a 95 % interval over pairs of the same start."""
    count = min(found[one].shape[1], found[other].shape[1])
    pairs = (found[one][:, :count] - found[other][:, :count]).flatten()
    return over_episodes(pairs, range(len(pairs)), seed=0)


def report(found: dict[str, np.ndarray], prefix: float) -> str:
    """Coverage by delay, the student's gain where it is less late than its teacher, and what other clients gain."""
    delays = sorted({delay for run in RUNS for delay in run.delays})
    lines = []
    for run in (*RUNS, IN_TIME):
        means = {d: f"{found[cell_of(run, d)].mean():.3f}" for d in run.delays}
        lines.append([str(run), *(means.get(d, "") for d in delays)])
    teacher, one, two = RUNS
    gains = []
    for late in teacher.delays:
        for run in (one, two):
            share = (prefix + run.num_steps) / (prefix + teacher.num_steps)
            own = min(d for d in run.delays if d >= late * share)
            gain = difference(found, cell_of(run, own), cell_of(teacher, late))
            gains.append(
                [f"{late}", f"{run.num_steps}", f"{own}", f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"]
            )
    loss = difference(found, cell_of(IN_TIME, 0), cell_of(teacher, 0))
    gains.append(["0", "teacher, 1", "0", f"{loss.value:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})"])
    titles = ["teacher's delay", "student's steps", "its delay", "student's coverage less the teacher's"]
    tables = [markdown(["delay, in control steps", *map(str, delays)], lines), markdown(titles, gains)]
    if clients := by_client(found):
        tables.append(markdown(["client", "delay", "coverage", "less the usual client's"], clients))
    return "\n\n".join(tables)


def by_client(found: dict[str, np.ndarray]) -> list[list[str]]:
    """Rows with the coverage of each other client and its gain over the usual one, or over 8 executed actions."""
    rows = []
    for run in CLIENTS:
        usual = run._replace(guided=None, mixed=LATEST)
        usual = usual._replace(executed=8) if usual == run else usual
        for delay in run.delays:
            cell = cell_of(run, delay)
            if cell in found:
                gain = difference(found, cell, cell_of(usual, delay))
                shown = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
                rows.append([str(run), str(delay), f"{found[cell].mean():.3f}", shown])
    return rows


def draw(found: dict[str, np.ndarray], prefix: float, file: Path) -> None:
    """Coverage over the time of an ODE step on the robot."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps = np.geomspace(4.0, 100.0, 400)
    for run in RUNS:
        late = (prefix + run.num_steps) * steps / 100  # in control steps of 100 ms
        coverage = [found[cell_of(run, d)].mean() for d in run.delays]
        errors = [found[cell_of(run, d)].std() / math.sqrt(found[cell_of(run, d)].size) for d in run.delays]
        shown = late <= run.delays[-1]
        mean, error = (np.interp(late[shown], run.delays, values) for values in (coverage, errors))
        axis.plot(steps[shown], mean, color=run.colour, label=str(run))
        axis.fill_between(steps[shown], mean - 2 * error, mean + 2 * error, color=run.colour, alpha=0.15, lw=0)
    ten = prefix + 10
    for name, ms in MACHINES.items():
        axis.axvline(ms / ten, color="0.5", lw=0.8, ls=":")
        axis.annotate(name, (ms / ten, 0.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, ha="right")
    axis.set_xscale("log")
    above = axis.secondary_xaxis("top", functions=(lambda step: ten * step, lambda chunk: chunk / ten))
    for one, ticks in ((axis, (3, 5, 10, 20, 50, 100)), (above, (50, 100, 200, 400, 800))):
        one.set_xticks(ticks, [str(tick) for tick in ticks])
        one.set_xticks([], minor=True)
    axis.set(xlabel="time of one ODE step on the robot (ms)", ylabel="coverage in PushT")
    above.set_xlabel("time of a chunk in ten steps (ms)", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.grid(alpha=0.3, lw=0.5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main(cfg: LatencyConfig) -> None:
    """Drive, print and draw."""
    found = measure(cfg)
    print(report(found, cfg.prefix))
    if cfg.picture is not None:
        draw(found, cfg.prefix, cfg.picture)


if __name__ == "__main__":
    main(draccus.parse(LatencyConfig))
