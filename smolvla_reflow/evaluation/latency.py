"""How long a control loop waits for one chunk of actions."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.smolvla.observation import with_one_state

WARM_UP, REPEATS = 3, 30


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one `predict_action_chunk` at batch size 1: the median, and the 95th percentile."""

    p50: float
    p95: float


def measure_latency(policy: MeasuredPolicy, frame: dict[str, Any], num_steps: int) -> Latency:
    """Time `predict_action_chunk` on one frame, a raw batch of size 1, with `num_steps` Euler steps."""
    observation = policy.preprocessor({k: v for k, v in frame.items() if not k.startswith("action")})
    observation = with_one_state(policy.policy, observation)
    cuda = observation["observation.state"].is_cuda
    milliseconds = []
    with policy.inference(num_steps):
        for _ in range(WARM_UP + REPEATS):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            policy.policy.predict_action_chunk(dict(observation))
            if cuda:
                torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    timed = milliseconds[WARM_UP:]
    return Latency(p50=float(np.median(timed)), p95=float(np.percentile(timed, 95)))
