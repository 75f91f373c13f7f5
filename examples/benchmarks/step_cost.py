"""What a reflow training step costs next to a standard one, on SmolVLA at its real size.

    python examples/benchmarks/step_cost.py
    python examples/benchmarks/step_cost.py --device=cuda --batch_sizes='[2,8,32]' --compile_model=true

Four ways to train the same student on the same batch:

    standard         recorded actions, no teacher: `lerobot-train`
    naive            a second policy is loaded as the teacher, and looks at the images again
    shared weights   the teacher holds only what differs, and looks at the images again
    reflow           what this package does: weights and vision features are shared

Seconds are medians over interleaved steps (forward, backward, AdamW) in one process; the ratio is to the standard
step. Memory is the peak of a process of its own that loads a checkpoint and its teacher and trains two steps.
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
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from timing import Loss, machine, take_step
from torch import Tensor

from smolvla_reflow import attach, is_attached, register_loss_strategy
from smolvla_reflow.flow import observe

STANDARD, NAIVE, SHARED_WEIGHTS, REFLOW = VARIANTS = ("standard", "naive", "shared weights", "reflow")


@dataclass
class BenchmarkConfig:
    device: str = "cpu"
    batch_sizes: list[int] = field(default_factory=lambda: [2])
    steps: int = 5
    compile_model: bool = False
    # Internal: measure the peak memory of one variant on this checkpoint.
    checkpoint: Path | None = None
    variant: str = REFLOW


@register_loss_strategy("reflow, images encoded twice", whole_chunk=True)
def images_encoded_twice(model, observation, actions, noise=None, time=None):
    """Reflow whose teacher is shown copies of the images, which it cannot recognise."""
    copies = observation._replace(images=[image.clone() for image in observation.images])
    coupling = model.generate_reflow_target(*copies, noise=noise)
    return model.forward_standard(*observation, coupling.actions, coupling.noise, time)


def prepare(variant: str, student: SmolVLAPolicy, checkpoint: Path) -> Loss:
    """The loss of one variant; its teacher is loaded from the checkpoint."""
    if variant == STANDARD:
        return lambda batch: student.forward(dict(batch))[0]
    if variant == NAIVE:
        teacher = SmolVLAPolicy.from_pretrained(checkpoint).eval().requires_grad_(False)

        def naive(batch: dict[str, Tensor]) -> Tensor:
            inputs = observe(student, batch)
            with torch.no_grad():
                config = student.config
                noise = torch.randn(
                    len(inputs.state), config.chunk_size, config.max_action_dim, device=inputs.state.device
                )
                actions = teacher.model.sample_actions(*inputs, noise=noise)
            return student.model.forward(*inputs, actions, noise).mean()

        return naive

    if not is_attached(student):
        attach(student, checkpoint)

    def attached(batch: dict[str, Tensor]) -> Tensor:
        student.model.training_mode = "reflow" if variant == REFLOW else "reflow, images encoded twice"
        return student.forward(dict(batch))[0]

    return attached


def load_student(cfg: BenchmarkConfig, checkpoint: Path) -> SmolVLAPolicy:
    student = SmolVLAPolicy.from_pretrained(checkpoint)
    if cfg.compile_model:
        student.model.forward = torch.compile(student.model.forward)  # as LeRobot does
    return student.train()


def time_steps(cfg: BenchmarkConfig, checkpoint: Path, batch_size: int) -> dict[str, float]:
    """Median seconds of each variant's step, taken in turn."""
    # Two students, since a standard step knows no attachment; one optimizer each.
    plain, taught = load_student(cfg, checkpoint), load_student(cfg, checkpoint)
    losses = {
        variant: prepare(variant, plain if variant in (STANDARD, NAIVE) else taught, checkpoint) for variant in VARIANTS
    }
    optimizers = {policy: torch.optim.AdamW(policy.get_optim_params(), lr=1e-6) for policy in (plain, taught)}
    batch = make_batch(plain, batch_size)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(cfg.steps + 1):
        for variant in VARIANTS:
            optimizer = optimizers[plain if variant in (STANDARD, NAIVE) else taught]
            taken = take_step(losses[variant], batch, optimizer)
            if i > 0:  # the first one warms up
                seconds[variant].append(taken)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def measure_memory(cfg: BenchmarkConfig, checkpoint: Path) -> dict[str, float]:
    """Unique parameters, and peak memory in bytes, of one variant in this process."""
    student = load_student(cfg, checkpoint)
    loss = prepare(cfg.variant, student, checkpoint)
    closure = {cell.cell_contents for cell in loss.__closure__ or () if isinstance(cell.cell_contents, SmolVLAPolicy)}
    policies = [*closure, *([student.model.teacher] if is_attached(student) else [])]
    unique = {p.untyped_storage().data_ptr(): p.numel() for policy in policies for p in policy.parameters()}
    optimizer = torch.optim.AdamW(student.get_optim_params(), lr=1e-6)
    batch = make_batch(student, cfg.batch_sizes[0])
    for _ in range(2):
        take_step(loss, batch, optimizer)
    if cfg.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"parameters": sum(unique.values()), "peak": peak}


def memory_of(cfg: BenchmarkConfig, variant: str, checkpoint: Path, batch_size: int) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    flags = [
        f"--checkpoint={checkpoint}",
        f"--variant={variant}",
        f"--device={cfg.device}",
        f"--batch_sizes=[{batch_size}]",
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
    print(f"{machine(cfg.device)}, compile_model={cfg.compile_model}")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        checkpoint = Path(folder) / "checkpoint"
        torch.manual_seed(0)
        policy = make_policy(write_real_size_backbone(Path(folder) / "backbone"), cfg.device)
        model_bytes = sum(p.numel() * p.element_size() for p in policy.parameters())
        model_size = sum(p.numel() for p in policy.parameters())
        policy.save_pretrained(checkpoint)
        del policy
        for batch_size in cfg.batch_sizes:
            memory = {variant: memory_of(cfg, variant, checkpoint, batch_size) for variant in VARIANTS}
            seconds = time_steps(cfg, checkpoint, batch_size)
            title = f"batch {batch_size}"
            lines = [f"\n{title:<15} s/step  ratio   parameters   extra   peak memory  extra, of the model's"]
            for variant in VARIANTS:
                parameters, peak = memory[variant]["parameters"], memory[variant]["peak"]
                lines.append(
                    f"{variant:<15} {seconds[variant]:6.3f}  {seconds[variant] / seconds[STANDARD]:4.2f}x  "
                    f"{parameters / 1e6:8.1f} M  {parameters / model_size - 1:6.1%}  {peak / 1e9:8.2f} GB  "
                    f"{(peak - memory[STANDARD]['peak']) / model_bytes:6.1%}"
                )
            print("\n".join(lines), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
