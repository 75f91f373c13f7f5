"""Compare recipes: students of one teacher that differ in nothing but how they learn, over several seeds.

    python examples/studies/recipes.py --output_dir=outputs/study                          # the demo's task, driven too
    python examples/studies/recipes.py --output_dir=outputs/study --dataset_root=PATH ...  # recorded frames

Each seed trains a teacher as LeRobot trains it, and of each recipe a student that starts from it. A recipe is
NAME=VALUE NAME=VALUE ... with the names of `Student` below, '' the default; rounds are joined by '>', and the student
of one is the next one's teacher. Everything is in memory, by the import-and-attach API; policies and measurements are
kept, so that an interrupted study goes on. `tasks.py` is what is trained on.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import draccus
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tasks import Batch, Task, demo_task, recorded_task
from tqdm import tqdm

from smolvla_reflow import Recipe, attach
from smolvla_reflow.coupling import Coupling
from smolvla_reflow.evaluation import evaluate
from smolvla_reflow.flow import observe, solve
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import register_loss_strategy

MEASURING_SEED = 1000


@dataclass
class StudyConfig:
    output_dir: Path = Path("outputs/study")
    """Where everything goes; what is there is not made again."""
    dataset_root: Path | None = None
    """A LeRobotDataset with one task; by default the demo's task."""
    action_dims: list[int] | None = None
    """Which of its action dimensions the policy has; all by default."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One teacher, and one student of each recipe, for each."""
    recipes: list[str] = field(
        default_factory=lambda: [
            "",
            "steps=2000",
            "couplings_per_frame=4",
            "strategy=distill",
            "time_sampling=beta",
            "solver=euler",
            "real_data_ratio=0.25",
            " > lr=5e-4",
            " > lr=5e-4 > lr=2.5e-4 strategy=distill",
        ]
    )
    """How students learn."""
    teacher_steps: int = 2000
    """Training steps of the teacher."""
    teacher_lr: float = 2e-3
    """Learning rate of the teacher."""
    frames: int = 64
    """Unseen frames to measure on, each with four noises."""
    episodes: int = 200
    """Episodes to drive at each number of steps, where there is an environment."""


@dataclass
class Student:
    """One round of learning; what is not named is this package's default."""

    strategy: str = "reflow"
    solver: str = Solver.method
    num_steps: int | None = None
    time_sampling: str = Recipe.time_sampling
    couplings_per_frame: int = Recipe.couplings_per_frame
    real_data_ratio: float = Recipe.real_data_ratio
    batch_size: int = 32
    steps: int = 1200
    lr: float = 1e-3

    def recipe(self) -> Recipe:
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


@register_loss_strategy("without_padding", whole_chunk=True)
def without_padding(model, observation, actions, noise=None, time=None):
    """Reflow whose loss leaves out the padded dimensions; the same mean over those that are left."""
    losses = model.forward_reflow(*observation, actions, noise, time)
    width = model.config.action_feature.shape[0]
    losses[..., width:] = 0
    return losses * (losses.shape[-1] / width)


def study(cfg: StudyConfig) -> None:
    """All trainings and measurements, a table after each."""
    if cfg.dataset_root is None:
        task = demo_task(cfg.output_dir)
    else:
        task = recorded_task(cfg.dataset_root, cfg.output_dir, cfg.action_dims)
    found: dict[str, list[dict]] = {"teacher": [], **{recipe: [] for recipe in cfg.recipes}}
    for seed in cfg.seeds:
        folder = cfg.output_dir / f"seed-{seed}"
        teacher = kept(folder / "teacher", partial(new_teacher, task, cfg, seed))
        found["teacher"].append(measured(folder / "teacher", teacher, teacher, task, cfg, seed))
        couplings_of = lru_cache(maxsize=4)(partial(couplings, task=task, seed=seed))
        for recipe in cfg.recipes:
            student, rounds = teacher, []
            for words in recipe.split(">"):
                rounds.append(re.sub(r"[^\w.+]+", "-", words.strip()) or "default")
                place = folder / "_then_".join(rounds)
                student = kept(place, partial(new_student, student, task, words, seed, couplings_of))
            found[recipe].append(measured(place, teacher, student, task, cfg, seed))
            print(table(found), flush=True)


def new_teacher(task: Task, cfg: StudyConfig, seed: int) -> SmolVLAPolicy:
    """Trained on the recorded actions, from random weights."""
    torch.manual_seed(seed)
    policy = task.policy()
    which = torch.randint(len(task.seen["index"]), (cfg.teacher_steps, 32))
    train(policy, (select(task.seen, frames) for frames in which), cfg.teacher_steps, cfg.teacher_lr, seed, "teacher")
    return policy


def new_student(
    teacher: SmolVLAPolicy, task: Task, words: str, seed: int, couplings_of: Callable[..., "Couplings"]
) -> SmolVLAPolicy:
    """One round of reflow, on couplings that all students of this teacher and solver see in the same order."""
    options = draccus.parse(Student, args=[f"--{word}" for word in words.split()])
    student = task.policy(train_expert_only=True)
    student.load_state_dict(teacher.state_dict())
    given = couplings_of(
        teacher, options.solver, options.num_steps, options.steps, options.batch_size, options.couplings_per_frame
    )
    steps = iter(zip(given.noise, given.actions, strict=True))
    batches = (select(task.seen, frames) for frames in given.frames)
    with attach(student, teacher, strategy=options.strategy, recipe=options.recipe()):
        student.model.generate_reflow_target = lambda *observation, noise=None: Coupling(*next(steps))
        train(student, batches, options.steps, options.lr, seed, words or "default")
    return student


@dataclass(frozen=True)
class Couplings:
    """Of a whole training: frames (steps, batch), noise and actions (steps, batch * per_frame, chunk, width)."""

    frames: torch.Tensor
    noise: torch.Tensor
    actions: torch.Tensor


@torch.no_grad()
def couplings(
    teacher: SmolVLAPolicy,
    solver: str,
    num_steps: int | None,
    steps: int,
    batch_size: int,
    per_frame: int,
    *,
    task: Task,
    seed: int,
) -> Couplings:
    """Solved before training, so that recipes which differ in what they make of them share the work."""
    torch.manual_seed(seed)
    config = teacher.config
    frames = torch.randint(len(task.seen["index"]), (steps, batch_size))
    noise = torch.randn(steps, batch_size * per_frame, config.chunk_size, config.max_action_dim)
    ode = Solver(solver, num_steps=num_steps)
    actions = [
        solve(teacher, observe(teacher, select(task.seen, which)), x, ode)
        for which, x in zip(tqdm(frames, desc=f"couplings by {solver}", mininterval=10), noise, strict=True)
    ]
    return Couplings(frames, noise, torch.stack(actions))


def train(policy: SmolVLAPolicy, batches: Iterable[Batch], steps: int, lr: float, seed: int, name: str) -> None:
    """AdamW with SmolVLA's betas, and its schedule: warm-up over 1/30 of the steps, cosine decay to 1/40."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-10)

    def schedule(step: int) -> float:
        return min(30 * (step + 1) / steps, 1 / 40 + 39 / 80 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    torch.manual_seed(seed)
    policy.train()
    for batch in tqdm(batches, total=steps, desc=name, mininterval=10):
        loss, _ = policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    policy.eval()


def select(frames: Batch, which: torch.Tensor) -> Batch:
    return {name: value[which] for name, value in frames.items()}


def kept(folder: Path, make: Callable[[], SmolVLAPolicy]) -> SmolVLAPolicy:
    """The policy in `folder`, made if it is not there."""
    if not (folder / "model.safetensors").exists():
        make().save_pretrained(folder)
    return SmolVLAPolicy.from_pretrained(folder).eval()


def measured(
    folder: Path, teacher: SmolVLAPolicy, policy: SmolVLAPolicy, task: Task, cfg: StudyConfig, seed: int
) -> dict[str, Any]:
    """By number of steps: flow error in standard deviations, spread, and success; made if not there."""
    file, seed = folder / "measured.json", MEASURING_SEED + seed
    if not file.exists():
        chosen = torch.linspace(0, len(task.unseen["index"]) - 1, cfg.frames).round().long()
        contestants = [task.on_frames("teacher", teacher)]
        if policy is not teacher:
            contestants.append(task.on_frames("student", policy))
        rows = evaluate(
            contestants,
            [select(task.unseen, which) for which in chosen.split(32)],
            torch.ones(task.unseen["action"].shape[-1]),
            num_steps=task.num_steps,
            num_noises=4,
            reference_steps=60,
            seed=seed,
        ).rows
        found = {row.num_steps: asdict(row) for row in rows if row.policy == contestants[-1].name}
        for n in task.num_steps:
            success = task.success(policy, n, cfg.episodes, seed)
            found[n]["success"] = success.rate if success else None
        file.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(file.read_text())


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: success in %, flow error in standard deviations, spread; mean ± standard deviation over seeds."""
    steps = list(found["teacher"][0])
    columns = [("success", 100, 1)] if found["teacher"][0][steps[0]]["success"] is not None else []
    columns += [("flow_rmse", 1, 3), ("spread_ratio", 1, 2)]
    head = ["", *(f"{name}, {n}" for name, _, _ in columns for n in steps)]
    lines = [head, ["---"] * len(head)]
    for recipe, runs in found.items():
        cells = [cell([scale * run[n][name] for run in runs], digits) for name, scale, digits in columns for n in steps]
        if runs:
            lines.append([f"`{recipe}`" if recipe else "default", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    study(draccus.parse(StudyConfig))
