"""Cost of a reflow training step compared with a standard step, on SmolVLA at its real size.

    python examples/benchmarks/step_cost.py
    python examples/benchmarks/step_cost.py --device=cuda --batch_sizes='[2,8,32]' --autocast=true
    python examples/benchmarks/step_cost.py --device=cuda --batch_sizes='[8]' --autocast=true \
        --variants='[standard, reflow]' --compile_model=true

Variants, all with the same student on the same batch:

    standard            recorded actions, no teacher: `lerobot-train`
    naive               a second policy as the teacher, which encodes the prefix again; 10 Euler steps
    reflow              this package: the prefix is encoded once for both, without gradient; 10 velocity evaluations
    cuda graph          the same with --reflow.cuda_graph=true, for a GPU
    midpoint            the same with --reflow.solver=midpoint, 20 evaluations
    by four             with four couplings for each frame of the batch
    by four, midpoint   the same with 20 evaluations
    by four, cuda graph the same with --reflow.cuda_graph=true
    state_proj trained  this package without a shared prefix, by --reflow.train_state_proj=true

Seconds are medians over interleaved steps (forward, backward, AdamW) in one process. The ratio is to the standard
step. Compiled steps run one variant after another, because each attached teacher records its CUDA graphs anew. Memory
is the peak of a separate process that loads a checkpoint and its teacher and trains two steps.
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import torch
from architecture import make_batch, make_policy, write_real_size_backbone
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import Loss, machine, take_step
from torch import Tensor

from smolvla_reflow import Attachment, Recipe, Solver, attach
from smolvla_reflow.smolvla.observation import observe


@dataclass(frozen=True)
class Attached:
    """A way to train with an attached teacher."""

    solver: str = Solver.method
    couplings_per_frame: int = 1
    train_state_proj: bool = False
    cuda_graph: bool = False

    def attach(self, student: SmolVLAPolicy, checkpoint: Path) -> Attachment:
        recipe = Recipe(couplings_per_frame=self.couplings_per_frame)
        attached = attach(
            student,
            checkpoint,
            solver=self.solver,
            recipe=recipe,
            train_state_proj=self.train_state_proj,
            cuda_graph=self.cuda_graph,
        )
        assert (attached.sharing.why_not_shared is None) is not self.train_state_proj  # what is measured
        return attached


STANDARD, NAIVE = "standard", "naive"
REFLOW = {
    "reflow": Attached(),
    "midpoint": Attached("midpoint"),
    "by four": Attached(couplings_per_frame=4),
    "by four, midpoint": Attached("midpoint", couplings_per_frame=4),
    "state_proj trained": Attached(train_state_proj=True),
    "cuda graph": Attached(cuda_graph=True),
    "by four, cuda graph": Attached(couplings_per_frame=4, cuda_graph=True),
}
VARIANTS = (STANDARD, NAIVE, *(name for name, each in REFLOW.items() if not each.cuda_graph))
WARM_UP = 3  # compiled steps: one compiles, and one records the CUDA graphs


@dataclass
class BenchmarkConfig:
    device: str = "cpu"
    batch_sizes: list[int] = field(default_factory=lambda: [2])
    steps: int = 5
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))  # standard among them
    compile_model: bool = False
    compile_mode: str = SmolVLAConfig.compile_mode
    autocast: bool = False  # to bfloat16
    memory: bool = True  # measured in a process for each variant
    # Internal: measure the peak memory of one variant on this checkpoint.
    checkpoint: Path | None = None
    variant: str = STANDARD


def naive_loss(student: SmolVLAPolicy, teacher: SmolVLAPolicy) -> Loss:
    """The obvious reflow loss, with a second policy as the teacher."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs, config = observe(student, batch), student.config
        shape = (len(inputs.state), config.chunk_size, config.max_action_dim)
        with torch.no_grad():
            noise = torch.randn(shape, device=inputs.state.device)
            actions = teacher.model.sample_actions(*inputs, noise=noise)
        return student.model.forward(*inputs, actions, noise).mean()

    return loss


def own_loss(student: SmolVLAPolicy) -> Loss:
    """The loss of the student's forward, attached or not."""
    return lambda batch: student.forward(dict(batch))[0]


def load(cfg: BenchmarkConfig, checkpoint: Path) -> SmolVLAPolicy:
    config = PreTrainedConfig.from_pretrained(checkpoint)
    config.compile_model, config.compile_mode = cfg.compile_model, cfg.compile_mode
    return SmolVLAPolicy.from_pretrained(checkpoint, config=config)


def load_naive_teacher(cfg: BenchmarkConfig, checkpoint: Path) -> SmolVLAPolicy:
    return load(cfg, checkpoint).eval().requires_grad_(False)


def time_steps(cfg: BenchmarkConfig, checkpoint: Path, batch_size: int) -> dict[str, float]:
    """Median seconds of each variant's step, taken in turn unless compiled."""
    student, teacher = load(cfg, checkpoint).train(), load_naive_teacher(cfg, checkpoint)
    optimizer = torch.optim.AdamW(student.get_optim_params(), lr=0.0)  # so that the student stays equal to its teacher
    batch = make_batch(student, batch_size)
    seconds: dict[str, list[float]] = {variant: [] for variant in cfg.variants}
    turns, at_once = (1, WARM_UP + cfg.steps) if cfg.compile_model else (1 + cfg.steps, 1)
    for _ in range(turns):
        for variant in cfg.variants:
            # Not timed: a training attaches once, before its first step.
            with REFLOW[variant].attach(student, checkpoint) if variant in REFLOW else contextlib.nullcontext():
                loss = naive_loss(student, teacher) if variant == NAIVE else own_loss(student)
                if variant in REFLOW and REFLOW[variant].cuda_graph:  # records the graph
                    take_step(loss, batch, optimizer, cfg.autocast)
                seconds[variant] += [take_step(loss, batch, optimizer, cfg.autocast) for _ in range(at_once)]
    return {variant: statistics.median(values[-cfg.steps :]) for variant, values in seconds.items()}


def measure_memory(cfg: BenchmarkConfig, checkpoint: Path) -> dict[str, float]:
    """Unique parameters, and peak memory in bytes, of one variant in this process."""
    student, loss, teacher = load(cfg, checkpoint).train(), None, None
    if cfg.variant == NAIVE:
        teacher = load_naive_teacher(cfg, checkpoint)
        loss = naive_loss(student, teacher)
    elif cfg.variant in REFLOW:
        teacher = REFLOW[cfg.variant].attach(student, checkpoint).teacher
    policies = [student] if teacher is None else [student, teacher]
    unique = {p.untyped_storage().data_ptr(): p.numel() for policy in policies for p in policy.parameters()}
    optimizer = torch.optim.AdamW(student.get_optim_params(), lr=1e-6)
    batch = make_batch(student, cfg.batch_sizes[0])
    for _ in range(2):
        take_step(loss or own_loss(student), batch, optimizer, cfg.autocast)
    if cfg.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"parameters": sum(unique.values()), "peak": peak}


def memory_of(cfg: BenchmarkConfig, variant: str, checkpoint: Path, batch_size: int) -> dict[str, float]:
    """`measure_memory` in a separate process."""
    flags = [
        f"--checkpoint={checkpoint}",
        f"--variant={variant}",
        f"--device={cfg.device}",
        f"--batch_sizes=[{batch_size}]",
        f"--compile_model={cfg.compile_model}",
        f"--compile_mode={cfg.compile_mode}",
        f"--autocast={cfg.autocast}",
    ]
    command = [sys.executable, __file__, *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    cfg = draccus.parse(BenchmarkConfig)
    if cfg.checkpoint is not None:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure_memory(cfg, cfg.checkpoint)
        print(json.dumps(measured))
        return
    compiled = cfg.compile_mode if cfg.compile_model else False
    print(f"{machine(cfg.device)}, compiled={compiled}, autocast={cfg.autocast}")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        checkpoint = Path(folder) / "checkpoint"
        torch.manual_seed(0)
        policy = make_policy(write_real_size_backbone(Path(folder) / "backbone"), cfg.device)
        model_bytes = sum(p.numel() * p.element_size() for p in policy.parameters())
        model_size = sum(p.numel() for p in policy.parameters())
        policy.save_pretrained(checkpoint)
        del policy
        for batch_size in cfg.batch_sizes:
            memory = {}
            if cfg.memory:
                memory = {variant: memory_of(cfg, variant, checkpoint, batch_size) for variant in cfg.variants}
            seconds = time_steps(cfg, checkpoint, batch_size)
            title = f"batch {batch_size}"
            of_memory = "   parameters   extra   peak memory  extra, of the model's" if memory else ""
            lines = [f"\n{title:<19} s/step  ratio{of_memory}"]
            for variant in cfg.variants:
                line = f"{variant:<19} {seconds[variant]:6.3f}  {seconds[variant] / seconds[STANDARD]:4.2f}x"
                if memory:
                    parameters, peak = memory[variant]["parameters"], memory[variant]["peak"]
                    line += (
                        f"  {parameters / 1e6:8.1f} M  {parameters / model_size - 1:6.1%}  {peak / 1e9:8.2f} GB  "
                        f"{(peak - memory[STANDARD]['peak']) / model_bytes:6.1%}"
                    )
                lines.append(line)
            print("\n".join(lines), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
