"""The demo's two trainings and its evaluation, as the flags a user would type."""

import os
from pathlib import Path

from smolvla_reflow.demo.task import EPISODE_STEPS, IMAGE_SIZE, REPO_ID

CHUNK_SIZE = EPISODE_STEPS
N_ACTION_STEPS = 2
LAST = Path("checkpoints/last/pretrained_model")


def one_rectified_flow_flags(folder: Path, *, steps: int = 2000, lr: float = 2e-3) -> list[str]:
    """`lerobot-train`: a small SmolVLA from scratch on the recorded demonstrations."""
    return [
        "--policy.type=smolvla",
        f"--policy.vlm_model_name={folder / 'backbone'}",
        "--policy.load_vlm_weights=false",
        "--policy.num_vlm_layers=2",
        f"--policy.chunk_size={CHUNK_SIZE}",
        f"--policy.n_action_steps={N_ACTION_STEPS}",
        "--policy.max_action_dim=4",
        "--policy.max_state_dim=4",
        f"--policy.resize_imgs_with_padding=[{IMAGE_SIZE},{IMAGE_SIZE}]",
        "--policy.freeze_vision_encoder=false",
        "--policy.train_expert_only=false",
        f"--policy.optimizer_lr={lr}",
        f"--policy.scheduler_decay_lr={lr / 40}",
        "--policy.scheduler_warmup_steps=100",
        f"--policy.scheduler_decay_steps={steps}",
        "--policy.push_to_hub=false",
        f"--output_dir={folder / '1rf'}",
        *_shared_flags(folder, steps),
    ]


def reflow_flags(folder: Path, *, steps: int = 2000, lr: float = 1e-3) -> list[str]:
    """`smolvla-reflow-train`: straighten that checkpoint, with the backbone frozen."""
    return [
        f"--reflow.teacher_path={folder / '1rf' / LAST}",
        "--policy.freeze_vision_encoder=true",
        "--policy.train_expert_only=true",
        f"--policy.optimizer_lr={lr}",
        f"--output_dir={folder / '2rf'}",
        *_shared_flags(folder, steps),
    ]


def evaluation_flags(folder: Path, *, episodes: int = 1000, frames: int = 16) -> list[str]:
    """`smolvla-reflow-eval`: both policies on some frames, and on unseen scenes in closed loop."""
    return [
        f"--policy.path={folder / '2rf' / LAST}",
        f"--teacher_path={folder / '1rf' / LAST}",
        "--policy.device=cpu",
        f"--dataset.repo_id={REPO_ID}",
        f"--dataset.root={folder / 'dataset'}",
        "--num_steps=[1,2,5,10]",
        f"--num_frames={frames}",
        "--env.discover_packages_path=smolvla_reflow.demo",
        "--env.type=drive_past",
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={episodes}",
        "--eval.use_async_envs=false",
        f"--output_dir={folder / 'evaluation'}",
    ]


def _shared_flags(folder: Path, steps: int) -> list[str]:
    return [
        "--policy.device=cpu",
        f"--dataset.repo_id={REPO_ID}",
        f"--dataset.root={folder / 'dataset'}",
        "--batch_size=32",
        f"--steps={steps}",
        f"--num_workers={min(2, os.cpu_count() or 1)}",
        "--log_freq=100",
    ]
