"""Latency of one chunk of actions at SmolVLA's real size, by number of ODE steps, as it is and compiled.

    python examples/benchmarks/chunk_latency.py
    python examples/benchmarks/chunk_latency.py --device=cuda --compile_model=true

One frame with two cameras. Each line gives the first call, the median of the others, and the speed-up over the largest
number of steps. A chunk is taken for a prefix (images, language, state) and as many equal steps, by the smallest and
the largest number of steps.

`--compile_model=true` adds LeRobot's own compiled sampler in `--compile_mode`. The default is SmolVLA's own mode,
`max-autotune`, which on a GPU records CUDA graphs. With LeRobot 0.6.1 a compiled sampler keeps the number of steps of
its first call, whatever the config says later. So each number of steps has a policy of its own here.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import machine, synchronise


@dataclass
class BenchmarkConfig:
    device: str = "cpu"
    num_steps: list[int] = field(default_factory=lambda: [10, 2, 1])
    repeats: int = 5
    compile_model: bool = False
    compile_mode: str = SmolVLAConfig.compile_mode


@torch.no_grad()
def measure(policy: SmolVLAPolicy, repeats: int) -> list[float]:
    """Milliseconds of each call."""
    policy.eval()
    batch, taken = make_batch(policy, 1), []
    for _ in range(1 + repeats):
        synchronise(batch)
        start = time.perf_counter()
        policy.predict_action_chunk(dict(batch))
        synchronise(batch)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def report(name: str, taken: dict[int, list[float]]) -> None:
    """Print a table of these calls; the first call of each number is not in its median."""
    medians = {n: statistics.median(calls[1:]) for n, calls in taken.items()}
    fewest, most = min(medians), max(medians)
    step = (medians[most] - medians[fewest]) / max(1, most - fewest)
    print(f"\n{name}: prefix {medians[fewest] - fewest * step:.1f} ms, each ODE step {step:.1f} ms")
    for n, chunk in medians.items():
        print(f"{n:>3} steps  {chunk:8.1f} ms a chunk, {medians[most] / chunk:5.2f}x as fast, first call ", end="")
        print(f"{taken[n][0] / 1e3:.1f} s")


def main() -> None:
    cfg = draccus.parse(BenchmarkConfig)
    print(machine(cfg.device))
    with tempfile.TemporaryDirectory() as folder:
        for compiled in (False, True)[: 1 + cfg.compile_model]:
            with contextlib.redirect_stdout(sys.stderr):
                torch.manual_seed(0)
                backbone = write_real_size_backbone(Path(folder) / "backbone")
                how, taken, policy = {"compile_model": compiled, "compile_mode": cfg.compile_mode}, {}, None
                for n in cfg.num_steps:
                    if compiled or policy is None:
                        torch.compiler.reset()
                        policy = make_policy(backbone, cfg.device, **how)
                    policy.config.num_steps = n
                    taken[n] = measure(policy, cfg.repeats)
            report(f"compiled, {cfg.compile_mode}" if compiled else "eager", taken)


if __name__ == "__main__":
    main()
