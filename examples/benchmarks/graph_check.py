"""Check on a GPU that a recorded solve changes nothing: couplings, losses, memory. SmolVLA at its real size.

    python examples/benchmarks/graph_check.py --device=cuda

Three comparisons of --reflow.cuda_graph=true with false, in float32 and in bfloat16 autocast:

    couplings   of three batches, and of a smaller one: equal bit for bit
    losses      of `steps` training steps with the same random numbers, a quarter of them in autocast
    memory      the peak of those steps
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import machine
from torch import Tensor

from smolvla_reflow import attach
from smolvla_reflow.smolvla.observation import observe


@dataclass
class CheckConfig:
    device: str = "cuda"
    batch_size: int = 8
    steps: int = 200


def couplings(policy: SmolVLAPolicy, cfg: CheckConfig) -> list[Tensor]:
    """The actions of four batches, from the same noise and grids in every call."""
    torch.manual_seed(0)
    sizes = (*[cfg.batch_size] * 3, max(1, cfg.batch_size // 2))
    batches = [make_batch(policy, size, seed) for seed, size in enumerate(sizes)]
    return [policy.model.generate_reflow_target(*observe(policy, batch)).actions for batch in batches]


def training(
    policy: SmolVLAPolicy, cfg: CheckConfig, start: dict[str, Tensor], steps: int, autocast: bool
) -> list[float]:
    """The losses of some steps from these weights."""
    policy.load_state_dict(start)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-5)
    batches = [make_batch(policy, cfg.batch_size, seed) for seed in range(4)]
    losses = []
    torch.manual_seed(0)
    for step in range(steps):
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=autocast):
            loss = policy.forward(dict(batches[step % 4]))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    cfg = draccus.parse(CheckConfig)
    print(machine(cfg.device))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        policy = make_policy(write_real_size_backbone(Path(folder) / "backbone"), cfg.device).train()
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for autocast in (False, True):
        solved, losses, peaks, recorded = [], [], [], []
        steps = -(-cfg.steps // 4) if autocast else cfg.steps
        for graph in (False, True):
            policy.load_state_dict(start)
            with attach(policy, cuda_graph=graph) as attachment:
                with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=autocast):
                    solved.append(couplings(policy, cfg))
                if cfg.device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                losses.append(training(policy, cfg, start, steps, autocast))
                peaks.append(torch.cuda.max_memory_allocated() / 1e9 if cfg.device.startswith("cuda") else 0.0)
                recorded.append(len(attachment.source.graphs.recorded) if graph else 0)
        equal = sum(torch.equal(*each) for each in zip(*solved, strict=True))
        furthest = max(abs(a - b) for a, b in zip(*losses, strict=True))
        print(f"{'bfloat16 autocast' if autocast else 'float32'}: {recorded[1]} graphs recorded")
        print(f"  couplings   {equal} of {len(solved[0])} batches equal bit for bit")
        print(f"  losses      {steps} steps, at most {furthest:.2g} apart, the last {losses[0][-1]:.6f}")
        print(f"  memory      peak {peaks[0]:.2f} GB without, {peaks[1]:.2f} GB with")


if __name__ == "__main__":
    main()
