"""PushT with the block's pose in the state: gym-pusht with other observations.

    PYTHONPATH=examples smolvla-reflow-eval --env.discover_packages_path=pusht --env.type=pusht_pose ...

The state is the agent (x, y), the block (x, y) and the block's angle as 100 cos and 100 sin. The image is 32 pixels
wide. The dataset `pusht_pose` has the same observations, so that a small policy need not learn to see. Physics, reward
(coverage of the goal, where 95 % count as all), success and the 300 steps of an episode are gym-pusht's.
"""

from dataclasses import dataclass, field
from typing import Any

import gym_pusht  # noqa: F401, registers its environment
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from PIL import Image

ID = "smolvla_reflow/PushTPose-v0"
IMAGE_SIZE = 32


class PushTPose(gym.ObservationWrapper):
    """PushT that shows the pose and a small image.

    Args:
        image_every: steps from one new image to the next; the steps between show the last image again. Drawing takes
            three quarters of a step, and a policy that executes 8 actions of each chunk sees only every 8th image.
        render_mode: gymnasium's.
    """

    def __init__(self, image_every: int = 1, render_mode: str = "rgb_array"):
        super().__init__(gym.make("gym_pusht/PushT-v0", obs_type="state", render_mode=render_mode).unwrapped)
        self.image_every = image_every
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
                "agent_pos": spaces.Box(-np.inf, np.inf, (6,), np.float64),
            }
        )

    def reset(self, **options: Any):
        """A new start, as gym-pusht draws it."""
        self.steps = 0
        return super().reset(**options)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        """Turn gym-pusht's agent, block and angle into the policy's observation, once after every step."""
        if self.steps % self.image_every == 0:
            self.image = self._draw()
        self.steps += 1
        *positions, angle = observation
        return {"pixels": self.image, "agent_pos": np.array([*positions, 100 * np.cos(angle), 100 * np.sin(angle)])}

    def _draw(self) -> np.ndarray:
        """Draw the 96 pixels of the recordings, shrunk like the dataset's images."""
        pusht = self.unwrapped
        pusht.obs_type = "pixels"
        try:
            image = Image.fromarray(pusht.get_obs())
        finally:
            pusht.obs_type = "state"
        return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


@EnvConfig.register_subclass("pusht_pose")
@dataclass
class PushTPoseConfig(EnvConfig):
    """LeRobot's own `--env.type=pusht` with these observations."""

    task: str | None = "PushT-v0"
    fps: int = 10
    episode_length: int = 300
    image_every: int = 1
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (6,)),
            "pixels": PolicyFeature(FeatureType.VISUAL, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels": "observation.image",
        }
    )

    @property
    def gym_id(self) -> str:
        return ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"image_every": self.image_every, "max_episode_steps": self.episode_length}


gym.register(ID, entry_point=f"{__name__}:PushTPose", disable_env_checker=True)
