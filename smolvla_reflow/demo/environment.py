"""The demo's task for LeRobot: `--env.discover_packages_path=smolvla_reflow.demo --env.type=drive_past`."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from smolvla_reflow.demo.task import (
    CAMERA,
    EPISODE_STEPS,
    FPS,
    IMAGE_SIZE,
    TASK,
    Scene,
    draw_scenes,
    has_arrived,
    move,
    render,
)

ID = "smolvla_reflow/DrivePast-v0"
MAX_STEPS = EPISODE_STEPS + 2


class DrivePast(gym.Env):
    """One vehicle; an action is the next waypoint, an episode ends at the far side or at the obstacle."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012
    task = task_description = TASK
    _max_episode_steps = MAX_STEPS  # where LeRobot looks for it

    def __init__(self, start_y: float | None = None, obstacle_y: float | None = None, render_mode: str | None = None):
        self.render_mode = render_mode
        self.fixed = None if start_y is None or obstacle_y is None else Scene(start_y, obstacle_y)
        image = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {"pixels": spaces.Dict({"top": image}), "agent_pos": spaces.Box(-np.inf, np.inf, (2,), np.float64)}
        )
        self.action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begin the scene of this seed, or the scene given at the start."""
        super().reset(seed=seed)
        self.scene = self.fixed or draw_scenes(1, int(self.np_random.integers(2**31)) if seed is None else seed)[0]
        self.position = np.array([0.0, self.scene.start_y])
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray):
        """Take one step towards the waypoint."""
        self.position, hit = move(self.position, action, self.scene.obstacle_y)
        success = has_arrived(self.position) and not hit
        return self._observation(), float(success), success or hit, False, {"is_success": success}

    def render(self) -> np.ndarray:
        """The camera's image."""
        return render(self.position, self.scene.obstacle_y)

    def _observation(self) -> dict[str, Any]:
        return {"pixels": {"top": self.render()}, "agent_pos": self.position}


@EnvConfig.register_subclass("drive_past")
@dataclass
class DrivePastConfig(EnvConfig):
    """If `start_y` and `obstacle_y` are given, every episode has this scene."""

    task: str | None = TASK
    fps: int = FPS
    start_y: float | None = None
    obstacle_y: float | None = None
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {"action": "action", "agent_pos": "observation.state", "pixels/top": CAMERA}
    )

    @property
    def gym_id(self) -> str:
        return ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"start_y": self.start_y, "obstacle_y": self.obstacle_y}


# Without gymnasium's wrappers, which would hide the task's sentence from LeRobot 0.4.
gym.register(ID, entry_point=f"{__name__}:DrivePast", order_enforce=False, disable_env_checker=True)
