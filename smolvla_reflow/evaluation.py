"""How many steps are enough: teacher and student, or several, measured on the same frames and the same noise.

    frames, noise -> each policy's path (fine) and its n-step Euler samples -> sums -> Evaluation

Everything is measured in units of each action dimension's standard deviation in the dataset, through each policy's
own statistics, except the action error, which is in the robot's units. Frames go by in batches and only
sums are kept, so memory does not grow with their number.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.flow import encode, observe
from smolvla_reflow.metrics import Success, spread, squared_error, straightness
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.normalization import Affine
from smolvla_reflow.solver import Solver

WARM_UP, REPEATS = 3, 30


@dataclass(frozen=True)
class Contestant:
    """A policy as plain LeRobot runs it.

    Attributes:
        name: "teacher", "round 1", ..., "student", or "policy" if it is alone.
        policy: in eval mode.
        preprocessor: of its checkpoint, from a dataset's batch to its input.
        postprocessor: of its checkpoint, from a normalised action to the robot's units.
        robot_units: the same for a whole chunk.
        num_steps: its own default.
    """

    name: str
    policy: SmolVLAPolicy
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    postprocessor: Callable[[Tensor], Tensor]
    robot_units: Affine
    num_steps: int

    @contextlib.contextmanager
    def inference(self, num_steps: int) -> Iterator[None]:
        """Sample with `num_steps` Euler steps meanwhile, in the autocast in which LeRobot would run this policy."""
        config = self.policy.config
        config.num_steps, before = num_steps, config.num_steps
        device = torch.device(config.device).type
        try:
            with torch.no_grad(), torch.autocast(device) if config.use_amp else contextlib.nullcontext():
                yield
        finally:
            config.num_steps = before


@dataclass(frozen=True)
class Row:
    """One policy at one number of steps.

    Attributes:
        policy: its name.
        num_steps: Euler steps of the stock sampler.
        flow_rmse: root mean square distance to the *reference policy's* fine solution on the same noise, in standard
            deviations. The reference policy is the teacher, or the only policy there is.
        own_flow_rmse: the same to the policy's own fine solution: what the few steps cost, not the training.
        action_mae: mean absolute error against the recorded actions over the chunk, in the robot's units.
        action_mae_executed: the same over the first `n_action_steps`, those the robot runs before it looks again.
        action_mae_per_dim: the same over the chunk, by action dimension.
        spread_ratio: variance over noises relative to the reference policy's fine solution.
        straightness: of the policy's paths, in squared standard deviations; 0 for straight ones.
        latency_ms_p50, latency_ms_p95: of one `predict_action_chunk`, batch 1.
        speedup: over the reference policy at its own number of steps.
        success: in closed loop, where an environment was named.
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
    """What was measured.

    Attributes:
        rows: by policy, then by number of steps.
        reference_rmse: how far the reference solution is from one with half the steps: what flow errors are good to.
    """

    rows: list[Row]
    reference_rmse: float


@dataclass
class _Sums:
    """Sums over all frames of what one policy did; steps by number."""

    flow: dict[int, float] = field(default_factory=dict)
    own_flow: dict[int, float] = field(default_factory=dict)
    spread: dict[int, float] = field(default_factory=dict)
    error: dict[int, Tensor] = field(default_factory=dict)
    executed: dict[int, float] = field(default_factory=dict)
    straightness: float = 0.0
    reference_spread: float = 0.0
    convergence: float = 0.0

    def add(self, name: str, num_steps: int, value: Any) -> None:
        sums = getattr(self, name)
        sums[num_steps] = sums.get(num_steps, 0.0) + value


def evaluate(
    contestants: Sequence[Contestant],
    batches: Iterable[dict[str, Any]],
    action_std: Tensor,
    *,
    num_steps: Sequence[int],
    num_noises: int,
    reference_steps: int,
    seed: int,
    progress: Callable[[int], object] = lambda frames: None,
) -> Evaluation:
    """Measure policies on a dataset's batches, the first of them being the reference.

    Args:
        contestants: one policy or more.
        batches: of raw frames, each with its "index", its recorded "action" (B, T, D) and "action_is_pad" (B, T).
        action_std: (D,) standard deviations of the recorded actions; dimensions that never move, with 0, are
            left out of all but the action error.
        num_steps: to measure; each policy's own default is measured as well.
        num_noises: per frame, at least 2.
        reference_steps: of rk4 for the fine solutions.
        seed: of the noise.
        progress: told the number of frames done.
    """
    steps = {c.name: sorted({*num_steps, c.num_steps, contestants[0].num_steps}) for c in contestants}
    sums = {c.name: _Sums() for c in contestants}
    moving = action_std > 0
    frames = executed = valid = 0
    sample: dict[str, Any] | None = None
    for batch in batches:
        sample = sample or {k: v[:1].clone() if isinstance(v, Tensor) else v[:1] for k, v in batch.items()}
        size = len(batch["index"])
        recorded, is_there = batch["action"], ~batch["action_is_pad"]
        reference: Tensor | None = None
        for c in contestants:
            with c.inference(c.num_steps):
                ends = _ends(c, batch, action_std, steps[c.name], num_noises, reference_steps, seed)
            scaled = {n: (x / action_std)[..., moving] for n, x in ends.samples.items()}
            fine = (ends.fine / action_std)[..., moving]
            if reference is None:
                reference = fine
            total, s = sums[c.name], num_noises
            total.straightness += float(ends.straightness)
            total.reference_spread += float(spread(fine).sum())
            total.convergence += float(squared_error((ends.half / action_std)[..., moving], fine).sum()) / s
            for n, x in scaled.items():
                total.add("flow", n, float(squared_error(x, reference).sum()) / s)
                total.add("own_flow", n, float(squared_error(x, fine).sum()) / s)
                total.add("spread", n, float(spread(x).sum()))
                error = (ends.samples[n] - recorded[:, None]).abs() * is_there[:, None, :, None]
                total.add("error", n, error.sum(dim=(0, 1, 2)).double() / s)
                total.add("executed", n, float(error[:, :, : c.policy.config.n_action_steps].sum()) / s)
        n_action_steps = contestants[0].policy.config.n_action_steps
        valid += int(is_there.sum())
        executed += int(is_there[:, :n_action_steps].sum())
        frames += size
        progress(size)
    assert sample is not None

    latency = {(c.name, n): latencies_ms(c, sample, n) for c in contestants for n in steps[c.name]}
    first = contestants[0]
    base = float(np.median(latency[first.name, first.num_steps]))
    base_spread = sums[first.name].reference_spread
    width = len(action_std)
    rows = [
        Row(
            policy=c.name,
            num_steps=n,
            flow_rmse=(sums[c.name].flow[n] / frames) ** 0.5,
            own_flow_rmse=(sums[c.name].own_flow[n] / frames) ** 0.5,
            action_mae=float(sums[c.name].error[n].sum()) / (valid * width),
            action_mae_executed=sums[c.name].executed[n] / (executed * width),
            action_mae_per_dim=(sums[c.name].error[n] / valid).tolist(),
            spread_ratio=sums[c.name].spread[n] / base_spread,
            straightness=sums[c.name].straightness / frames,
            latency_ms_p50=float(np.median(latency[c.name, n])),
            latency_ms_p95=float(np.percentile(latency[c.name, n], 95)),
            speedup=base / float(np.median(latency[c.name, n])),
        )
        for c in contestants
        for n in steps[c.name]
    ]
    return Evaluation(rows, (sums[first.name].convergence / frames) ** 0.5)


@dataclass(frozen=True)
class _Ends:
    """Where the paths of one policy end, (B, K, T, D) in the robot's units, and the sum of their straightness."""

    fine: Tensor
    half: Tensor
    samples: dict[int, Tensor]
    straightness: float


def _ends(
    c: Contestant,
    batch: dict[str, Any],
    action_std: Tensor,
    num_steps: Sequence[int],
    num_noises: int,
    reference_steps: int,
    seed: int,
) -> _Ends:
    config = c.policy.config
    shape = (config.chunk_size, config.max_action_dim)
    frames = batch["index"].tolist()
    noise = frames_noise(seed, frames, num_noises, shape)
    observation = observe(c.policy, c.preprocessor(dict(batch)))
    velocity = encode(c.policy, observation).repeated(num_noises)
    noise = noise.to(observation.state.device)
    width = len(c.robot_units.scale)

    def units(x: Tensor) -> Tensor:
        return c.robot_units(x[..., :width]).unflatten(-3, (len(frames), num_noises)).cpu()

    path = Solver("rk4", num_steps=reference_steps).path(velocity, noise)
    along = torch.stack([velocity(x, t) for x, t in zip(path.points, path.times, strict=True)])
    moving = action_std > 0
    in_std = (c.robot_units.scale / action_std)[moving].to(noise)
    straight = straightness(
        path.points[..., :width][..., moving] * in_std, along[..., :width][..., moving] * in_std, path.times
    )
    return _Ends(
        fine=units(path.points[-1]),
        half=units(Solver("rk4", num_steps=max(1, reference_steps // 2)).integrate(velocity, noise)),
        samples={n: units(Solver("euler", num_steps=n).integrate(velocity, noise)) for n in num_steps},
        straightness=float(straight.sum()) / num_noises,
    )


def latencies_ms(c: Contestant, frame: dict[str, Any], num_steps: int) -> list[float]:
    """Milliseconds of `predict_action_chunk` for one frame, as a control loop waits for it."""
    observation = c.preprocessor({k: v for k, v in frame.items() if not k.startswith("action")})
    cuda = observation["observation.state"].is_cuda
    milliseconds = []
    with c.inference(num_steps):
        for _ in range(WARM_UP + REPEATS):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            c.policy.predict_action_chunk(dict(observation))
            if cuda:
                torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds[WARM_UP:]


def recommend(evaluation: Evaluation, name: str, reference: Contestant, tolerance: float) -> int | None:
    """The smallest number of steps at which the policy is good enough, or None.

    Good enough is: as close to the reference policy's fine solution as that policy's own sampler with its default
    number of steps is, or within `tolerance` standard deviations.
    """
    (default,) = (
        row.flow_rmse
        for row in evaluation.rows
        if row.policy == reference.name and row.num_steps == reference.num_steps
    )
    enough = [
        row.num_steps for row in evaluation.rows if row.policy == name and row.flow_rmse <= max(default, tolerance)
    ]
    return min(enough, default=None)
