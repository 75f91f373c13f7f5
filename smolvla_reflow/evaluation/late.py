"""Chunks that arrive late: a policy in a simulator as LeRobot's asynchronous robot client runs it (`--latency_ms`).

    control step   0 1 2 3 4 5 6 7 8 9 ...
    chunk of 0     0 1 2 3 4 5 6 7 8 9         the simulator waits for the first chunk, as a robot stands still
    chunk of 8                     . . 2 3 ...  observed at 8, there two steps later: its first two actions are dropped

An observation is sent after `n_action_steps` actions of a chunk, or sooner if the chunk would run out, but not in its
first half. A chunk that is there replaces the rest of the chunk before (the client's `latest_only`), or is mixed with
it (the client's other functions, `--aggregate_fn_name`). If a chunk runs out all the same, the robot keeps its last
action, and the next chunk loses no action for that time.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.errors import ReflowError, doing
from smolvla_reflow.evaluation.latency import ChunkTime
from smolvla_reflow.smolvla.binding import bind

MEASURED = "measured"
LATEST = "latest_only"

Aggregate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Delay:
    """The time from an observation to its chunk."""

    ms: float
    steps: int  # control steps that have begun meanwhile

    @classmethod
    def of(cls, ms: float, fps: float) -> "Delay":
        """The delay of a chunk that takes `ms`, at `fps` control steps a second."""
        return cls(ms, math.ceil(round(ms * fps / 1000, 6)))

    def in_words(self) -> str:
        """The delay for the report's table."""
        return f"{self.steps} step{'s' * (self.steps != 1)} ({self.ms:.0f} ms)"


def chunk_time(latency_ms: str, measured: ChunkTime) -> ChunkTime:
    """The time of a chunk on the robot: measured here, or as the flag says, `MS` or `PREFIX+STEP`."""
    if latency_ms == MEASURED:
        return measured
    try:
        prefix, step = (float(part) for part in (latency_ms.split("+", 1) if "+" in latency_ms else (latency_ms, "0")))
    except ValueError:
        prefix = step = -1.0
    if not (0 <= prefix < math.inf and 0 <= step < math.inf):
        raise ReflowError(
            f"--latency_ms={latency_ms} is unknown; give {MEASURED}, the milliseconds of a chunk (200), or the "
            "milliseconds of its prefix and of each ODE step (120+35)."
        )
    return ChunkTime(prefix, step, 0.0)


def latest(old: Tensor, new: Tensor) -> Tensor:
    """The new chunk's actions."""
    return new


def aggregation(name: str) -> Aggregate:
    """A function of LeRobot's robot client, of the old and the new actions (B, N, action_dim) of N control steps."""
    if name == LATEST:  # without the client's packages
        return latest
    with doing(f"looking for --aggregate_fn_name={name}"):
        from lerobot.async_inference.configs import get_aggregate_function

        return get_aggregate_function(name)


@contextlib.contextmanager
def executing(late: "LateChunks") -> Iterator[None]:
    """While this is open, the policy's `select_action` gives the actions of chunks that arrive late."""
    binding = bind(late.policy, reset=late.reset, select_action=late.select_action)
    try:
        yield
    finally:
        binding.undo()


class LateChunks:
    """The robot's side: the chunk that it executes, and the chunk that is on its way."""

    def __init__(self, policy: SmolVLAPolicy, delay: int, aggregate: Aggregate = latest):
        size = policy.config.chunk_size
        self.policy, self.delay, self.aggregate = policy, delay, aggregate
        self.every = max(1, min(policy.config.n_action_steps, max(size - delay, size // 2)))
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        type(self.policy).reset(self.policy)
        self.now = 0  # control steps
        self.clock = 0  # actions, which wait while the robot stands still
        self.current: tuple[int, Tensor] | None = None  # the clock at the observation, chunk
        self.coming: tuple[int, int, Tensor] | None = None  # when the chunk is there, and the same

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        """The action (B, action_dim) of this control step, from its observation."""
        self._arrive()
        if self.coming is None and (self.current is None or self.clock - self.current[0] >= self.every):
            wait = 0 if self.current is None else self.delay  # the first chunk is waited for
            self.coming = (self.now + wait, self.clock, self.next_chunk(batch))
        self._arrive()
        assert self.current is not None
        observed, chunk = self.current
        index = self.clock - observed
        self.now += 1
        if index == chunk.shape[1]:
            return chunk[:, -1]
        self.clock += 1
        return chunk[:, index]

    def next_chunk(self, batch: dict[str, Any]) -> Tensor:
        """The chunk (B, chunk_size, action_dim) of an observation."""
        return self.policy.predict_action_chunk(batch)

    def _arrive(self) -> None:
        if self.coming is None or self.now < self.coming[0]:
            return
        _, observed, chunk = self.coming
        if self.current is not None:
            late = self.clock - observed
            old = self.current[1][:, self.clock - self.current[0] :]
            both = min(old.shape[1], chunk.shape[1] - late)
            if both > 0:
                chunk = chunk.clone()
                chunk[:, late : late + both] = self.aggregate(old[:, :both], chunk[:, late : late + both])
        self.current, self.coming = (observed, chunk), None
