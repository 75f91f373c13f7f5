"""Drives of one scene, repeated many times with a SmolVLA checkpoint, and their picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from smolvla_reflow.demo.environment import MAX_STEPS, DrivePast
from smolvla_reflow.demo.task import CAMERA, OBSTACLE_RADIUS, OBSTACLE_X, TASK, VIEW_HALF_HEIGHT, Scene

ARRIVED, CRASHED = "#0072B2", "#D55E00"  # colour-blind readers can distinguish them


class Drives(NamedTuple):
    """Results of `n` drives of one scene."""

    paths: np.ndarray  # (n, MAX_STEPS + 1, 2), positions; after its end a drive keeps its last position
    success: np.ndarray  # (n,) bool, True if the drive arrived without touching the obstacle


@torch.no_grad()
def repeated_drives(checkpoint: Path, scene: Scene, num_steps: int, n: int, seed: int) -> Drives:
    """Drive the same scene `n` times, from different noise, with `num_steps` Euler steps for each chunk."""
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


def draw_paths(panels: dict[str, Drives], file: Path) -> None:
    """Draw the paths of some drives side by side into a PNG.

    `panels` holds drives by title; each drive starts at (0, 0), with the obstacle at y = 0.
    """
    figure = Figure(figsize=(3.0 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, drives) in zip(axes, panels.items(), strict=True):
        axis.add_patch(Circle((OBSTACLE_X, 0.0), OBSTACLE_RADIUS, color="0.75", zorder=0))
        for path, success in zip(drives.paths, drives.success, strict=True):
            axis.plot(*path.T, color=ARRIVED if success else CRASHED, lw=1.0, alpha=0.5)
        axis.set_title(f"{title}\n{drives.success.mean():.0%} of {len(drives.success)} get past", fontsize=10)
        axis.set(xlim=(-0.03, 1.05), ylim=(-VIEW_HALF_HEIGHT, VIEW_HALF_HEIGHT), xlabel="x", aspect="equal")
    axes[0].set_ylabel("y")
    handles = [Line2D([], [], color=ARRIVED), Line2D([], [], color=CRASHED)]
    figure.legend(handles, ["gets past", "hits the obstacle"], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)
