"""Drives of one scene, repeated many times with a SmolVLA checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.environment import MAX_STEPS, DrivePast
from smolvla_reflow.demo.task import CAMERA, TASK, Scene


@dataclass(frozen=True)
class Drives:
    """Results of `n` drives of one scene.

    Attributes:
        paths: (n, MAX_STEPS + 1, 2) positions; after its end a drive stays where it ended.
        success: (n,) bool, whether it arrived without touching the obstacle.
    """

    paths: np.ndarray
    success: np.ndarray


@torch.no_grad()
def repeated_drives(checkpoint: Path, scene: Scene, num_steps: int, n: int, seed: int) -> Drives:
    """Drive the same scene `n` times, from different noise, with `num_steps` Euler steps.

    Args:
        checkpoint: folder of the policy.
        scene: to drive.
        num_steps: Euler steps for each chunk of waypoints.
        n: number of drives.
        seed: of the noise.
    """
    policy = SmolVLAPolicy.from_pretrained(checkpoint).eval()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, str(checkpoint))
    policy.config.num_steps = num_steps
    torch.manual_seed(seed)
    policy.reset()
    vehicles = [DrivePast(scene.start_y, scene.obstacle_y) for _ in range(n)]
    positions = np.stack([vehicle.reset()[0]["agent_pos"] for vehicle in vehicles])
    paths = [positions]
    ended, success = np.zeros((2, n), dtype=bool)
    for _ in range(MAX_STEPS):
        images = np.stack([vehicle.render() for vehicle in vehicles])
        observation = {
            "observation.state": torch.as_tensor(positions, dtype=torch.float32),
            CAMERA: torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0,
            "task": [TASK] * n,
        }
        waypoints = postprocessor(policy.select_action(preprocessor(observation))).cpu().numpy()
        for i in np.flatnonzero(~ended):
            _, _, ended[i], _, info = vehicles[i].step(waypoints[i])
            success[i] = info["is_success"]
        positions = np.stack([vehicle.position for vehicle in vehicles])
        paths.append(positions)
    return Drives(np.stack(paths, axis=1), success)
