"""Measure policies on the same frames, from the same noise: one record per frame, one row per mean of the records.

    batch -> Solutions of each policy -> Record of each frame, policy and number of steps -> mean -> Row

All metrics but the action error are in units of each action dimension's standard deviation in the dataset. Every
policy's actions are first converted to the robot's units by its own statistics, so that policies which are normalised
differently can be compared. Of each batch only the records are kept, so memory holds some numbers for each frame.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from smolvla_reflow.distance import absolute_error, energy_distance, spread, squared_error
from smolvla_reflow.evaluation.intervals import Interval, over_frames
from smolvla_reflow.evaluation.latency import Latency
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.reference import Reference, solved_finely
from smolvla_reflow.evaluation.success import Success
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.solver import Solver


@dataclass(frozen=True)
class Settings:
    """What to measure, and how finely.

    Attributes:
        action_std: (D,) standard deviations of the recorded actions. Dimensions that never move, with 0, count in the
            action error alone.
        num_steps: numbers of Euler steps; each policy's own default and the reference policy's are measured as well.
        num_noises: noises for each frame, at least 2.
        reference_steps: rk4 steps of the fine solutions, at least 2; chosen on the first batch if None.
        seed: of the noise.
    """

    action_std: Tensor
    num_steps: Sequence[int]
    num_noises: int
    reference_steps: int | None
    seed: int

    def in_deviations(self, actions: Tensor) -> Tensor:
        """Actions (..., D) in the robot's units, in standard deviations of the dimensions that move."""
        return (actions / self.action_std)[..., self.action_std > 0]


@dataclass(frozen=True, slots=True)
class Record:
    """One policy at one number of steps on one frame: every metric as a number, averaged over the frame's noises.

    A new metric is a function in `metrics.py`, a field here, and a line in `frame_records`.

    Attributes:
        energy_distance: to the reference policy's fine solutions, of other noises.
        flow_error: squared distance to the reference policy's fine solution, of the same noise.
        own_flow_error: squared distance to the policy's own fine solution.
        spread: variance over the noises.
        fine_spread: the same of the fine solution.
        straightness: of the fine paths.
        action_error: absolute error of each action dimension, summed over the chunk's recorded steps.
        action_error_executed: the same, summed over the first `n_action_steps` of them.
        steps, steps_executed: how many steps these two are sums over.
    """

    energy_distance: float
    flow_error: float
    own_flow_error: float
    spread: float
    fine_spread: float
    straightness: float
    action_error: list[float]
    action_error_executed: list[float]
    steps: float
    steps_executed: float


@dataclass(frozen=True)
class Row:
    """One policy at one number of steps, over all frames.

    Attributes:
        policy: its name.
        num_steps: Euler steps of the stock sampler.
        energy_distance: between the distribution of its actions and that of the *reference policy's* fine solution, see
            `smolvla_reflow.distance.energy_distance`, with its interval over frames, in standard deviations. The
            reference policy is the teacher, or the only policy there is.
        flow_rmse: root mean square distance to the reference policy's fine solution from the same noise, in standard
            deviations.
        own_flow_rmse: the same to the policy's own fine solution: the error that comes from taking few steps, without
            the error that comes from training.
        action_mae: mean absolute error against the recorded actions over the chunk, in the robot's units.
        action_mae_executed: the same over the first of the policy's own `n_action_steps`, those the robot runs before
            it looks again.
        action_mae_per_dim: the same over the chunk, for each action dimension.
        spread_ratio: variance over noises, relative to that of the reference policy's fine solution.
        straightness: of the policy's paths, in squared standard deviations; 0 for straight ones.
        latency_ms_p50, latency_ms_p95: of one `predict_action_chunk` at batch size 1, median and 95th percentile; None
            until it is measured.
        speedup: over the reference policy at its own default number of steps, by the medians.
        success: in the simulated environment, where one was named.
    """

    policy: str
    num_steps: int
    energy_distance: Interval
    flow_rmse: float
    own_flow_rmse: float
    action_mae: float
    action_mae_executed: float
    action_mae_per_dim: list[float]
    spread_ratio: float
    straightness: float
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    speedup: float | None = None
    success: Success | None = None


class Cell(NamedTuple):
    """Which policy, by name, at which number of steps."""

    policy: str
    num_steps: int


@dataclass(frozen=True)
class Evaluation:
    """What has been measured so far.

    Attributes:
        bar: the reference policy at its own default number of steps, which the others are compared with.
        records: of each policy and number of steps, one for each frame, in the same order.
        references: by policy, how its fine solutions were computed.
        latencies: of each policy and number of steps.
        successes: of each policy and number of steps, where an environment was named.
        seed: of the intervals' resampling.
    """

    bar: Cell
    records: Mapping[Cell, Sequence[Record]]
    references: Mapping[str, Reference]
    latencies: Mapping[Cell, Latency] = field(default_factory=dict)
    successes: Mapping[Cell, Success] = field(default_factory=dict)
    seed: int = 0

    def rows(self) -> list[Row]:
        """The table, by policy, then by number of steps."""
        fine_spread = mean(self.records[self.bar]).fine_spread
        return [self._row(cell, fine_spread) for cell in self.records]

    def energy_distances(self, cell: Cell) -> np.ndarray:
        """One for each frame."""
        return np.array([record.energy_distance for record in self.records[cell]])

    def _row(self, cell: Cell, fine_spread: float) -> Row:
        found = mean(self.records[cell])
        error = np.array(found.action_error) / found.steps
        here, there = self.latencies.get(cell), self.latencies.get(self.bar)
        return Row(
            policy=cell.policy,
            num_steps=cell.num_steps,
            energy_distance=over_frames(self.energy_distances(cell), self.seed),
            flow_rmse=found.flow_error**0.5,
            own_flow_rmse=found.own_flow_error**0.5,
            action_mae=float(error.mean()),
            action_mae_executed=float(np.mean(found.action_error_executed)) / found.steps_executed,
            action_mae_per_dim=error.tolist(),
            spread_ratio=found.spread / fine_spread,
            straightness=found.straightness,
            latency_ms_p50=here.p50 if here else None,
            latency_ms_p95=here.p95 if here else None,
            speedup=there.p50 / here.p50 if here and there else None,
            success=self.successes.get(cell),
        )


def cells(policies: Sequence[MeasuredPolicy], num_steps: Sequence[int]) -> list[Cell]:
    """Every policy at every number of steps that is asked for, at its own default, and at the reference policy's."""
    return [
        Cell(policy.name, n)
        for policy in policies
        for n in sorted({*num_steps, policy.num_steps, policies[0].num_steps})
    ]


@dataclass(frozen=True)
class Measured:
    """Some frames, measured: for each policy and number of steps one record a frame; and the references."""

    records: dict[Cell, list[Record]]
    references: dict[str, Reference]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file."""
        records = [[*cell, [asdict(record) for record in found]] for cell, found in self.records.items()]
        return {"records": records, "references": {name: asdict(each) for name, each in self.references.items()}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Measured":
        """From what `as_json` gave."""
        return cls(
            {Cell(policy, n): [Record(**record) for record in records] for policy, n, records in found["records"]},
            {name: Reference(**each) for name, each in found["references"].items()},
        )


def measure_batch(
    policies: Sequence[MeasuredPolicy],
    batch: dict[str, Any],
    settings: Settings,
    references: Mapping[str, Reference] | None = None,
) -> Measured:
    """Measure policies on one batch.

    Args:
        policies: one or more; the first is the reference policy.
        batch: of raw frames, each with its "index", its recorded "action" (N, T, D) and "action_is_pad" (N, T).
        settings: what to measure.
        references: of an earlier batch; chosen on this one if None.
    """
    records: dict[Cell, list[Record]] = {}
    chosen: dict[str, Reference] = {}
    target: Tensor | None = None
    steps_of: dict[str, list[int]] = defaultdict(list)
    for cell in cells(policies, settings.num_steps):
        steps_of[cell.policy].append(cell.num_steps)
    for policy in policies:
        with policy.inference(policy.num_steps):
            reference = (references or {}).get(policy.name)
            solved = solutions(policy, batch, steps_of[policy.name], settings, target, reference)
        chosen[policy.name] = solved.reference
        target = solved.fine if target is None else target
        for n in steps_of[policy.name]:
            executed = policy.policy.config.n_action_steps
            records[Cell(policy.name, n)] = frame_records(solved, n, target, batch, executed, settings)
    return Measured(records, chosen)


@dataclass(frozen=True)
class Solutions:
    """The actions to which one policy carries the noises of a batch, and how straight their paths are.

    All actions are (N, K, T, D), in the robot's units, on the CPU.

    Attributes:
        fine: by the reference's number of rk4 steps.
        euler: by the stock sampler, for each number of steps.
        straightness: (N, K), of the fine paths, in squared standard deviations.
        reference: how `fine` was computed.
    """

    fine: Tensor
    euler: dict[int, Tensor]
    straightness: Tensor
    reference: Reference


def solutions(
    policy: MeasuredPolicy,
    batch: dict[str, Any],
    num_steps: Sequence[int],
    settings: Settings,
    target: Tensor | None = None,
    reference: Reference | None = None,
) -> Solutions:
    """Solve a policy's ODE for every noise of a batch; each frame's observation is encoded once.

    Args:
        policy: which.
        batch: of raw frames.
        num_steps: of the Euler solutions.
        settings: what to measure.
        target: the reference policy's fine solutions; None for itself.
        reference: how fine the solutions are to be, if that is known.
    """
    config, frames, noises = policy.policy.config, batch["index"].tolist(), settings.num_noises
    observation = observe(policy.policy, policy.preprocessor(dict(batch)))
    velocity = velocity_of(policy.policy.model, observation).repeated(noises)
    noise = frames_noise(settings.seed, frames, noises, (config.chunk_size, config.max_action_dim))
    noise = noise.to(observation.state.device)
    scale = policy.robot_units.scale
    moving = settings.action_std > 0

    def in_deviations(x: Tensor) -> Tensor:
        """Differences in the policy's normalised space, at full width, of the robot's dimensions that move."""
        return x[..., : len(scale)][..., moving] * settings.in_deviations(scale).to(x)

    def actions(x: Tensor) -> Tensor:
        return policy.robot_units(x[..., : len(scale)]).unflatten(0, (len(frames), noises)).cpu()

    ends = {n: actions(Solver("euler", num_steps=n).integrate(velocity, noise)) for n in num_steps}

    def smallest_error(fine: Tensor) -> float:
        aim = actions(fine) if target is None else target
        return min(settings.in_deviations(end - aim).square().mean().sqrt().item() for end in ends.values())

    fine = solved_finely(velocity, noise, in_deviations, smallest_error, reference or settings.reference_steps)
    return Solutions(
        fine=actions(fine.actions),
        euler=ends,
        straightness=fine.straightness.unflatten(0, (len(frames), noises)).cpu(),
        reference=fine.reference,
    )


def frame_records(
    solved: Solutions, num_steps: int, reference: Tensor, batch: dict[str, Any], executed: int, settings: Settings
) -> list[Record]:
    """The metrics of one policy at one number of steps, for each frame of a batch.

    Args:
        solved: what the policy did.
        num_steps: which of its Euler solutions is measured.
        reference: (N, K, T, D), the reference policy's fine solution, in the robot's units.
        batch: with what was recorded.
        executed: the policy's `n_action_steps`.
        settings: with the standard deviations.
    """
    actions, recorded, exists = solved.euler[num_steps], batch["action"], ~batch["action_is_pad"]
    sampled, fine, target = map(settings.in_deviations, (actions, solved.fine, reference))
    by_field = {
        "energy_distance": energy_distance(sampled, target),
        "flow_error": squared_error(sampled, target).mean(dim=1),
        "own_flow_error": squared_error(sampled, fine).mean(dim=1),
        "spread": spread(sampled),
        "fine_spread": spread(fine),
        "straightness": solved.straightness.mean(dim=1),
        "action_error": absolute_error(actions, recorded, exists),
        "action_error_executed": absolute_error(actions[:, :, :executed], recorded[:, :executed], exists[:, :executed]),
        "steps": exists.sum(dim=1),
        "steps_executed": exists[:, :executed].sum(dim=1),
    }
    frames = zip(*(values.tolist() for values in by_field.values()), strict=True)
    return [Record(**dict(zip(by_field, values, strict=True))) for values in frames]


def evaluate(policies: Sequence[MeasuredPolicy], batches: Iterable[dict[str, Any]], settings: Settings) -> Evaluation:
    """Measure policies on batches of raw frames, as `measure_batch` does on one; no latency, no success."""
    parts: list[Measured] = []
    for batch in batches:
        parts.append(measure_batch(policies, batch, settings, parts[0].references if parts else None))
    return evaluation_of(policies, parts, settings.seed)


def evaluation_of(policies: Sequence[MeasuredPolicy], parts: Sequence[Measured], seed: int) -> Evaluation:
    """What one or more measured batches say of these policies."""
    records: dict[Cell, list[Record]] = defaultdict(list)
    for part in parts:
        for cell, measured in part.records.items():
            records[cell] += measured
    bar = Cell(policies[0].name, policies[0].num_steps)
    return Evaluation(bar, dict(records), parts[0].references, seed=seed)


def mean(records: Sequence[Record]) -> Record:
    """The mean of each field."""
    by_field = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
    return Record(**{name: np.mean(values, axis=0).tolist() for name, values in by_field.items()})
