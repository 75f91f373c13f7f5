"""Compare students of one teacher that differ only in how they learn, over several seeds.

    python examples/studies/recipes.py --output_dir=outputs/study                          # the demo's task, driven too
    python examples/studies/recipes.py --output_dir=outputs/study --dataset_root=PATH ...  # any recorded dataset

For each seed a teacher is trained as LeRobot trains it, and from it one student of each variant that --recipes names.
A variant is NAME=VALUE NAME=VALUE ... with the names of `Student` below, and '' the default. Rounds of reflow are
joined by '>': the student of one round is the teacher of the next. Nothing but the policies and the measurements is
written to disk; those that are there already are not made again, so an interrupted study can be continued.
`tasks.py` has the data and the policy's configuration.
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

from smolvla_reflow import Coupling, Losses, Recipe, Solver, Step, attach, register_loss_strategy
from smolvla_reflow.coupling import CouplingSource, solve
from smolvla_reflow.evaluation.measure import Settings, evaluate
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.solver import JITTERED, SolverFlags

MEASURING_SEED = 1000
VARIANTS = (  # what --recipes is by default
    "",
    "steps=2000",
    "couplings_per_frame=4",
    "strategy=distill",
    "time_sampling=beta",
    "solver=midpoint",
    "solver=midpoint num_steps=5",
    "solver=euler",
    "train_state_proj=true",
    "real_data_ratio=0.25",
    " > lr=5e-4",
    " > lr=5e-4 > lr=2.5e-4 strategy=distill",
)


@dataclass
class StudyConfig:
    output_dir: Path = Path("outputs/study")
    """Folder for policies and measurements; those that are there already are not made again."""
    dataset_root: Path | None = None
    """Folder of a LeRobotDataset with a single task, to train on instead of the demo's task."""
    action_dims: list[int] | None = None
    """Indices of the action dimensions that the policy learns, by default all of them."""
    width: int = 128
    """Of the backbone for a recorded dataset; the action expert is three quarters as wide."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds, each with a teacher and one student of each variant of its own."""
    recipes: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Variants to compare, each NAME=VALUE ... of what its students do differently; rounds are joined by '>'."""
    teacher_steps: int = 2000
    """Training steps of the teacher."""
    teacher_lr: float = 2e-3
    """Learning rate of the teacher."""
    frames: int = 64
    """Number of unseen frames to measure on, each with four noises."""
    episodes: int = 200
    """Episodes in the simulator for each policy and number of steps, where there is one."""


@dataclass
class Student(SolverFlags):
    """One round of reflow, as the words of a variant describe it; the defaults are this package's."""

    solver: str = JITTERED
    strategy: str = "reflow"
    time_sampling: str = Recipe.time_sampling
    couplings_per_frame: int = Recipe.couplings_per_frame
    real_data_ratio: float = Recipe.real_data_ratio
    train_state_proj: bool = False
    batch_size: int = 32
    steps: int = 1200
    lr: float = 1e-3

    def recipe(self) -> Recipe:
        """The part that `attach` takes as a Recipe."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


@register_loss_strategy("without_padding")
def without_padding(step: Step) -> Losses:
    """Reflow on the robot's own action dimensions, without the padded ones."""
    width, padded_width = step.model.config.action_feature.shape[0], step.actions.shape[-1]
    # The loss is a mean over the padded width, so the dimensions that count are weighed up.
    weights = torch.zeros(1, 1, padded_width)
    weights[..., :width] = padded_width / width
    return step.losses(step.coupling(), weights=weights)


def study(cfg: StudyConfig) -> None:
    """Train and measure everything, and print a table after each student."""
    if cfg.dataset_root is None:
        task = demo_task(cfg.output_dir)
    else:
        task = recorded_task(cfg.dataset_root, cfg.output_dir, cfg.width, cfg.action_dims)
    found: dict[str, list[dict]] = {"teacher": [], **{variant: [] for variant in cfg.recipes}}
    for seed in cfg.seeds:
        folder = cfg.output_dir / f"seed-{seed}"
        teacher = kept(folder / "teacher", partial(new_teacher, task, cfg, seed))
        found["teacher"].append(measured(folder / "teacher", teacher, teacher, task, cfg, seed))
        couplings_of = lru_cache(maxsize=4)(partial(couplings, task=task, seed=seed))
        for variant in cfg.recipes:
            student, rounds = teacher, []
            for words in variant.split(">"):
                rounds.append(re.sub(r"[^\w.+]+", "-", words.strip()) or "default")
                place = folder / "_then_".join(rounds)
                student = kept(place, partial(new_student, student, task, words, seed, couplings_of))
            found[variant].append(measured(place, teacher, student, task, cfg, seed))
            print(table(found), flush=True)


def new_teacher(task: Task, cfg: StudyConfig, seed: int) -> SmolVLAPolicy:
    """Train a teacher on the recorded actions, from random weights."""
    torch.manual_seed(seed)
    policy = task.policy()
    which = torch.randint(len(task.seen["index"]), (cfg.teacher_steps, 32))
    train(policy, (select(task.seen, frames) for frames in which), cfg.teacher_steps, cfg.teacher_lr, seed, "teacher")
    return policy


def new_student(
    teacher: SmolVLAPolicy, task: Task, words: str, seed: int, couplings_of: Callable[..., "Couplings"]
) -> SmolVLAPolicy:
    """Train a student of this teacher, on couplings that all its students with this solver see in the same order."""
    options = draccus.parse(Student, args=[f"--{word}" for word in words.split()])
    student = task.policy(train_expert_only=True)
    student.load_state_dict(teacher.state_dict())
    given = couplings_of(teacher, options.to_solver(), options.steps, options.batch_size, options.couplings_per_frame)
    batches = (select(task.seen, frames) for frames in given.frames)
    with attach(
        student,
        pairs=given.source(),
        strategy=options.strategy,
        recipe=options.recipe(),
        train_state_proj=options.train_state_proj,
    ):
        train(student, batches, options.steps, options.lr, seed, words or "default")
    return student


@dataclass(frozen=True)
class Couplings:
    """The couplings of a whole training.

    Attributes:
        frames: (steps, batch) positions in `Task.seen`.
        noise: (steps, batch * per_frame, chunk_size, max_action_dim).
        actions: of the same shape, what the teacher carries the noise to.
    """

    frames: torch.Tensor
    noise: torch.Tensor
    actions: torch.Tensor

    def source(self) -> CouplingSource:
        """A function that gives one step's couplings at each call, in order; of the last frames if not shown all."""
        steps = iter(zip(self.noise, self.actions, strict=True))

        def next_step(observation, *, frames, noise, per_frame) -> Coupling:
            made = next(steps)
            return Coupling(*(ends[len(ends) - per_frame * len(observation.state) :] for ends in made))

        return next_step


@torch.no_grad()
def couplings(
    teacher: SmolVLAPolicy, solver: Solver, steps: int, batch_size: int, per_frame: int, *, task: Task, seed: int
) -> Couplings:
    """Solve the teacher's ODE for a whole training in advance, so that several variants can share the work."""
    torch.manual_seed(seed)
    config = teacher.config
    frames = torch.randint(len(task.seen["index"]), (steps, batch_size))
    noise = torch.randn(steps, batch_size * per_frame, config.chunk_size, config.max_action_dim)
    actions = [
        solve(teacher, observe(teacher, select(task.seen, which)), x, solver)
        for which, x in zip(tqdm(frames, desc=f"couplings by {solver.method}", mininterval=10), noise, strict=True)
    ]
    return Couplings(frames, noise, torch.stack(actions))


def train(policy: SmolVLAPolicy, batches: Iterable[Batch], steps: int, lr: float, seed: int, name: str) -> None:
    """Train with AdamW, SmolVLA's betas and its schedule: warm-up over 1/30 of the steps, cosine decay to 1/40."""
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
    """The frames at these positions."""
    return {name: value[which] for name, value in frames.items()}


def kept(folder: Path, make: Callable[[], SmolVLAPolicy]) -> SmolVLAPolicy:
    """The policy stored in `folder`, made and stored first if it is not there."""
    if not (folder / "model.safetensors").exists():
        make().save_pretrained(folder)
    return SmolVLAPolicy.from_pretrained(folder).eval()


def measured(
    folder: Path, teacher: SmolVLAPolicy, policy: SmolVLAPolicy, task: Task, cfg: StudyConfig, seed: int
) -> dict[str, Any]:
    """A policy's row of the evaluation, with its success rate, by number of steps; measured if not in `folder`."""
    file, seed = folder / "measured.json", MEASURING_SEED + seed
    if not file.exists():
        chosen = torch.linspace(0, len(task.unseen["index"]) - 1, cfg.frames).round().long()
        policies = [task.on_frames("teacher", teacher)]
        if policy is not teacher:
            policies.append(task.on_frames("student", policy))
        deviations = torch.ones(task.unseen["action"].shape[-1])
        settings = Settings(deviations, num_steps=task.num_steps, num_noises=4, reference_steps=None, seed=seed)
        rows = evaluate(policies, [select(task.unseen, which) for which in chosen.split(32)], settings).rows()
        found = {row.num_steps: asdict(row) for row in rows if row.policy == policies[-1].name}
        for row in found.values():
            row["energy_distance"] = row["energy_distance"]["value"]
        for n in task.num_steps:
            success = task.success(policy, n, cfg.episodes, seed)
            found[n]["success"] = success.rate if success else None
        file.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(file.read_text())


def table(found: dict[str, list[dict]]) -> str:
    """A table in Markdown: success in %, energy distance, flow error, spread; mean ± deviation over seeds."""
    steps = list(found["teacher"][0])
    columns = [("success", 100, 1)] if found["teacher"][0][steps[0]]["success"] is not None else []
    columns += [("energy_distance", 1, 4), ("flow_rmse", 1, 3), ("spread_ratio", 1, 2)]
    head = ["", *(f"{name}, {n}" for name, _, _ in columns for n in steps)]
    lines = [head, ["---"] * len(head)]
    for variant, runs in found.items():
        cells = [cell([scale * run[n][name] for run in runs], digits) for name, scale, digits in columns for n in steps]
        if runs:
            lines.append([f"`{variant}`" if variant else "default", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(values: list[float], digits: int) -> str:
    """The mean as text and, of several values, their standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    study(draccus.parse(StudyConfig))
