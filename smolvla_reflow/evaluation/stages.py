"""An evaluation in parts, each kept in the journal as soon as it is finished.

frames      measure_batch      of every policy and number of steps, batch by batch
latency     measure_rounds     of every policy and number of steps, in turn
episodes    drive              of every policy and number of steps, if there is an environment
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor
from tqdm import tqdm

from smolvla_reflow.compat import control_frequency
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.frames import Seen
from smolvla_reflow.evaluation.journal import Journal
from smolvla_reflow.evaluation.late import Delay, LateChunks, aggregation, chunk_time
from smolvla_reflow.evaluation.latency import ChunkTime, Rounds, measure_rounds, pace
from smolvla_reflow.evaluation.measure import Cell, Settings, cells, measure_batch
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.success import Driven, Episodes

LATENCY = "latency"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, finished or not."""

    cfg: EvalConfig
    policies: Sequence[MeasuredPolicy]  # the reference policy first, the judged policy last
    load: Callable[[Sequence[Sequence[int]]], Iterator[dict[str, Any]]]  # raw batches of frames and recorded chunks
    positions: Sequence[int]  # of the frames to measure on
    action_std: Tensor  # (D,) standard deviations of the actions, 0 for dimensions that never move
    journal: Journal
    rtc_config: RTCConfig | None  # real-time chunking in the judged checkpoint
    seen: Seen  # the episodes that the frames are from
    one_step_only: bool  # True if the judged policy was trained for one step alone
    warnings: Sequence[str]  # for the report's notes

    @property
    def bar(self) -> Cell:
        """The reference policy at its own number of steps, to compare the others with."""
        return Cell(self.policies[0].name, self.policies[0].num_steps)

    @property
    def cells(self) -> list[Cell]:
        """Every policy and number of steps."""
        return cells(self.policies, self.cfg.num_steps)

    @property
    def is_complete(self) -> bool:
        """True if no part is left."""
        return self.parts().keys() == self.journal.parts.keys()

    def table(self) -> pd.DataFrame:
        """The metrics on the frames that are finished, as of `measure_batch`."""
        finished = [self.journal.parts[name] for name in self._batches() if name in self.journal.parts]
        return pd.DataFrame([row for rows in finished for row in rows])

    def chunk_times(self) -> dict[str, ChunkTime]:
        """The time of a chunk by policy, once it is measured."""
        if LATENCY not in self.journal.parts:
            return {}
        timed, paces = self._timed(), list(self._timed())
        rounds = Rounds(*self.journal.parts[LATENCY])
        fits = [ChunkTime.fit(timed[of], times, rounds.load) for of, times in zip(paces, rounds.times, strict=True)]
        return {policy.name: fits[paces.index(pace(policy))] for policy in self.policies}

    def delays(self) -> dict[Cell, Delay]:
        """The delay of each policy's chunks in the simulator, once its time is known; none without --latency_ms."""
        cfg, times = self.cfg, self.chunk_times()
        if cfg.latency_ms is None or cfg.env is None or not times:
            return {}
        fps, of = control_frequency(cfg.env), {name: chunk_time(cfg.latency_ms, time) for name, time in times.items()}
        return {cell: Delay.of(of[cell.policy].p50(cell.num_steps), fps) for cell in self.cells}

    def driven(self) -> dict[Cell, Driven]:
        """The episodes that were driven, of each policy and number of steps."""
        parts, names = self.journal.parts, {cell: _episodes_of(cell) for cell in self.cells}
        found = {cell: parts[name] for cell, name in names.items() if name in parts}
        return {cell: {task: Episodes(*each) for task, each in tasks.items()} for cell, tasks in found.items()}

    def measure(self) -> Iterator[None]:
        """Run the unfinished parts under one progress bar; yields after each part."""
        total, finished = len(self.parts()), len(self.journal.parts)
        bar = tqdm(total=total, initial=finished, unit="part", leave=False, mininterval=0.5, miniters=0)
        with bar:
            for name, part in self.parts(tick=lambda: bar.update(0)).items():
                if name not in self.journal.parts:
                    bar.set_description_str(name)
                    with contextlib.redirect_stderr(io.StringIO()):  # LeRobot's own bars
                        self.journal.recall(name, part)
                    bar.update()
                    yield

    def parts(self, tick: Callable[[], object] = lambda: None) -> dict[str, Callable[[], Any]]:
        """Every part by name, in order; `tick` is called at each step of an episode."""
        parts: dict[str, Callable[[], Any]] = {}
        for name, positions in self._batches().items():
            parts[name] = partial(self._measure, positions)
        parts[LATENCY] = self._time
        for cell in self.cells if self.cfg.env is not None else ():
            parts[_episodes_of(cell)] = partial(self._drive, cell, tick)
        return parts

    def _measure(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        cfg, (batch,) = self.cfg, self.load([positions])
        settings = Settings(self.action_std, cfg.num_steps, cfg.num_noises, cfg.reference_steps, cfg.seed)
        is_first = positions[0] == self.positions[0]
        return measure_batch(self.policies, batch, settings, check_fine=is_first).to_dict("records")

    def _time(self) -> Rounds:
        """The times by pace, in place of policy."""
        (frame,) = self.load([self.positions[:1]])
        first = {pace(policy): policy for policy in reversed(self.policies)}
        timed = self._timed()
        return measure_rounds([(first[of], numbers) for of, numbers in timed.items()], frame)

    def _drive(self, cell: Cell, tick: Callable[[], object]) -> Driven:
        cfg, policy = self.cfg, self._policy(cell)
        assert cfg.env is not None

        def ticking(action: Tensor) -> Tensor:
            tick()
            return policy.postprocessor(action)

        ticked = replace(policy, postprocessor=ticking)
        delay = self.delays().get(cell)
        late = None
        if delay is not None:
            late = LateChunks(policy.policy, delay.steps, aggregation(cfg.aggregate_fn_name))
        return drive(ticked, cfg.env, cfg.eval, cell.num_steps, cfg.seed, cfg.env_task, late)

    def _policy(self, cell: Cell) -> MeasuredPolicy:
        return next(policy for policy in self.policies if policy.name == cell.policy)

    def _batches(self) -> dict[str, Sequence[int]]:
        """Positions of the frames that are measured at once, by the part's name."""
        size = self.cfg.batch_size
        batches = [self.positions[i : i + size] for i in range(0, len(self.positions), size)]
        return {f"frames {batch[0]} to {batch[-1]}": batch for batch in batches}

    def _timed(self) -> dict[tuple[str, ...], list[int]]:
        """The numbers of steps to time, at least two, for each pace; policies of the same pace are equally fast."""
        numbers: dict[tuple[str, ...], set[int]] = {}
        for policy in self.policies:
            its = {cell.num_steps for cell in self.cells if cell.policy == policy.name}
            numbers.setdefault(pace(policy), set()).update(its)
        return {of: sorted(its if len(its) > 1 else {*its, max(its) + 1}) for of, its in numbers.items()}


def _episodes_of(cell: Cell) -> str:
    return f"episodes of the {cell.policy} at num_steps={cell.num_steps}"
