"""Draw thirty drives from one start by teacher and student: the block's paths and last poses.

    python examples/studies/pusht_paths.py --teacher_path=1rf/... --policy_path=2rf/... --output=pusht.png

The drives use LeRobot's `rollout` (of `lerobot-eval`). All begin at one start, each with its own noise.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import numpy as np
import torch
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.envs.utils import close_envs
from lerobot.scripts.lerobot_eval import rollout
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

sys.path.append(str(Path(__file__).parents[1]))
from pusht.environment import PushTPoseConfig

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.evaluation.policy import MeasuredPolicy, load_measured_policy

FIELD = 512
GOAL = (256.0, 256.0, np.pi / 4)
# The block's outline in its own coordinates: eight corners of a T.
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], dtype=float)
COLOURS = "viridis"


@dataclass
class PictureConfig:
    teacher_path: str
    """Checkpoint of the teacher."""
    policy_path: str
    """Checkpoint of the student."""
    output: Path = Path("outputs/pusht.png")
    """PNG to write."""
    teacher_num_steps: list[int] = field(default_factory=lambda: [10, 1])
    """Numbers of ODE steps of the teacher's panels."""
    policy_num_steps: list[int] = field(default_factory=lambda: [1])
    """Numbers of ODE steps of the student's panels."""
    start: int = 1000
    """Seed of the start."""
    drives: int = 30
    """Drives in each panel."""


@dataclass(frozen=True)
class Drives:
    """Drives from one start.

    Attributes:
        paths: for each drive (T, 3), the block's position in pixels and its angle in radians, until the drive ends.
        best_coverage: for each drive the largest share of the goal that was covered, where 95 % count as all.
    """

    paths: list[np.ndarray]
    best_coverage: np.ndarray


def drive(policy: MeasuredPolicy, num_steps: int, start: int, drives: int) -> Drives:
    """Drive from one start many times."""
    settings = PushTPoseConfig(image_every=policy.policy.config.n_action_steps)
    envs = make_env(settings, n_envs=drives)
    before, after = make_env_pre_post_processors(settings, policy.policy.config)
    torch.manual_seed(start)
    try:
        with policy.inference(num_steps):
            seen = rollout(
                env=envs["pusht_pose"][0],
                policy=policy.policy,
                env_preprocessor=before,
                env_postprocessor=after,
                preprocessor=policy.preprocessor,
                postprocessor=policy.postprocessor,
                seeds=[start] * drives,
                return_observations=True,
            )
    finally:
        close_envs(envs)
    states, ends = seen["observation"]["observation.state"].numpy(), seen["done"].int().argmax(dim=1)
    poses = np.concatenate([states[..., 2:4], np.arctan2(states[..., 5:], states[..., 4:5])], axis=-1)
    return Drives(
        [pose[: end + 1] for pose, end in zip(poses, ends, strict=True)],
        np.array([reward[: end + 1].max() for reward, end in zip(seen["reward"].numpy(), ends, strict=True)]),
    )


def draw(panels: dict[str, Drives], file: Path) -> None:
    """Draw the panels side by side."""
    figure = Figure(figsize=(3.2 * len(panels) + 0.7, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    scale = ScalarMappable(Normalize(0, 1), COLOURS)
    for axis, (title, drives) in zip(axes, panels.items(), strict=True):
        _panel(axis, drives, scale)
        axis.set_title(f"{title}\nmean best coverage {drives.best_coverage.mean():.2f}", fontsize=10)
    figure.colorbar(scale, ax=axes, label="best coverage of the drive", shrink=0.8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _panel(axis: Axes, drives: Drives, scale: ScalarMappable) -> None:
    axis.add_patch(Polygon(_corners(*GOAL), color="lightgreen", zorder=0))
    for path, coverage in zip(drives.paths, drives.best_coverage, strict=True):
        colour = scale.to_rgba(coverage)
        centres = np.array([_corners(*pose).mean(axis=0) for pose in path])
        axis.plot(*centres.T, color=colour, lw=0.8, alpha=0.6)
        axis.add_patch(Polygon(_corners(*path[-1]), fill=False, ec=colour, lw=1.0, alpha=0.8))
    axis.add_patch(Polygon(_corners(*drives.paths[0][0]), fill=False, ec="0.3", ls="--", lw=1.2))
    axis.set(xlim=(0, FIELD), ylim=(FIELD, 0), aspect="equal", xticks=[], yticks=[])


def _corners(x: float, y: float, angle: float) -> np.ndarray:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return OUTLINE @ turn.T + (x, y)


def main(cfg: PictureConfig) -> None:
    """Drive and draw."""
    panels = {}
    for name, path, steps in (
        ("teacher", cfg.teacher_path, cfg.teacher_num_steps),
        ("student", cfg.policy_path, cfg.policy_num_steps),
    ):
        policy = load_measured_policy(name, open_checkpoint(path), "cpu", {})
        for n in steps:
            panels[f"{name}, {n} step{'s' if n > 1 else ''}"] = drive(policy, n, cfg.start, cfg.drives)
    draw(panels, cfg.output)


if __name__ == "__main__":
    main(draccus.parse(PictureConfig))
