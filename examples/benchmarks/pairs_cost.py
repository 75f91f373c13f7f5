"""Cost of making, reading and training on stored pairs, with SmolVLA at its real size.

    python examples/benchmarks/pairs_cost.py

Four measurements:

    training step   from pairs and standard, in turn, and the teacher parameters in memory
    generating      four pairs a frame with one prefix, compared with one `sample_actions` call for each pair
    reading         one random pair of a million, and the memory that reading takes
    rounding        the effect of fewer bits on the actions and on the loss
"""

import contextlib
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import save_file
from timing import machine, synchronise, take_step
from torch import Tensor
from tqdm import tqdm

from smolvla_reflow import Pairs, Solver, attach, detach
from smolvla_reflow.pairs.make import PairMaker
from smolvla_reflow.pairs.manifest import DTYPES, Manifest, Provenance, shard_path
from smolvla_reflow.smolvla.graph import SolveGraphs
from smolvla_reflow.smolvla.observation import observe

COUPLINGS_PER_FRAME, FRAMES_PER_SHARD, READS = 4, 128, 10_000


@dataclass
class BenchmarkConfig:
    device: str = "cpu"
    batch_size: int = 2
    steps: int = 5
    num_pairs: int = 1_000_000
    cuda_graph: bool = False  # the teacher's solve, on a GPU


def provenance(policy: SmolVLAPolicy, total_frames: int) -> Provenance:
    return Provenance(
        teacher="",
        dataset="",
        total_frames=total_frames,
        statistics="",
        solver=Solver("euler", policy.config.num_steps),
        chunk_size=policy.config.chunk_size,
        max_action_dim=policy.config.max_action_dim,
        seed=0,
        couplings_per_frame=COUPLINGS_PER_FRAME,
        dtype="float16",
    )


def write_pairs(folder: Path, policy: SmolVLAPolicy, num_pairs: int) -> Pairs:
    """Write a set of random actions."""
    num_frames = -(-num_pairs // COUPLINGS_PER_FRAME)
    made = provenance(policy, num_frames)
    manifest = Manifest(made, {}, "benchmark", [[0, num_frames]], FRAMES_PER_SHARD)
    shape = (FRAMES_PER_SHARD, COUPLINGS_PER_FRAME, made.chunk_size, made.max_action_dim)
    for shard in tqdm(range(manifest.num_shards), desc="writing pairs", unit="file", leave=False):
        save_file({"actions": torch.randn(shape).half()}, shard_path(folder, shard))
    dataclasses.replace(manifest, checksums=dict.fromkeys(range(manifest.num_shards), "")).write(folder)
    return Pairs(folder)


def training_step(cfg: BenchmarkConfig, policy: SmolVLAPolicy, pairs: Pairs) -> None:
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-6)
    batch = {**make_batch(policy, cfg.batch_size), "index": torch.arange(cfg.batch_size)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return policy.forward(dict(batch))[0]

    standard, from_pairs = [], []
    for _ in range(cfg.steps + 1):
        standard.append(take_step(loss, batch, optimizer))
        attachment = attach(policy, pairs=pairs)
        from_pairs.append(take_step(loss, batch, optimizer))
        teacher = 0 if attachment.teacher is None else sum(p.numel() for p in attachment.teacher.parameters())
        detach(policy)
    medians = [statistics.median(seconds[1:]) for seconds in (standard, from_pairs)]  # the first one warms up
    print(f"training step   standard {medians[0]:.3f} s, from pairs {medians[1]:.3f} s: ", end="")
    print(f"{medians[1] / medians[0]:.3f}x, {teacher} teacher parameters in memory")


def generating(cfg: BenchmarkConfig, policy: SmolVLAPolicy) -> None:
    policy.eval()
    graphs = SolveGraphs() if cfg.cuda_graph else None
    maker = PairMaker(policy, lambda batch: batch, None, provenance(policy, cfg.batch_size), graphs)
    batch = {**make_batch(policy, cfg.batch_size), "index": torch.arange(cfg.batch_size)}
    shape = (cfg.batch_size, policy.config.chunk_size, policy.config.max_action_dim)
    together, separate = [], []
    for _ in range(max(2, cfg.steps // 2) + 1):
        start = time.perf_counter()
        maker(batch)
        synchronise(batch)
        together.append((time.perf_counter() - start) / (cfg.batch_size * COUPLINGS_PER_FRAME))
        start = time.perf_counter()
        with torch.no_grad():
            policy.model.sample_actions(*observe(policy, batch), noise=torch.randn(shape, device=cfg.device))
        synchronise(batch)
        separate.append((time.perf_counter() - start) / cfg.batch_size)
    medians = [statistics.median(seconds[1:]) for seconds in (separate, together)]
    print(f"generating      {medians[0]:.3f} s a pair by sample_actions, {medians[1]:.3f} s by fours: ", end="")
    print(f"{medians[1] / medians[0]:.2f}x")


def reading(pairs: Pairs) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    frames, draw = pairs.manifest.num_frames, random.Random(0)
    pairs.lookup(0, 0)
    before, milliseconds = resident(), []
    for _ in range(READS):
        frame, pair = draw.randrange(frames), draw.randrange(COUPLINGS_PER_FRAME)
        start = time.perf_counter()
        pairs.lookup(frame, pair)
        milliseconds.append((time.perf_counter() - start) * 1e3)
    milliseconds.sort()
    print(
        f"reading         one of {len(pairs)} pairs ({pairs.manifest.num_shards} files): median "
        f"{milliseconds[READS // 2]:.3f} ms, 99 % below {milliseconds[READS * 99 // 100]:.3f} ms; "
        f"memory after {READS} reads {(resident() - before) / 2**20:+.1f} MiB"
    )


def rounding(cfg: BenchmarkConfig, policy: SmolVLAPolicy) -> None:
    policy.eval()
    batch = make_batch(policy, cfg.batch_size)
    inputs = observe(policy, batch)
    torch.manual_seed(0)
    noise = torch.randn(cfg.batch_size, policy.config.chunk_size, policy.config.max_action_dim, device=cfg.device)
    time_ = torch.rand(cfg.batch_size, device=cfg.device)
    with torch.no_grad():
        actions = policy.model.sample_actions(*inputs, noise=noise)
        exact = policy.model.forward(*inputs, actions, noise, time_).mean().item()
        for name, dtype in DTYPES.items():
            stored = actions.to(dtype).float()
            error = (stored - actions).square().mean().sqrt().item()
            loss = policy.model.forward(*inputs, stored, noise, time_).mean().item()
            size = policy.config.chunk_size * policy.config.max_action_dim * dtype.itemsize
            print(
                f"rounding        {name:<8} {size:>5} bytes a pair, actions off by {error:.1e} (RMS), "
                f"loss by {abs(loss - exact) / exact:.1e} of itself"
            )


def main() -> None:
    cfg = draccus.parse(BenchmarkConfig)
    print(machine(cfg.device))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(sys.stderr):
            policy = make_policy(write_real_size_backbone(Path(folder) / "backbone"), cfg.device)
        (Path(folder) / "pairs").mkdir()
        pairs = write_pairs(Path(folder) / "pairs", policy, cfg.num_pairs)
        rounding(cfg, policy)
        reading(pairs)
        generating(cfg, policy)
        training_step(cfg, policy, pairs)


if __name__ == "__main__":
    main()
