"""An evaluation in parts, each kept in the journal as soon as it is finished.

frames      measure_batch      of every policy and number of steps, batch by batch
latency     measure_latency    of every policy and number of steps, and of the parts of a chunk
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

from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.journal import Journal
from smolvla_reflow.evaluation.latency import measure_latency, measure_parts, pace
from smolvla_reflow.evaluation.measure import Cell, Settings, cells, measure_batch
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.success import Success

PARTS_OF_A_CHUNK = "parts of a chunk"


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

    def latencies(self) -> dict[Cell, dict[str, float]]:
        """The latencies that are measured, of each policy and number of steps."""
        return self._finished({cell: _latency_of(like) for cell, like in self._timed().items()})

    def successes(self) -> dict[Cell, Success]:
        """The successes that are counted, of each policy and number of steps."""
        counted = self._finished({cell: _episodes_of(cell) for cell in self.cells})
        return {cell: Success(**success) for cell, success in counted.items()}

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
        for cell in dict.fromkeys(self._timed().values()):
            parts[_latency_of(cell)] = partial(self._time, cell)
        parts[PARTS_OF_A_CHUNK] = self._time_parts
        for cell in self.cells if self.cfg.env is not None else ():
            parts[_episodes_of(cell)] = partial(self._drive, cell, tick)
        return parts

    def _measure(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        cfg, (batch,) = self.cfg, self.load([positions])
        settings = Settings(self.action_std, cfg.num_steps, cfg.num_noises, cfg.reference_steps, cfg.seed)
        is_first = positions[0] == self.positions[0]
        return measure_batch(self.policies, batch, settings, check_fine=is_first).to_dict("records")

    def _time(self, cell: Cell) -> dict[str, float]:
        (frame,) = self.load([self.positions[:1]])
        return measure_latency(self._policy(cell), frame, cell.num_steps)

    def _time_parts(self) -> dict[str, float]:
        (frame,) = self.load([self.positions[:1]])
        return measure_parts(self.policies[-1], frame)

    def _drive(self, cell: Cell, tick: Callable[[], object]) -> Success:
        cfg, policy = self.cfg, self._policy(cell)
        assert cfg.env is not None

        def ticking(action: Tensor) -> Tensor:
            tick()
            return policy.postprocessor(action)

        ticked = replace(policy, postprocessor=ticking)
        return Success.count(drive(ticked, cfg.env, cfg.eval, cell.num_steps, cfg.seed, cfg.env_task))

    def _policy(self, cell: Cell) -> MeasuredPolicy:
        return next(policy for policy in self.policies if policy.name == cell.policy)

    def _batches(self) -> dict[str, Sequence[int]]:
        """Positions of the frames that are measured at once, by the part's name."""
        size = self.cfg.batch_size
        batches = [self.positions[i : i + size] for i in range(0, len(self.positions), size)]
        return {f"frames {batch[0]} to {batch[-1]}": batch for batch in batches}

    def _timed(self) -> dict[Cell, Cell]:
        """For each policy and number of steps the first policy of the same pace, whose latency is measured."""
        first: dict[Any, Cell] = {}
        return {cell: first.setdefault((pace(self._policy(cell)), cell.num_steps), cell) for cell in self.cells}

    def _finished(self, parts: dict[Cell, str]) -> dict[Cell, Any]:
        return {cell: self.journal.parts[name] for cell, name in parts.items() if name in self.journal.parts}


def _latency_of(cell: Cell) -> str:
    return f"latency of the {cell.policy} at num_steps={cell.num_steps}"


def _episodes_of(cell: Cell) -> str:
    return f"episodes of the {cell.policy} at num_steps={cell.num_steps}"
