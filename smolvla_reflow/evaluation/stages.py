"""The stages of an evaluation: frames, latencies, episodes; each part of one is noted as soon as it is finished.

frames      measure_batch      the metrics of every policy and number of steps, batch by batch
latency     measure_latency    of every policy and number of steps, and of the parts of a chunk
episodes    drive              of every policy and number of steps, where an environment was named
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor

from smolvla_reflow.dataset import load_batches
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.journal import Journal
from smolvla_reflow.evaluation.latency import ChunkParts, Latency, measure_latency, measure_parts, pace
from smolvla_reflow.evaluation.measure import Cell, Evaluation, Measured, Settings, cells, evaluation_of, measure_batch
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.progress import Progress, progress
from smolvla_reflow.evaluation.success import Success


@dataclass(frozen=True)
class Found:
    """What has been measured so far.

    Attributes:
        evaluation: of the frames, and of what else is finished.
        chunk_parts: of the judged policy's latency.
        complete: whether nothing is left to measure.
    """

    evaluation: Evaluation
    chunk_parts: ChunkParts | None = None
    complete: bool = False


# Yields what has been found after each part, and returns the last of it.
Stage: TypeAlias = Generator[Found, None, Found]


@dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
        cfg: checked.
        policies: the reference policy first, the judged one last.
        frames: the dataset, each frame with its recorded chunk.
        positions: in it, of the frames to measure on.
        action_std: (D,) standard deviations of its actions.
        journal: of the parts that are finished.
    """

    cfg: EvalConfig
    policies: Sequence[MeasuredPolicy]
    frames: LeRobotDataset
    positions: Sequence[int]
    action_std: Tensor
    journal: Journal

    def policy(self, name: str) -> MeasuredPolicy:
        """The policy of this name."""
        return next(policy for policy in self.policies if policy.name == name)

    @property
    def table(self) -> list[Cell]:
        """Every policy and number of steps."""
        return cells(self.policies, self.cfg.num_steps)

    @property
    def batches(self) -> list[Sequence[int]]:
        """The positions, some at once."""
        size = self.cfg.batch_size
        return [self.positions[i : i + size] for i in range(0, len(self.positions), size)]

    @property
    def timed(self) -> dict[Cell, Cell]:
        """For each policy and number of steps the one whose latency is measured: the first that takes as long."""
        first: dict[Any, Cell] = {}
        return {cell: first.setdefault((pace(self.policy(cell.policy)), cell.num_steps), cell) for cell in self.table}

    @property
    def driven(self) -> list[Cell]:
        """Every policy and number of steps that is to run episodes."""
        return self.table if self.cfg.env is not None else []


def measure_all(work: Work) -> Iterator[Found]:
    """Measure everything that is to be measured; yields what there is after each part."""
    latencies = len(set(work.timed.values())) + 1
    parts = {"frames": len(work.batches), "latency": latencies, "episodes": len(work.driven)}
    with progress(parts) as bar:
        found = yield from _frames(work, bar)
        found = yield from _latencies(work, found, bar)
        found = yield from _episodes(work, found, bar)
    yield replace(found, complete=True)


def _frames(work: Work, bar: Progress) -> Stage:
    cfg = work.cfg
    settings = Settings(work.action_std, cfg.num_steps, cfg.num_noises, cfg.reference_steps, cfg.seed)
    by_name = {f"frames {batch[0]} to {batch[-1]}": batch for batch in work.batches}
    loaded = load_batches(work.frames, [batch for name, batch in by_name.items() if name not in work.journal.parts])
    finished: list[Measured] = []

    def measure() -> dict[str, Any]:
        references = finished[0].references if finished else None
        return measure_batch(work.policies, next(loaded), settings, references).as_json()

    for name in by_name:
        finished.append(Measured.from_json(_part("frames", name, measure, work.journal, bar)))
        found = Found(evaluation_of(work.policies, finished, cfg.seed))
        yield found
    return found


def _latencies(work: Work, found: Found, bar: Progress) -> Stage:
    (frame,) = load_batches(work.frames, [work.positions[:1]])
    timed: dict[Cell, Latency] = {}
    for cell, like in work.timed.items():
        if like not in timed:
            policy = work.policy(like.policy)

            def measure(policy: MeasuredPolicy = policy, num_steps: int = like.num_steps) -> dict[str, Any]:
                return asdict(measure_latency(policy, frame, num_steps))

            name = f"latency of the {like.policy} at num_steps={like.num_steps}"
            timed[like] = Latency(**_part("latency", name, measure, work.journal, bar))
        latencies = {**found.evaluation.latencies, cell: timed[like]}
        found = replace(found, evaluation=replace(found.evaluation, latencies=latencies))
        yield found
    judged = work.policies[-1]
    parts = _part("latency", "parts of a chunk", lambda: asdict(measure_parts(judged, frame)), work.journal, bar)
    found = replace(found, chunk_parts=ChunkParts(**parts))
    yield found
    return found


def _episodes(work: Work, found: Found, bar: Progress) -> Stage:
    cfg = work.cfg
    for cell in work.driven:
        assert cfg.env is not None
        policy = work.policy(cell.policy)
        policy = replace(policy, postprocessor=_with_a_tick(policy.postprocessor, bar))

        def count(policy: MeasuredPolicy = policy, num_steps: int = cell.num_steps) -> dict[str, Any]:
            return asdict(Success.count(drive(policy, cfg.env, cfg.eval, num_steps, cfg.seed, cfg.env_task)))

        name = f"episodes of the {cell.policy} at num_steps={cell.num_steps}"
        counted = Success(**_part("episodes", name, count, work.journal, bar))
        successes = {**found.evaluation.successes, cell: counted}
        found = replace(found, evaluation=replace(found.evaluation, successes=successes))
        yield found
    return found


def _part(kind: str, name: str, measure: Callable[[], Any], journal: Journal, bar: Progress) -> Any:
    """What a part gives, now or before."""
    if name in journal.parts:
        bar.skip(kind)
        return journal.parts[name]
    return bar.run(kind, name, lambda: journal.recall(name, measure))


def _with_a_tick(process: Callable[[Any], Any], bar: Progress) -> Callable[[Any], Any]:
    """A processor that lets the bar know of the time that passes in an episode."""

    def ticking(given: Any) -> Any:
        bar.tick()
        return process(given)

    return ticking
