"""The stages of an evaluation: frames, latencies, episodes; each part of one is noted as soon as it is finished.

frames      measure_batch      the metrics of every policy and number of steps, batch by batch
latency     measure_latency    of every policy and number of steps, and of the parts of a chunk
episodes    success_rate       of every policy and number of steps, where an environment was named
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.evaluation.closed_loop import success_rate
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.frames import load_frames
from smolvla_reflow.evaluation.journal import Journal
from smolvla_reflow.evaluation.latency import ChunkParts, Latency, measure_latency, measure_parts
from smolvla_reflow.evaluation.measure import Cell, Evaluation, Measured, Settings, cells, evaluation_of, measure_batch
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.progress import Progress, progress
from smolvla_reflow.evaluation.success import Success
from smolvla_reflow.smolvla.statistics import moving_deviations


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


def measure_all(
    cfg: EvalConfig,
    policies: Sequence[MeasuredPolicy],
    metadata: LeRobotDatasetMetadata,
    positions: Sequence[int],
    journal: Journal,
) -> Iterator[Found]:
    """Measure everything that was asked for; yields what there is after each part.

    Args:
        cfg: checked.
        policies: the reference policy first, the judged one last.
        metadata: of the dataset.
        positions: of the frames to measure on.
        journal: of the parts that are finished.
    """
    batches = [positions[i : i + cfg.batch_size] for i in range(0, len(positions), cfg.batch_size)]
    table = cells(policies, cfg.num_steps)
    driven = table if cfg.env is not None else []
    with progress({"frames": len(batches), "latency": len(table) + 1, "episodes": len(driven)}) as bar:
        found = yield from _frames(cfg, policies, metadata, batches, journal, bar)
        found = yield from _latencies(cfg, policies, positions, table, found, journal, bar)
        found = yield from _episodes(cfg, policies, driven, found, journal, bar)
    yield replace(found, complete=True)


def _frames(
    cfg: EvalConfig,
    policies: Sequence[MeasuredPolicy],
    metadata: LeRobotDatasetMetadata,
    batches: Sequence[Sequence[int]],
    journal: Journal,
    bar: Progress,
) -> Stage:
    settings = Settings(
        action_std=moving_deviations(metadata.stats["action"]),
        num_steps=cfg.num_steps,
        num_noises=cfg.num_noises,
        reference_steps=cfg.reference_steps,
        seed=cfg.seed,
    )
    names = [f"frames {batch[0]} to {batch[-1]}" for batch in batches]
    to_load = [batch for name, batch in zip(names, batches, strict=True) if name not in journal.parts]
    loaded = frames_at(cfg, policies, [position for batch in to_load for position in batch], cfg.batch_size)
    finished: list[Measured] = []
    for name in names:

        def measure() -> dict[str, Any]:
            references = finished[0].references if finished else None
            return measure_batch(policies, next(loaded), settings, references).as_json()

        finished.append(Measured.from_json(_part("frames", name, measure, journal, bar)))
        found = Found(evaluation_of(policies, finished, cfg.seed))
        yield found
    return found


def _latencies(
    cfg: EvalConfig,
    policies: Sequence[MeasuredPolicy],
    positions: Sequence[int],
    table: Sequence[Cell],
    found: Found,
    journal: Journal,
    bar: Progress,
) -> Stage:
    (frame,) = frames_at(cfg, policies, positions[:1], 1)
    by_name = {policy.name: policy for policy in policies}
    for cell in table:
        name = f"latency of the {cell.policy} at num_steps={cell.num_steps}"
        timed = _part(
            "latency",
            name,
            lambda cell=cell: asdict(measure_latency(by_name[cell.policy], frame, cell.num_steps)),  # type: ignore[misc]
            journal,
            bar,
        )
        latencies = {**found.evaluation.latencies, cell: Latency(**timed)}
        found = replace(found, evaluation=replace(found.evaluation, latencies=latencies))
        yield found
    parts = _part("latency", "parts of a chunk", lambda: asdict(measure_parts(policies[-1], frame)), journal, bar)
    found = replace(found, chunk_parts=ChunkParts(**parts))
    yield found
    return found


def _episodes(
    cfg: EvalConfig,
    policies: Sequence[MeasuredPolicy],
    driven: Sequence[Cell],
    found: Found,
    journal: Journal,
    bar: Progress,
) -> Stage:
    by_name = {policy.name: policy for policy in policies}
    for cell in driven:
        policy = by_name[cell.policy]
        assert cfg.env is not None

        def drive(policy: MeasuredPolicy = policy, num_steps: int = cell.num_steps) -> dict[str, Any]:
            ticking = replace(policy, postprocessor=_with_a_tick(policy.postprocessor, bar))
            return asdict(success_rate(ticking, cfg.env, cfg.eval, num_steps, cfg.seed, cfg.env_task))

        name = f"episodes of the {cell.policy} at num_steps={cell.num_steps}"
        counted = Success(**_part("episodes", name, drive, journal, bar))
        successes = {**found.evaluation.successes, cell: counted}
        found = replace(found, evaluation=replace(found.evaluation, successes=successes))
        yield found
    return found


def frames_at(
    cfg: EvalConfig, policies: Sequence[MeasuredPolicy], positions: Sequence[int], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Raw batches of the frames at these positions."""
    if not positions:
        return iter(())
    chunk_size = policies[0].policy.config.chunk_size
    return load_frames(
        cfg.dataset, positions, chunk_size=chunk_size, batch_size=batch_size, tolerance_s=cfg.tolerance_s
    )


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
