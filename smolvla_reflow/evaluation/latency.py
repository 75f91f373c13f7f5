"""The time that a control loop waits for one chunk of actions, and the share of the ODE steps in it."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import theilslopes

from smolvla_reflow.checkpoint.read import IRRELEVANT_TO_ACTIONS
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.smolvla.observation import with_one_state

WARM_UP, ROUNDS = 3, 30
# Fewer rounds are enough if a chunk takes long.
SECONDS, FEWEST_ROUNDS = 30.0, 5
# On an idle machine 95 % of the chunks are late by less than this share of their time, and fewer programs wait for each
# processor.
LATE, LOADED = 0.25, 1.5


def pace(policy: MeasuredPolicy) -> tuple[str, ...]:
    """The configuration that a policy's speed depends on: two policies with the same pace are equally fast."""
    config = policy.policy.config
    return tuple(
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)
        if not field.name.startswith(IRRELEVANT_TO_ACTIONS)
    )


class Rounds(NamedTuple):
    """The times of chunks."""

    times: list[list[list[float]]]  # in ms, by policy, number of steps and round
    load: float  # programs at work for each processor, over the last minute


def measure_rounds(policies: Sequence[tuple[MeasuredPolicy, Sequence[int]]], frame: dict[str, Any]) -> Rounds:
    """Time `predict_action_chunk` on a raw batch of size 1.

    Each round times every policy at every of its numbers of steps, so a load that comes and goes slows them all alike.
    """
    cells = [(policy, n, observation_of(policy, frame)) for policy, numbers in policies for n in numbers]
    times: list[list[float]] = [[] for _ in cells]
    start = time.monotonic()
    for turn in range(WARM_UP + ROUNDS):
        if turn >= WARM_UP + FEWEST_ROUNDS and time.monotonic() - start > SECONDS:
            break
        for of_cell, (policy, n, observation) in zip(times, cells, strict=True):
            with policy.inference(n):
                of_cell.append(milliseconds(policy, observation))
    measured = iter(of_cell[WARM_UP:] for of_cell in times)
    return Rounds([[next(measured) for _ in numbers] for _, numbers in policies], load_of_machine())


def load_of_machine() -> float:
    """Programs at work for each processor, over the last minute."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows does not tell
        return 0.0


@dataclass(frozen=True)
class ChunkTime:
    """The time of one chunk of actions, prefix + num_steps * step, in ms.

    The line is that of Theil and Sen, the median of the slopes between any two of the times (scipy.stats.theilslopes),
    so some calls that another program held up do not move it.
    """

    prefix: float  # to encode images, language and state
    step: float  # for one ODE step
    late: float  # 95 % of the chunks take at most this share of their time longer, 0.1 for a tenth
    load: float = 0.0  # of the machine meanwhile, see `Rounds`

    def p50(self, num_steps: int) -> float:
        """The median time."""
        return self.prefix + num_steps * self.step

    def p95(self, num_steps: int) -> float:
        """The time that 95 % of the chunks take at most."""
        return self.p50(num_steps) * (1 + self.late)

    @classmethod
    def fit(cls, num_steps: Sequence[int], times: Sequence[Sequence[float]], load: float = 0.0) -> "ChunkTime":
        """Fit times by number of steps, at least two numbers, and round."""
        n = np.repeat(np.asarray(num_steps, float), [len(each) for each in times])
        took = np.concatenate([np.asarray(each, float) for each in times])
        step = max(float(theilslopes(took, n).slope), 0.0)
        prefix = max(float(np.median(took - step * n)), 0.0)
        late = np.percentile(took / (prefix + step * n) - 1, 95)
        return cls(prefix, step, max(float(late), 0.0), load)

    @property
    def was_busy(self) -> bool:
        """True if chunks of equal work took unequal times, or other programs were at work."""
        return self.late > LATE or self.load > LOADED


def left_to_gain(chunk: ChunkTime, num_steps: int) -> str:
    """The time that fewer than `num_steps` steps could still save, in a sentence; and if it is uncertain."""
    whole, saved = chunk.p50(num_steps), (num_steps - 1) * chunk.step
    said = (
        f"A chunk at num_steps={num_steps} takes {whole:.1f} ms: {chunk.prefix:.1f} ms for images, language and state, "
        f"which are encoded once, and {chunk.step:.1f} ms for each ODE step"
    )
    if num_steps == 1:
        said += ". Nothing more can be gained by fewer steps."
    else:
        said += f"; one step instead would save another {saved:.1f} ms ({saved / max(whole, 1e-9):.0%})."
    if chunk.was_busy:
        said += (
            f" The machine was busy (load {chunk.load:.1f} for each processor, one chunk in twenty over "
            f"{chunk.late:.0%} late), so measure the times again on an idle one."
        )
    return said


def observation_of(policy: MeasuredPolicy, frame: dict[str, Any]) -> dict[str, Any]:
    """The policy's input; a robot has no recorded actions to prepare."""
    observation = policy.preprocessor({k: v for k, v in frame.items() if not k.startswith("action")})
    return with_one_state(policy.policy, observation)


def milliseconds(policy: MeasuredPolicy, observation: dict[str, Any]) -> float:
    """The time of one chunk."""
    on_cuda = torch.device(policy.policy.config.device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    policy.policy.predict_action_chunk(dict(observation))
    if on_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
