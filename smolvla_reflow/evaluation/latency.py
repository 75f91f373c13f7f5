"""The time that a control loop waits for one chunk of actions, and the share of the ODE steps in it."""

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from smolvla_reflow.checkpoint.read import IRRELEVANT_TO_ACTIONS
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.smolvla.observation import observe, with_one_state
from smolvla_reflow.smolvla.velocity import velocity_of

WARM_UP, REPEATS = 3, 30
# Fewer repeats are enough if a chunk takes long.
SECONDS, FEWEST_REPEATS = 5.0, 5


def pace(policy: MeasuredPolicy) -> tuple[str, ...]:
    """The configuration that a policy's speed depends on: two policies with the same pace are equally fast."""
    config = policy.policy.config
    return tuple(
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if not field.name.startswith(IRRELEVANT_TO_ACTIONS)
    )


def measure_latency(policy: MeasuredPolicy, frame: dict[str, Any], num_steps: int) -> dict[str, float]:
    """Median "p50" and 95th percentile "p95" of one `predict_action_chunk` on a raw batch of size 1, in ms."""
    observation = prepared(policy, frame)
    with policy.inference(num_steps):
        timed = milliseconds(lambda: policy.policy.predict_action_chunk(dict(observation)), policy)
    return {"p50": float(np.median(timed)), "p95": float(np.percentile(timed, 95))}


def measure_parts(policy: MeasuredPolicy, frame: dict[str, Any]) -> dict[str, float]:
    """Medians in ms on a raw batch of size 1: "prefix" encodes images, language and state, "step" is one ODE step."""
    observation, model, config = prepared(policy, frame), policy.policy.model, policy.policy.config
    with policy.inference(policy.num_steps):
        prefix = milliseconds(lambda: velocity_of(model, observe(policy.policy, dict(observation))), policy)
        velocity = velocity_of(model, observe(policy.policy, dict(observation)))
        noise = torch.zeros(1, config.chunk_size, config.max_action_dim, device=config.device)
        step = milliseconds(lambda: velocity(noise, 1.0), policy)
    return {"prefix": float(np.median(prefix)), "step": float(np.median(step))}


def left_to_gain(prefix: float, step: float, num_steps: int) -> str:
    """The time that fewer than `num_steps` steps could still save, in a sentence."""
    chunk = prefix + num_steps * step
    parts = (
        f"A chunk at num_steps={num_steps} takes {chunk:.1f} ms: {prefix:.1f} ms for images, language and state, which "
        f"are encoded once, and {step:.1f} ms for each ODE step"
    )
    if num_steps == 1:
        return f"{parts}. Nothing more can be gained by fewer steps."
    saved = (num_steps - 1) * step
    return f"{parts}; one step instead would save another {saved:.1f} ms ({saved / chunk:.0%})."


def prepared(policy: MeasuredPolicy, frame: dict[str, Any]) -> dict[str, Any]:
    """The policy's input; a robot has no recorded actions to prepare."""
    observation = policy.preprocessor({k: v for k, v in frame.items() if not k.startswith("action")})
    return with_one_state(policy.policy, observation)


def milliseconds(call: Callable[[], object], policy: MeasuredPolicy) -> list[float]:
    """The times of 30 calls after a warm-up, or of as many as take 5 seconds."""
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
