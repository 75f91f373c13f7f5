"""How long a control loop waits for one chunk of actions, and which part of that the ODE steps are."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from smolvla_reflow.checkpoint.read import IRRELEVANT_TO_ACTIONS
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.smolvla.observation import observe, with_one_state
from smolvla_reflow.smolvla.velocity import velocity_of

WARM_UP, REPEATS = 3, 30
# Where a chunk takes long, fewer will do.
SECONDS, FEWEST_REPEATS = 5.0, 5


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one `predict_action_chunk` at batch size 1: the median, and the 95th percentile."""

    p50: float
    p95: float


@dataclass(frozen=True)
class ChunkParts:
    """What a chunk's time is made of, medians in milliseconds at batch size 1.

    Attributes:
        prefix: encoding images, language and state, once for a chunk.
        step: one ODE step.
    """

    prefix: float
    step: float

    def left_to_gain(self, num_steps: int) -> str:
        """What fewer steps than these could still save, in a sentence."""
        chunk = self.prefix + num_steps * self.step
        made_of = (
            f"A chunk at num_steps={num_steps} takes {chunk:.1f} ms: {self.prefix:.1f} ms for images, language and "
            f"state, which are encoded once, and {self.step:.1f} ms for each ODE step"
        )
        if num_steps == 1:
            return f"{made_of}. Nothing more can be gained by fewer steps."
        saved = (num_steps - 1) * self.step
        return f"{made_of}; one step instead would save another {saved:.1f} ms ({saved / chunk:.0%})."


def pace(policy: MeasuredPolicy) -> tuple[str, ...]:
    """What a policy's speed depends on, of its configuration: two that agree in it are equally fast."""
    config = policy.policy.config
    return tuple(
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if not field.name.startswith(IRRELEVANT_TO_ACTIONS)
    )


def measure_latency(policy: MeasuredPolicy, frame: dict[str, Any], num_steps: int) -> Latency:
    """Time `predict_action_chunk` on one frame, a raw batch of size 1, with `num_steps` Euler steps."""
    observation = prepared(policy, frame)
    with policy.inference(num_steps):
        timed = milliseconds(lambda: policy.policy.predict_action_chunk(dict(observation)), policy)
    return Latency(p50=float(np.median(timed)), p95=float(np.percentile(timed, 95)))


def measure_parts(policy: MeasuredPolicy, frame: dict[str, Any]) -> ChunkParts:
    """Time the two parts of a chunk on one frame, a raw batch of size 1."""
    observation, model, config = prepared(policy, frame), policy.policy.model, policy.policy.config
    with policy.inference(policy.num_steps):
        prefix = milliseconds(lambda: velocity_of(model, observe(policy.policy, dict(observation))), policy)
        velocity = velocity_of(model, observe(policy.policy, dict(observation)))
        noise = torch.zeros(1, config.chunk_size, config.max_action_dim, device=config.device)
        step = milliseconds(lambda: velocity(noise, 1.0), policy)
    return ChunkParts(float(np.median(prefix)), float(np.median(step)))


def prepared(policy: MeasuredPolicy, frame: dict[str, Any]) -> dict[str, Any]:
    """The policy's input; a robot has no recorded actions to prepare."""
    observation = policy.preprocessor({k: v for k, v in frame.items() if not k.startswith("action")})
    return with_one_state(policy.policy, observation)


def milliseconds(call: Callable[[], object], policy: MeasuredPolicy) -> list[float]:
    """The times of some calls, one after the other, once it is warm: of 30, or as many as take 5 seconds."""
    on_cuda = torch.device(policy.policy.config.device).type == "cuda"
    times = []
    for _ in range(WARM_UP + REPEATS):
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        if sum(times[WARM_UP:]) > SECONDS * 1e3 and len(times) >= WARM_UP + FEWEST_REPEATS:
            break
    return times[WARM_UP:]
