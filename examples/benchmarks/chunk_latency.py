"""Latency of one chunk of actions at SmolVLA's real size, by number of ODE steps.

    python examples/benchmarks/chunk_latency.py
    python examples/benchmarks/chunk_latency.py --device=cuda

One frame with two cameras. The numbers of steps are timed in turn. Each line gives the median, the part of the ODE
steps in it, and the speed-up over the largest number of steps. The rest is the prefix (images, language, state), which
is encoded once for any number of steps.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import machine, synchronise

from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.prefix import encode


@dataclass
class BenchmarkConfig:
    device: str = "cpu"
    num_steps: list[int] = field(default_factory=lambda: [10, 2, 1])
    repeats: int = 5


def milliseconds(call: Callable[[], object], batch: dict[str, torch.Tensor]) -> float:
    """Milliseconds of one call."""
    synchronise(batch)
    start = time.perf_counter()
    call()
    synchronise(batch)
    return (time.perf_counter() - start) * 1e3


@torch.no_grad()
def measure(policy: SmolVLAPolicy, cfg: BenchmarkConfig) -> dict[str, float]:
    """Median milliseconds of a chunk at each number of steps, and of the prefix alone."""
    policy.eval()
    batch = make_batch(policy, 1)
    taken: dict[str, list[float]] = {"prefix": [], **{str(n): [] for n in cfg.num_steps}}
    for i in range(cfg.repeats + 1):
        prefix = milliseconds(lambda: encode(policy.model, observe(policy, batch)), batch)
        chunks = {}
        for n in cfg.num_steps:
            policy.config.num_steps = n
            chunks[str(n)] = milliseconds(lambda: policy.predict_action_chunk(dict(batch)), batch)
        if i > 0:  # the first one warms up
            for name, value in {"prefix": prefix, **chunks}.items():
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    cfg = draccus.parse(BenchmarkConfig)
    print(machine(cfg.device))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        policy = make_policy(write_real_size_backbone(Path(folder) / "backbone"), cfg.device)
        found = measure(policy, cfg)
    most = found[str(max(cfg.num_steps))]
    print(f"prefix     {found['prefix']:8.1f} ms")
    for n in cfg.num_steps:
        chunk = found[str(n)]
        steps, faster = chunk - found["prefix"], most / chunk
        print(f"{n:>3} steps  {chunk:8.1f} ms a chunk, the ODE steps in it {steps:8.1f} ms, {faster:5.2f}x as fast")


if __name__ == "__main__":
    main()
