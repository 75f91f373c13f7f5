"""Checkpoints and datasets as people have them: a base for other robots, fine-tuned on one's own, cameras renamed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import TINY, lerobot_train_main
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

from smolvla_reflow.demo.flags import LAST

REPO_ID = "me/pick_the_cube"
ROBOT_DIM = 7
CAMERAS = ("observation.images.front", "observation.images.wrist")
RENAME_MAP = {name: f"observation.images.camera{i}" for i, name in enumerate(CAMERAS, start=1)}
BASE_CAMERAS = tuple(f"observation.images.camera{i}" for i in (1, 2, 3))


@dataclass(frozen=True)
class People:
    """What somebody has who fine-tuned the base on a robot of their own.

    Attributes:
        base: the checkpoint it began with.
        dataset: its root.
        teacher: the fine-tuned checkpoint.
    """

    base: Path
    dataset: Path
    teacher: Path


def write_base(folder: Path, backbone: Path, **overrides: Any) -> Path:
    """A tiny `lerobot/smolvla_base`: six dimensions, three cameras, two processors without statistics."""
    fields = {
        **TINY,
        "vlm_model_name": str(backbone),
        "chunk_size": 4,
        "n_action_steps": 4,
        "max_action_dim": 8,
        "max_state_dim": 8,
        "tokenizer_max_length": 24,
        "pad_language_to": "max_length",
        "prefix_length": 0,
        "push_to_hub": True,
        "repo_id": "lerobot/smolvla_base",
        "empty_cameras": 0,
        "input_features": {
            "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            **{name: PolicyFeature(FeatureType.VISUAL, (3, 256, 256)) for name in BASE_CAMERAS},
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))},
    }
    torch.manual_seed(0)
    policy = SmolVLAPolicy(SmolVLAConfig(**{**fields, **overrides}))
    policy.save_pretrained(folder)
    for processor in make_smolvla_pre_post_processors(policy.config, dataset_stats=None):
        processor.save_pretrained(folder)
    return folder


def write_robot_dataset(
    folder: Path,
    cameras: Sequence[str] = CAMERAS,
    *,
    dim: int = ROBOT_DIM,
    episodes: int = 4,
    frames: int = 12,
    seed: int = 0,
) -> Path:
    """A LeRobotDataset of a robot that waves, with a gripper that never moves: its last dimension is always 0.3."""
    rng = np.random.default_rng(seed)
    vector = {"dtype": "float32", "shape": (dim,), "names": [f"joint_{i}" for i in range(dim)]}
    image = {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        REPO_ID,
        fps=10,
        root=folder,
        use_videos=False,
        features={"observation.state": vector, "action": vector, **dict.fromkeys(cameras, image)},
    )
    for _ in range(episodes):
        phase = rng.uniform(0, 6, dim)
        for i in range(frames):
            state, action = (np.sin(phase + 0.3 * (i + ahead)).astype(np.float32) for ahead in (0, 1))
            state[-1] = action[-1] = 0.3
            pictures = {name: rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for name in cameras}
            dataset.add_frame({"observation.state": state, "action": action, **pictures, "task": "pick the cube"})
        dataset.save_episode()
    dataset.finalize()
    return folder


def dataset_flags(root: Path, **changes: Any) -> list[str]:
    """Flags of a short run of a training command on that dataset, with its cameras renamed to the base's."""
    flags = {
        "policy.device": "cpu",
        "dataset.repo_id": REPO_ID,
        "dataset.root": root,
        "rename_map": json.dumps(RENAME_MAP),
        "batch_size": 4,
        "num_workers": 0,
        "steps": 6,
        "log_freq": 100,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def fine_tune(base: Path, root: Path, run: Path, **changes: Any) -> Path:
    """`lerobot-train --policy.path=BASE`; returns the last checkpoint."""
    given = {"policy__path": base, "policy__push_to_hub": "false", "policy__optimizer_lr": 1e-3, "output_dir": run}
    lerobot_train_main(dataset_flags(root, **given, **changes))
    return run / LAST


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=4))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
