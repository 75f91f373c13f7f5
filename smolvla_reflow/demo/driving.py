"""Drive one scene many times with a SmolVLA checkpoint, and keep the paths."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.environment import MAX_STEPS
from smolvla_reflow.demo.task import CAMERA, TASK, Scene, has_arrived, move, render


@dataclass(frozen=True)
class Drives:
    """`n` drives of one scene."""

    paths: np.ndarray  # (n, MAX_STEPS + 1, 2) positions; where a drive ended it stays
    success: np.ndarray  # (n,) bool: arrived without touching the obstacle


@torch.no_grad()
def drive(checkpoint: Path, scene: Scene, num_steps: int, n: int, seed: int) -> Drives:
    """The same scene `n` times with `num_steps` Euler steps; the same seed gives the same noise."""
    policy = SmolVLAPolicy.from_pretrained(checkpoint).eval()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, str(checkpoint))
    policy.config.num_steps = num_steps
    torch.manual_seed(seed)
    policy.reset()
    paths = np.zeros((n, MAX_STEPS + 1, 2))
    paths[:, 0] = 0.0, scene.start_y
    ended, success = np.zeros((2, n), dtype=bool)
    for step in range(MAX_STEPS):
        here = paths[:, step]
        images = np.stack([render(position, scene.obstacle_y) for position in here])
        observation = {
            "observation.state": torch.as_tensor(here, dtype=torch.float32),
            CAMERA: torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0,
            "task": [TASK] * n,
        }
        waypoints = postprocessor(policy.select_action(preprocessor(observation))).cpu().numpy()
        for i in range(n):
            moved = move(here[i], waypoints[i], scene.obstacle_y)
            paths[i, step + 1] = here[i] if ended[i] else moved.position
            success[i] |= not ended[i] and not moved.hit and has_arrived(moved.position)
            ended[i] |= success[i] or moved.hit
    return Drives(paths, success)
