"""Measure policies on the same frames, from the same noise: one record per frame, one row per mean of the records.

    batch -> Solutions of each policy -> Record of each frame, policy and number of steps -> mean -> Row

All metrics but the action error are in units of each action dimension's standard deviation in the dataset. Every
policy's actions are first converted to the robot's units by its own statistics, so that policies which are normalised
differently can be compared. Of each batch only the records are kept, so memory holds some numbers for each frame.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smolvla_reflow.evaluation.latency import Latency, measure_latency
from smolvla_reflow.evaluation.metrics import Success, absolute_error, spread, squared_error, straightness
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import Velocity, velocity_of
from smolvla_reflow.solver import Path, Solver


@dataclass(frozen=True)
class Settings:
    """What to measure, and how finely.

    Attributes:
        action_std: (D,) standard deviations of the recorded actions. Dimensions that never move, with 0, count in the
            action error alone.
        num_steps: numbers of Euler steps; each policy's own default and the reference policy's are measured as well.
        num_noises: noises for each frame, at least 2.
        reference_steps: rk4 steps of the fine solutions, at least 2.
        seed: of the noise.
    """

    action_std: Tensor
    num_steps: Sequence[int]
    num_noises: int
    reference_steps: int
    seed: int

    def in_deviations(self, actions: Tensor) -> Tensor:
        """Actions (..., D) in the robot's units, in standard deviations of the dimensions that move."""
        return (actions / self.action_std)[..., self.action_std > 0]


@dataclass(frozen=True, slots=True)
class Record:
    """One policy at one number of steps on one frame: every metric as a number, averaged over the frame's noises.

    A new metric is a function in `metrics`, a field here, and a line in `frame_records`.

    Attributes:
        flow_error: squared distance to the reference policy's fine solution.
        own_flow_error: squared distance to the policy's own fine solution.
        fine_error: squared distance of the policy's fine solution to one with half the steps.
        spread: variance over the noises.
        fine_spread: the same of the fine solution.
        straightness: of the fine paths.
        action_error: absolute error of each action dimension, summed over the chunk's recorded steps.
        action_error_executed: the same, summed over the first `n_action_steps` of them.
        steps, steps_executed: how many steps these two are sums over.
    """

    flow_error: float
    own_flow_error: float
    fine_error: float
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
        flow_rmse: root mean square distance to the *reference policy's* fine solution from the same noise, in standard
            deviations. The reference policy is the teacher, or the only policy there is.
        own_flow_rmse: the same to the policy's own fine solution: the error that comes from taking few steps, without
            the error that comes from training.
        action_mae: mean absolute error against the recorded actions over the chunk, in the robot's units.
        action_mae_executed: the same over the first `n_action_steps`, those the robot runs before it looks again.
        action_mae_per_dim: the same over the chunk, for each action dimension.
        spread_ratio: variance over noises, relative to that of the reference policy's fine solution.
        straightness: of the policy's paths, in squared standard deviations; 0 for straight ones.
        latency_ms_p50, latency_ms_p95: of one `predict_action_chunk` at batch size 1, median and 95th percentile.
        speedup: over the reference policy at its own default number of steps, by the medians.
        success: in the simulated environment, where one was named.
    """

    policy: str
    num_steps: int
    flow_rmse: float
    own_flow_rmse: float
    action_mae: float
    action_mae_executed: float
    action_mae_per_dim: list[float]
    spread_ratio: float
    straightness: float
    latency_ms_p50: float
    latency_ms_p95: float
    speedup: float
    success: Success | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results of a measurement.

    Attributes:
        rows: by policy, then by number of steps.
        reference_rmse: estimated error of the reference policy's fine solution, its distance to one with half the
            steps, in standard deviations. Flow errors below it mean nothing.
    """

    rows: list[Row]
    reference_rmse: float


class Cell(NamedTuple):
    """Which policy, by name, at which number of steps."""

    policy: str
    num_steps: int


def evaluate(
    policies: Sequence[MeasuredPolicy],
    batches: Iterable[dict[str, Any]],
    settings: Settings,
    progress: Callable[[int], object] = lambda frames: None,
) -> Evaluation:
    """Measure policies on a dataset's batches.

    Args:
        policies: one or more; the first is the reference.
        batches: of raw frames, each with its "index", its recorded "action" (N, T, D) and "action_is_pad" (N, T).
        settings: what to measure.
        progress: called with the number of frames done in each batch.
    """
    records: dict[Cell, list[Record]] = defaultdict(list)
    frame: dict[str, Any] = {}
    for batch in batches:
        frame = frame or {k: v[:1].clone() if isinstance(v, Tensor) else v[:1] for k, v in batch.items()}
        for cell, measured in measure_batch(policies, batch, settings).items():
            records[cell] += measured
        progress(len(batch["index"]))
    means = {cell: mean(measured) for cell, measured in records.items()}
    by_name = {policy.name: policy for policy in policies}
    latencies = {cell: measure_latency(by_name[cell.policy], frame, cell.num_steps) for cell in means}
    reference = Cell(policies[0].name, policies[0].num_steps)
    return Evaluation(
        rows=[row(cell, means[cell], means[reference], latencies[cell], latencies[reference]) for cell in means],
        reference_rmse=means[reference].fine_error ** 0.5,
    )


def measure_batch(
    policies: Sequence[MeasuredPolicy], batch: dict[str, Any], settings: Settings
) -> dict[Cell, list[Record]]:
    """Measure policies on one batch: for each policy and number of steps, one record per frame."""
    records: dict[Cell, list[Record]] = {}
    reference: Tensor | None = None
    for policy in policies:
        steps = sorted({*settings.num_steps, policy.num_steps, policies[0].num_steps})
        with policy.inference(policy.num_steps):
            solved = solutions(policy, batch, steps, settings)
        reference = solved.fine if reference is None else reference
        for n in steps:
            executed = policy.policy.config.n_action_steps
            records[Cell(policy.name, n)] = frame_records(solved, n, reference, batch, executed, settings)
    return records


@dataclass(frozen=True)
class Solutions:
    """The actions to which one policy carries the noises of a batch, and how straight their paths are.

    All actions are (N, K, T, D), in the robot's units, on the CPU.

    Attributes:
        fine: by rk4 with `reference_steps`.
        half: by rk4 with half as many.
        euler: by the stock sampler, for each number of steps.
        straightness: (N, K), of the fine paths, in squared standard deviations.
    """

    fine: Tensor
    half: Tensor
    euler: dict[int, Tensor]
    straightness: Tensor


def solutions(policy: MeasuredPolicy, batch: dict[str, Any], num_steps: Sequence[int], settings: Settings) -> Solutions:
    """Solve the policy's ODE for every noise of a batch; each frame's observation is encoded once."""
    config, frames, noises = policy.policy.config, batch["index"].tolist(), settings.num_noises
    observation = observe(policy.policy, policy.preprocessor(dict(batch)))
    velocity = velocity_of(policy.policy.model, observation).repeated(noises)
    noise = frames_noise(settings.seed, frames, noises, (config.chunk_size, config.max_action_dim))
    noise = noise.to(observation.state.device)
    width = len(policy.robot_units.scale)

    def actions(x: Tensor) -> Tensor:
        return policy.robot_units(x[..., :width]).unflatten(0, (len(frames), noises)).cpu()

    path = Solver("rk4", num_steps=settings.reference_steps).path(velocity, noise)
    half = Solver("rk4", num_steps=max(1, settings.reference_steps // 2)).integrate(velocity, noise)
    straight = path_straightness(path, velocity, policy.robot_units.scale, settings)
    return Solutions(
        fine=actions(path.points[-1]),
        half=actions(half),
        euler={n: actions(Solver("euler", num_steps=n).integrate(velocity, noise)) for n in num_steps},
        straightness=straight.unflatten(0, (len(frames), noises)).cpu(),
    )


def path_straightness(path: Path, velocity: Velocity, scale: Tensor, settings: Settings) -> Tensor:
    """Straightness of paths in a policy's normalised space, (N * K,); `scale` (D,) converts to the robot's units."""
    along = torch.stack([velocity(x, t).to(x.dtype) for x, t in zip(path.points, path.times, strict=True)])
    in_deviations = settings.in_deviations(scale).to(path.points)
    moving = settings.action_std > 0

    def scaled(x: Tensor) -> Tensor:
        return x[..., : len(scale)][..., moving] * in_deviations

    return straightness(scaled(path.points), scaled(along), path.times)


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
    sampled, fine, half, target = map(settings.in_deviations, (actions, solved.fine, solved.half, reference))
    by_field = {
        "flow_error": squared_error(sampled, target).mean(dim=1),
        "own_flow_error": squared_error(sampled, fine).mean(dim=1),
        "fine_error": squared_error(half, fine).mean(dim=1),
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


def mean(records: Sequence[Record]) -> Record:
    """The mean of each field."""
    by_field = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
    return Record(**{name: np.mean(values, axis=0).tolist() for name, values in by_field.items()})


def row(cell: Cell, found: Record, reference: Record, latency: Latency, reference_latency: Latency) -> Row:
    """Report the mean record of a policy, beside that of the reference policy."""
    error = np.array(found.action_error) / found.steps
    return Row(
        policy=cell.policy,
        num_steps=cell.num_steps,
        flow_rmse=found.flow_error**0.5,
        own_flow_rmse=found.own_flow_error**0.5,
        action_mae=float(error.mean()),
        action_mae_executed=float(np.mean(found.action_error_executed)) / found.steps_executed,
        action_mae_per_dim=error.tolist(),
        spread_ratio=found.spread / reference.fine_spread,
        straightness=found.straightness,
        latency_ms_p50=latency.p50,
        latency_ms_p95=latency.p95,
        speedup=reference_latency.p50 / latency.p50,
    )
