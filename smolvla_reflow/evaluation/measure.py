"""Measure policies on the same frames, from the same noises.

    measure_batch   a table with a row for each policy, number of steps and frame
    summary         a row for each policy and number of steps, over all frames, as in report.json

All metrics but the action error are in units of each action dimension's standard deviation in the dataset. Every
policy's actions are first converted to the robot's units by its own statistics, so that policies which are normalised
differently can be compared.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from torch import Tensor

from smolvla_reflow.distance import absolute_error, energy_distance, frame_flow, spread, squared_error
from smolvla_reflow.evaluation.intervals import over_episodes
from smolvla_reflow.evaluation.late import Delay
from smolvla_reflow.evaluation.latency import ChunkTime
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.start import NORMAL, constant_noise
from smolvla_reflow.evaluation.success import Driven, Success
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.solver import Solver

Row: TypeAlias = dict[str, Any]


class Cell(NamedTuple):
    """A policy, by name, at a number of steps."""

    policy: str
    num_steps: int


@dataclass(frozen=True)
class Settings:
    """The way policies are measured."""

    action_std: Tensor  # (D,); dimensions that never move, with 0, count in the action error alone
    num_steps: Sequence[int]  # of Euler; each policy's own default and the reference policy's are measured as well
    num_noises: int  # for each frame, at least 2
    reference_steps: int  # of rk4 for the fine solutions, at least 2
    seed: int  # of the noise

    def in_deviations(self, actions: Tensor) -> Tensor:
        """Actions (..., D) in the robot's units, in standard deviations of the dimensions that move."""
        return (actions / self.action_std)[..., self.action_std > 0]


def cells(policies: Sequence[MeasuredPolicy], num_steps: Sequence[int]) -> list[Cell]:
    """Every policy at these numbers of steps, at its own default, and at the reference policy's, which is the first."""
    return [
        Cell(policy.name, n)
        for policy in policies
        for n in sorted({*num_steps, policy.num_steps, policies[0].num_steps})
    ]


def measure_batch(
    policies: Sequence[MeasuredPolicy], batch: Mapping[str, Any], settings: Settings, *, check_fine: bool = False
) -> pd.DataFrame:
    """Measure policies, the reference policy first, on a raw batch; a row for each policy, number of steps and frame.

    Each policy is compared with the reference's fine solutions from the same noise. `check_fine` adds `fine_error`, the
    error of the fine solutions themselves.
    """

    def solutions(policy: MeasuredPolicy, num_steps: Sequence[int]) -> Solutions:
        with policy.inference(policy.num_steps):
            return solve(policy, batch, num_steps, settings, check_fine=check_fine)

    tables = []
    targets: dict[str, Tensor] = {}
    for policy in policies:
        its_steps = [cell.num_steps for cell in cells(policies, settings.num_steps) if cell.policy == policy.name]
        solved = solutions(policy, its_steps)
        if policy.start not in targets:
            reference = replace(policies[0], start=policy.start)
            targets[policy.start] = (solved if policy is policies[0] else solutions(reference, [])).fine
        for n in its_steps:
            found = frame_metrics(
                solved, n, targets[policy.start], batch, policy.policy.config.n_action_steps, settings
            )
            of = {"frame": batch["index"].tolist(), "episode": batch["episode_index"].tolist()}
            columns = {**of, **{name: value.tolist() for name, value in found.items()}}
            tables.append(pd.DataFrame({"policy": policy.name, "num_steps": n, **columns}))
    return pd.concat(tables, ignore_index=True)


class Solutions(NamedTuple):
    """One policy's solutions of a batch."""

    euler: Mapping[int, Tensor]  # by number of steps (N, K, T, D), in the robot's units, on the CPU
    fine: Tensor  # the same by many steps of rk4
    straightness: Tensor  # (N, K), of the fine paths, in squared standard deviations
    fine_error: Tensor | None = None  # (N, K), squared distance to the solutions by half as many steps of rk4


def solve(
    policy: MeasuredPolicy, batch: Mapping[str, Any], num_steps: Sequence[int], settings: Settings, *, check_fine: bool
) -> Solutions:
    """Solve a policy's ODE for every noise of a batch; each frame's observation is encoded once."""
    velocity = velocity_of(policy.policy.model, observe(policy.policy, policy.preprocessor(dict(batch))))
    flow = frame_flow(velocity, batch["index"].tolist(), settings.num_noises, settings.seed)
    if policy.start != NORMAL:
        flow = replace(flow, noise=constant_noise(policy.start, flow.noise.shape).to(flow.noise.device))
    scale, moving = policy.robot_units.scale, settings.action_std > 0

    def in_deviations(x: Tensor) -> Tensor:
        """Differences in the policy's normalised space, at full width, of the robot's dimensions that move."""
        return x[..., : len(scale)][..., moving] * settings.in_deviations(scale).to(x)

    def actions(x: Tensor) -> Tensor:
        return policy.robot_units(x[..., : len(scale)]).cpu()

    euler = {n: actions(flow.solve(Solver("euler", num_steps=n))) for n in num_steps}
    fine, bends = flow.solve_finely(settings.reference_steps, in_deviations)
    fine_error = None
    if check_fine:
        half = flow.solve(Solver("rk4", num_steps=settings.reference_steps // 2))
        fine_error = in_deviations(fine - half).square().mean(dim=(-2, -1)).cpu()
    return Solutions(euler, actions(fine), bends.cpu(), fine_error)


def frame_metrics(
    solved: Solutions, num_steps: int, target: Tensor, batch: Mapping[str, Any], executed: int, settings: Settings
) -> dict[str, Tensor]:
    """The metrics of one policy at one number of steps, for each of N frames, averaged over the frame's noises.

    `target` (N, K, T, D) is the reference policy's fine solution, `executed` the policy's `n_action_steps`. A new
    metric is a function in `distance.py`, a line here, and a line in `summary`.
    """
    actions, recorded, exists = solved.euler[num_steps], batch["action"], ~batch["action_is_pad"]
    sampled, fine, target = map(settings.in_deviations, (actions, solved.fine, target))
    metrics = {
        "energy_distance": energy_distance(sampled, target),
        "flow_error": squared_error(sampled, target).mean(dim=1),
        "own_flow_error": squared_error(sampled, fine).mean(dim=1),
        "spread": spread(sampled),
        "fine_spread": spread(fine),
        "straightness": solved.straightness.mean(dim=1),
        # Sums over the recorded steps of the chunk, and over the part of the chunk that is executed.
        "action_error": absolute_error(actions, recorded, exists),
        "action_error_executed": absolute_error(actions[:, :, :executed], recorded[:, :executed], exists[:, :executed]),
        "steps": exists.sum(dim=1),
        "steps_executed": exists[:, :executed].sum(dim=1),
    }
    return metrics if solved.fine_error is None else {**metrics, "fine_error": solved.fine_error.mean(dim=1)}


def summary(
    table: pd.DataFrame,
    bar: Cell,
    seed: int = 0,
    chunk_times: Mapping[str, ChunkTime] | None = None,
    driven: Mapping[Cell, Driven] | None = None,
    delays: Mapping[Cell, Delay] | None = None,
    one_noise: Collection[str] = (),
) -> list[Row]:
    """A row of the report for each policy and number of steps, over all frames of the table; see the guide `report.md`.

    The chunk times (by policy), the episodes and the delays in them can be missing. A policy of `one_noise` makes one
    chunk for each frame, so it has no energy distance.
    """
    groups = by_cell(table)
    fine_spread = _mean(groups[bar], "fine_spread")
    rows = []
    for cell, group in groups.items():
        error = _mean(group, "action_error") / _mean(group, "steps")
        executed = float(np.mean(_mean(group, "action_error_executed"))) / _mean(group, "steps_executed")
        chunk, bars_chunk = ((chunk_times or {}).get(each.policy) for each in (cell, bar))
        episodes = (driven or {}).get(cell)
        is_one_chunk = cell.policy in one_noise
        distance = None if is_one_chunk else over_episodes(group["energy_distance"], group["episode"], seed)
        row = {
            "policy": cell.policy,
            "num_steps": cell.num_steps,
            "energy_distance": distance,
            "flow_rmse": _mean(group, "flow_error") ** 0.5,
            "own_flow_rmse": _mean(group, "own_flow_error") ** 0.5,
            "action_mae": float(error.mean()),
            "action_mae_executed": executed,
            "action_mae_per_dim": error.tolist(),
            "spread_ratio": _mean(group, "spread") / fine_spread,
            "straightness": _mean(group, "straightness"),
            "latency_ms_p50": chunk.p50(cell.num_steps) if chunk else None,
            "latency_ms_p95": chunk.p95(cell.num_steps) if chunk else None,
            "speedup": bars_chunk.p50(bar.num_steps) / chunk.p50(cell.num_steps) if chunk and bars_chunk else None,
            "delay": (delays or {}).get(cell),
            "success": None if episodes is None else Success.count(episodes),
        }
        rows.append(row)
    return rows


def by_cell(table: pd.DataFrame) -> dict[Cell, pd.DataFrame]:
    """The rows of each policy and number of steps."""
    groups = table.groupby(["policy", "num_steps"], sort=False)
    return {Cell(str(policy), int(n)): group for (policy, n), group in groups}


def _mean(group: pd.DataFrame, metric: str) -> Any:
    """The mean over frames, of each dimension if the metric has several."""
    mean = np.mean(group[metric].tolist(), axis=0)
    return mean if mean.ndim else mean.item()


def fine_errors(table: pd.DataFrame) -> dict[str, float]:
    """The RMS error of each policy's fine solutions, estimated by halving their steps."""
    return {str(name): float(group.mean() ** 0.5) for name, group in table.groupby("policy", sort=False)["fine_error"]}
