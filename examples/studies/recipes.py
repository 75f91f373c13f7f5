"""Compare students of one teacher that differ only in their training, over several seeds.

    python examples/studies/recipes.py --output_dir=outputs/study                          # the demo's task, driven too
    python examples/studies/recipes.py --output_dir=outputs/study --dataset_root=PATH ...  # any recorded dataset
    python examples/studies/recipes.py --output_dir=outputs/study --pusht_root=PATH ...    # PushT, driven too

Each seed trains a teacher as LeRobot trains it, and one student of this teacher for each variant in --recipes.
A variant is NAME=VALUE NAME=VALUE ... with the names of `Student` below, and '' is the default. Rounds of reflow are
joined by '>': the student of one round is the teacher of the next. Only policies and measurements are written to disk.
Existing files are kept, so an interrupted study can be continued. `tasks.py` has the data and the policy's
configuration, `tables.py` the printed tables.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import draccus
import pandas as pd
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tables import differences, table
from tasks import Batch, Task, demo_task, pusht_task, recorded_task
from tqdm import tqdm

from smolvla_reflow import Coupling, Recipe, Solver, Step, attach, get_loss_strategy, register_loss_strategy
from smolvla_reflow.coupling import CouplingSource
from smolvla_reflow.distance import FINE_STEPS
from smolvla_reflow.evaluation.measure import Cell, Settings, measure_batch, summary
from smolvla_reflow.evaluation.start import ZEROS
from smolvla_reflow.noise import scaled
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.solver import SolverFlags

MEASURING_SEED = 1000
SHIFT = 4
VARIANTS = (  # the default of --recipes
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
    """Folder for policies and measurements. Existing files are kept."""
    dataset_root: Path | None = None
    """Folder of a LeRobotDataset with a single task, to train on instead of the demo's task."""
    action_dims: list[int] | None = None
    """Indices of the action dimensions that the policy learns (default: all)."""
    pusht_root: Path | None = None
    """Folder of the dataset `pusht_pose`, to train on PushT instead."""
    width: int = 128
    """Width of the backbone for a recorded dataset. The action expert is three quarters as wide."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds. Each has its own teacher, and its own student of each variant."""
    recipes: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Variants to compare, each a list of NAME=VALUE that differ from the default; rounds are joined by '>'."""
    teacher_steps: int = 2000
    """Training steps of the teacher."""
    teacher_lr: float = 2e-3
    """Learning rate of the teacher."""
    teacher_batch_size: int = 32
    """Frames in each training step of the teacher."""
    frames: int = 64
    """Number of unseen frames to measure on, with four noises each."""
    episodes: int = 200
    """Episodes in the simulator for each policy and number of steps, where there is one."""
    zeros: bool = False
    """Run the same episodes from zeros as well, in place of noise."""


@dataclass
class Student(SolverFlags):
    """One round of reflow, as the words of a variant describe it. Defaults as in `smolvla-reflow-train`."""

    strategy: str = "reflow"
    time_sampling: str = Recipe.time_sampling
    couplings_per_frame: int = Recipe.couplings_per_frame
    weighting: str = Recipe.weighting
    padding_weight: float = Recipe.padding_weight
    real_data_ratio: float = Recipe.real_data_ratio
    scaled_noise: float = Recipe.scaled_noise
    train_state_proj: bool = False
    batch_size: int = 32
    steps: int = 1200
    batches: int | None = None
    """Batches of couplings (default: one for each step). More steps than batches repeat them, as with stored pairs."""
    lr: float = 1e-3

    def recipe(self) -> Recipe:
        """The Recipe for `attach`."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


@register_loss_strategy("without_padding")
def without_padding(step: Step) -> torch.Tensor:
    """Reflow on the robot's own action dimensions, without the padded dimensions."""
    width, padded_width = step.model.config.action_feature.shape[0], step.actions.shape[-1]
    # The loss is a mean over the padded width, so the robot's dimensions get more weight.
    weights = torch.zeros(padded_width)
    weights[:width] = padded_width / width
    return weights * step.losses(step.coupling())


@register_loss_strategy("shifted", couples=False, joint_forward=True)
def shifted(step: Step) -> torch.Tensor:
    """The standard loss with times shifted towards the noise (arXiv 2606.05737), without a teacher."""
    t = step.model.sample_time(len(step.actions), step.actions.device)
    return step.losses(step.recorded(), times=SHIFT * t / (1 + (SHIFT - 1) * t))


def study(cfg: StudyConfig) -> None:
    """Train and measure everything, and print a table after each student."""
    if cfg.pusht_root is not None:
        task = pusht_task(cfg.pusht_root, cfg.output_dir)
    elif cfg.dataset_root is None:
        task = demo_task(cfg.output_dir)
    else:
        task = recorded_task(cfg.dataset_root, cfg.output_dir, cfg.width, cfg.action_dims)
    found: dict[str, list[dict]] = {"teacher": [], **{variant: [] for variant in cfg.recipes}}
    for seed in cfg.seeds:
        folder = cfg.output_dir / f"seed-{seed}"
        teacher = kept(folder / "teacher", task, partial(new_teacher, task, cfg, seed))
        found["teacher"].append(measured(folder / "teacher", teacher, teacher, task, cfg, seed))
        print(table(found), flush=True)
        couplings_of = lru_cache(maxsize=4)(partial(couplings, task=task, seed=seed))
        for variant in cfg.recipes:
            student, rounds = teacher, []
            for words in variant.split(">"):
                rounds.append(re.sub(r"[^\w.+]+", "-", words.strip()) or "default")
                place = folder / "_then_".join(rounds)
                student = kept(place, task, partial(new_student, student, task, words, seed, couplings_of))
            found[variant].append(measured(place, teacher, student, task, cfg, seed))
            print(table(found), differences(found), sep="\n\n", flush=True)


def new_teacher(task: Task, cfg: StudyConfig, seed: int) -> SmolVLAPolicy:
    """Train a teacher on the recorded actions, from random weights."""
    torch.manual_seed(seed)
    policy = task.policy()
    which = torch.randint(len(task.seen["index"]), (cfg.teacher_steps, cfg.teacher_batch_size))
    train(policy, (select(task.seen, frames) for frames in which), cfg.teacher_steps, cfg.teacher_lr, seed, "teacher")
    return policy


def new_student(
    teacher: SmolVLAPolicy, task: Task, words: str, seed: int, couplings_of: Callable[..., "Couplings"]
) -> SmolVLAPolicy:
    """Train a student of this teacher. All its students with one solver see the same couplings in the same order."""
    options = draccus.parse(Student, args=[f"--{word}" for word in words.split()])
    couples = get_loss_strategy(options.strategy).couples
    student = task.policy(train_expert_only=couples)
    student.load_state_dict(teacher.state_dict())
    made, pairs = options.batches or options.steps, None
    frames = islice(cycle(frames_of(task, made, options.batch_size, seed)), options.steps)
    batches = (select(task.seen, which) for which in frames)
    if couples:
        solver, per_frame = options.to_solver(), options.couplings_per_frame
        pairs = couplings_of(teacher, solver, made, options.batch_size, per_frame, options.scaled_noise).source()
    with attach(
        student,
        pairs=pairs,
        strategy=options.strategy,
        recipe=options.recipe(),
        train_state_proj=options.train_state_proj,
    ):
        train(student, batches, options.steps, options.lr, seed, words or "default")
    return student


def frames_of(task: Task, batches: int, batch_size: int, seed: int) -> torch.Tensor:
    """(batches, batch_size) positions in `Task.seen`, the same for every student with this seed."""
    torch.manual_seed(seed)
    return torch.randint(len(task.seen["index"]), (batches, batch_size))


@dataclass(frozen=True)
class Couplings:
    """The couplings of a training, or of one pass through them.

    Attributes:
        noise: (batches, batch * per_frame, chunk_size, max_action_dim).
        actions: of the same shape, the ends that the teacher carries the noise to.
    """

    noise: torch.Tensor
    actions: torch.Tensor

    def source(self) -> CouplingSource:
        """A function that returns the next step's couplings at each call, cut to the last frames if it sees fewer."""
        steps = cycle(zip(self.noise, self.actions, strict=True))

        def next_step(observation, *, frames, noise, per_frame) -> Coupling:
            made = next(steps)
            return Coupling(*(ends[len(ends) - per_frame * len(observation.state) :] for ends in made))

        return next_step


@torch.no_grad()
def couplings(
    teacher: SmolVLAPolicy,
    solver: Solver,
    batches: int,
    batch_size: int,
    per_frame: int,
    scaled_noise: float,
    *,
    task: Task,
    seed: int,
) -> Couplings:
    """Solve the teacher's ODE for all batches in advance, so that several variants share the work."""
    config = teacher.config
    frames = frames_of(task, batches, batch_size, seed)
    noise = torch.randn(batches, batch_size * per_frame, config.chunk_size, config.max_action_dim)
    if scaled_noise:
        noise = torch.stack([scaled(each, scaled_noise, torch.rand(len(each))) for each in noise])
    actions = []
    for which, x in zip(tqdm(frames, desc=f"couplings by {solver.method}", mininterval=10), noise, strict=True):
        velocity = velocity_of(teacher.model, observe(teacher, select(task.seen, which))).repeated(per_frame)
        actions.append(solver.resolved(config.num_steps).integrate(velocity, x))
    return Couplings(noise, torch.stack(actions))


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


def kept(folder: Path, task: Task, make: Callable[[], SmolVLAPolicy]) -> SmolVLAPolicy:
    """The policy stored in `folder`. If the folder has none, make and store it first."""
    if not (folder / "model.safetensors").exists():
        task.save(make(), folder)
    return SmolVLAPolicy.from_pretrained(folder).eval()


def measured(
    folder: Path, teacher: SmolVLAPolicy, policy: SmolVLAPolicy, task: Task, cfg: StudyConfig, seed: int
) -> dict[str, Any]:
    """A policy's rows of the evaluation, with its success, by number of steps. Measure them if `folder` has none."""
    file, seed = folder / "measured.json", MEASURING_SEED + seed
    if not file.exists():
        chosen = torch.linspace(0, len(task.unseen["index"]) - 1, cfg.frames).round().long()
        policies = [task.on_frames("teacher", teacher)]
        if policy is not teacher:
            policies.append(task.on_frames("student", policy))
        deviations = torch.ones(task.unseen["action"].shape[-1])
        settings = Settings(deviations, num_steps=task.num_steps, num_noises=4, reference_steps=FINE_STEPS, seed=seed)
        tables = [measure_batch(policies, select(task.unseen, which), settings) for which in chosen.split(32)]
        rows = summary(pd.concat(tables), bar=Cell("teacher", teacher.config.num_steps))
        found = {row["num_steps"]: row for row in rows if row["policy"] == policies[-1].name}
        for row in found.values():
            row["energy_distance"] = row["energy_distance"].value
        for n in task.num_steps:
            driven = task.drive(policy, n, cfg.episodes, seed)
            found[n]["success"] = driven and driven.successes
            found[n]["best_reward"] = driven and driven.best_rewards
            from_zeros = task.drive(policy, n, cfg.episodes, seed, start=ZEROS) if cfg.zeros else None
            if from_zeros is not None:
                found[n]["success_from_zeros"] = from_zeros.successes
                found[n]["best_reward_from_zeros"] = from_zeros.best_rewards
        file.write_text(json.dumps(found) + "\n")
    return json.loads(file.read_text())


if __name__ == "__main__":
    study(draccus.parse(StudyConfig))
