"""Kernels that a training step starts, of SmolVLA at its real size. A GPU's step takes about as long as this number.

    python examples/benchmarks/kernels.py

Runs on the CPU, and counts the operations that PyTorch dispatches, without views and allocations. On a GPU nearly every
operation is one kernel. Variants, on one batch:

    standard      recorded actions, no teacher: `lerobot-train`
    reflow        this package: ten velocity evaluations of the teacher
    cuda graph    the same with --reflow.cuda_graph=true; a replay of the graph counts as one kernel
    by four       the same with four couplings for each frame of the batch

A replay runs the operations here as it does on a GPU, but a GPU is told once.
"""

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolvla_reflow import Recipe, attach

PARTS = ("forward", "backward", "optimizer")
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "device"}


@dataclass
class BenchmarkConfig:
    batch_size: int = 1
    couplings_per_frame: list[int] = field(default_factory=lambda: [1, 4])


def starts_a_kernel(operation: Any, given: Any, result: Any) -> bool:
    """False for operations that only allocate, read a number on the host, or look at memory in another way."""
    if operation.overloadpacket.__name__ in NO_KERNEL:
        return False
    if operation._schema.is_mutable:
        return True
    seen, made = (
        {x.untyped_storage()._cdata for x in tree_leaves(each) if isinstance(x, Tensor)} for each in (given, result)
    )
    return not made <= seen


class Kernels(TorchDispatchMode):
    """Counts operations by the part of the step that starts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.part = ""
        self.replaying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.replaying and starts_a_kernel(func, (args, kwargs), result):
            self.count[self.part] += 1
        return result

    def record(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Stands in for a recording of a CUDA graph."""

        def replay() -> Tensor:
            self.count[self.part] += 1
            self.replaying = True
            try:
                return function(*inputs)
            finally:
                self.replaying = False

        return replay


def kernels_of_a_step(policy: SmolVLAPolicy, batch: dict[str, Tensor], kernels: Kernels) -> Counter[str]:
    """Kernels of one step by part. `foreach` is what AdamW does on a GPU."""
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-6, foreach=True)
    for _ in range(2):  # the first step sets up the optimizer, and records
        kernels.count.clear()
        with kernels:
            kernels.part = "forward"
            loss = policy.forward(dict(batch))[0]
            kernels.part = "backward"
            loss.backward()
            kernels.part = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
    return Counter(kernels.count)


def main() -> None:
    cfg = draccus.parse(BenchmarkConfig)
    print(machine("cpu"))
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        policy = make_policy(write_real_size_backbone(Path(folder) / "backbone")).train()
        batch = make_batch(policy, cfg.batch_size)
        found["standard"] = kernels_of_a_step(policy, batch, Kernels())
        for per_frame in cfg.couplings_per_frame:
            for graph in (False, True):
                with attach(policy, recipe=Recipe(couplings_per_frame=per_frame), cuda_graph=graph) as attachment:
                    kernels = Kernels()
                    if graph:
                        attachment.source.graphs.record = kernels.record
                    name = f"{'cuda graph' if graph else 'reflow'}{f', {per_frame} couplings' if per_frame > 1 else ''}"
                    found[name] = kernels_of_a_step(policy, batch, kernels)
    standard = found["standard"].total()
    print(f"{'':<26}{''.join(f'{part:>11}' for part in PARTS)}{'total':>11}   ratio")
    for name, count in found.items():
        parts = "".join(f"{count[part]:>11}" for part in PARTS)
        print(f"{name:<26}{parts}{count.total():>11}  {count.total() / standard:6.3f}x")


if __name__ == "__main__":
    main()
