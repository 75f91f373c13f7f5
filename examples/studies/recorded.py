"""Compare recipes on a recorded dataset, in memory, by the import-and-attach API: no environment, so no success rates.

    python examples/studies/recorded.py --dataset_root=PATH --output=recorded.json

Every fifth episode is held out. For each seed a small SmolVLA is trained on the others as LeRobot trains it; for each
recipe a student then starts from it. Both are measured on the held-out frames. `--action_dims` takes some of the
recorded dimensions alone, `strategy=without_padding` in a recipe leaves the others, which are padding, out of its loss.
"""

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import draccus
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from tqdm import tqdm

from smolvla_reflow import Recipe, attach
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.evaluation import Contestant, Row, evaluate
from smolvla_reflow.normalization import Affine
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import register_loss_strategy

CHUNK_SIZE, IMAGE_SIZE, HELD_OUT = 16, 64, 5
NUM_STEPS = (1, 2, 4, 5, 6, 10)
STATE = "observation.state"

Batch = dict[str, torch.Tensor]


@dataclass
class StudyConfig:
    dataset_root: Path
    """A LeRobotDataset with one camera or more and one task."""
    output: Path = Path("recorded.json")
    """The table as JSON."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One teacher and one student of each recipe for each."""
    recipes: list[str] = field(
        default_factory=lambda: ["", "solver=euler", "time_sampling=beta", "couplings_per_frame=4 batch_size=8"]
    )
    """How students learn, each NAME=VALUE NAME=VALUE ... with the names of `Student` below; '' is the default."""
    steps: int = 3000
    """Training steps of the teacher, and of each student."""
    lr: float = 1e-3
    """Learning rate of both."""
    batch_size: int = 32
    """Frames in a step of the teacher."""
    action_dims: list[int] | None = None
    """Which recorded action dimensions the policy has; all by default."""
    frames: int = 64
    """Held-out frames to measure on."""


@dataclass
class Student:
    """One way to learn; what is not named is this package's default."""

    strategy: str = "reflow"
    solver: str = Solver.method
    num_steps: int | None = None
    time_sampling: str = Recipe.time_sampling
    loss: str = Recipe.loss
    couplings_per_frame: int = Recipe.couplings_per_frame
    real_data_ratio: float = Recipe.real_data_ratio
    batch_size: int = 32

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
    """All trainings and measurements, then the table."""
    found: dict[str, list[list[Row]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        backbone = write_backbone(Path(scratch), image_size=IMAGE_SIZE)
        held_out, kept = load(cfg, backbone)
        for seed in cfg.seeds:
            torch.manual_seed(seed)
            teacher = SmolVLAPolicy(policy_config(kept, backbone))
            train(teacher, kept, cfg, cfg.batch_size, seed, "teacher")
            for recipe in cfg.recipes:
                options = draccus.parse(Student, args=[f"--{word}" for word in recipe.split()])
                student = SmolVLAPolicy(policy_config(kept, backbone, train_expert_only=True))
                student.load_state_dict(teacher.state_dict())
                ode = {"solver": options.solver, "num_steps": options.num_steps}
                with attach(student, teacher, strategy=options.strategy, recipe=options.recipe(), **ode):
                    train(student, kept, cfg, options.batch_size, seed, recipe)
                rows = measure(teacher, student, held_out, cfg, seed)
                if recipe == cfg.recipes[0]:
                    found.setdefault("teacher", []).append([row for row in rows if row.policy == "teacher"])
                found.setdefault(recipe, []).append([row for row in rows if row.policy == "student"])
                print(table(found), flush=True)
                as_json = {name: [[vars(row) for row in rows] for rows in runs] for name, runs in found.items()}
                cfg.output.write_text(json.dumps(as_json, indent=1) + "\n")


def load(cfg: StudyConfig, backbone: Path) -> tuple[Batch, Batch]:
    """Held-out and other frames with their chunks, all in memory, normalised and tokenised as LeRobot does it."""
    meta = LeRobotDatasetMetadata("study/recorded", root=cfg.dataset_root)
    deltas = {"action": [i / meta.fps for i in range(CHUNK_SIZE)]}
    dataset = LeRobotDataset("study/recorded", root=cfg.dataset_root, delta_timestamps=deltas)
    config = SmolVLAConfig(
        device="cpu",
        vlm_model_name=str(backbone),
        input_features={STATE: PolicyFeature(FeatureType.STATE, meta.features[STATE]["shape"])},
        output_features={"action": PolicyFeature(FeatureType.ACTION, meta.features["action"]["shape"])},
    )
    prepare, _ = make_smolvla_pre_post_processors(config, meta.stats)
    loader = tqdm(torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=2), desc="loading")
    prepared = [{k: v for k, v in prepare(batch).items() if isinstance(v, torch.Tensor)} for batch in loader]
    frames = {name: torch.cat([batch[name] for batch in prepared]) for name in prepared[0]}
    if cfg.action_dims:
        frames["action"] = frames["action"][..., cfg.action_dims]
    out = frames["episode_index"] % HELD_OUT == HELD_OUT - 1
    return {k: v[out] for k, v in frames.items()}, {k: v[~out] for k, v in frames.items()}


def policy_config(frames: Batch, backbone: Path, train_expert_only: bool = False) -> SmolVLAConfig:
    """A small SmolVLA for these frames, padded to SmolVLA's own 32 dimensions."""
    cameras = {
        name: PolicyFeature(FeatureType.VISUAL, tuple(v.shape[1:])) for name, v in frames.items() if "image" in name
    }
    state = PolicyFeature(FeatureType.STATE, tuple(frames[STATE].shape[-1:]))
    return SmolVLAConfig(
        device="cpu",
        vlm_model_name=str(backbone),
        load_vlm_weights=False,
        num_vlm_layers=2,
        chunk_size=CHUNK_SIZE,
        n_action_steps=CHUNK_SIZE,
        resize_imgs_with_padding=(IMAGE_SIZE, IMAGE_SIZE),
        train_expert_only=train_expert_only,
        freeze_vision_encoder=train_expert_only,
        input_features={STATE: state, **cameras},
        output_features={"action": PolicyFeature(FeatureType.ACTION, tuple(frames["action"].shape[-1:]))},
    )


def train(policy: SmolVLAPolicy, frames: Batch, cfg: StudyConfig, batch_size: int, seed: int, name: str) -> None:
    """AdamW with SmolVLA's betas, and its schedule: warm-up over 1/30 of the steps, cosine decay to 1/40."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=1e-10)

    def schedule(step: int) -> float:
        return min(30 * (step + 1) / cfg.steps, 1 / 40 + 39 / 80 * (1 + math.cos(math.pi * step / cfg.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    torch.manual_seed(seed)
    policy.train()
    for _ in tqdm(range(cfg.steps), desc=name, mininterval=10):
        loss, _ = policy.forward(select(frames, torch.randint(len(frames["index"]), (batch_size,))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    policy.eval()


def select(frames: Batch, which: torch.Tensor) -> Batch:
    return {name: value[which] for name, value in frames.items()}


def measure(teacher: SmolVLAPolicy, student: SmolVLAPolicy, frames: Batch, cfg: StudyConfig, seed: int) -> list[Row]:
    """Everything is normalised already, so that the units are standard deviations."""
    width = frames["action"].shape[-1]
    units = Affine(torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    chosen = torch.linspace(0, len(frames["index"]) - 1, min(cfg.frames, len(frames["index"]))).round().long()
    return evaluate(
        [
            Contestant(name, policy, lambda batch: batch, lambda action: action, units, policy.config.num_steps)
            for name, policy in (("teacher", teacher), ("student", student))
        ],
        [select(frames, which) for which in chosen.split(32)],
        torch.ones(width),
        num_steps=NUM_STEPS,
        num_noises=4,
        reference_steps=60,
        seed=1000 + seed,
    ).rows


def table(found: dict[str, list[list[Row]]]) -> str:
    """Markdown: flow error (standard deviations) and spread at each number of steps, mean ± deviation."""

    def cell(values: list[float], digits: int) -> str:
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    head = ["", *(f"flow error, {n}" for n in NUM_STEPS), *(f"spread, {n}" for n in NUM_STEPS)]
    lines = [head, ["---"] * len(head)]
    for name, runs in found.items():
        rows = [{row.num_steps: row for row in run} for run in runs]
        errors = [cell([row[n].flow_rmse for row in rows], 3) for n in NUM_STEPS]
        spreads = [cell([row[n].spread_ratio for row in rows], 2) for n in NUM_STEPS]
        lines.append(["teacher" if name == "teacher" else f"`{name}`" if name else "default", *errors, *spreads])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    study(draccus.parse(StudyConfig))
