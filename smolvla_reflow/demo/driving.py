"""Drive the demo's task with a SmolVLA checkpoint, at any number of ODE steps."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.task import CAMERA, TASK, Drives, Scenes, drive, render


@dataclass(frozen=True)
class Driver:
    """A checkpoint with its processors, as plain LeRobot loads them."""

    policy: SmolVLAPolicy
    preprocessor: Any
    postprocessor: Any

    @classmethod
    def load(cls, checkpoint: Path) -> "Driver":
        policy = SmolVLAPolicy.from_pretrained(checkpoint)
        return cls(policy, *make_pre_post_processors(policy.config, str(checkpoint)))

    def waypoints(self, positions: np.ndarray, images: np.ndarray) -> np.ndarray:
        """One action chunk per row: positions `(n, 2)`, images `(n, H, W, 3)` uint8 -> `(n, chunk_size, 2)`."""
        chunk = self.policy.predict_action_chunk(self._observe(positions, images))
        return self.postprocessor(chunk).numpy()

    def drive(self, scenes: Scenes, num_steps: int, seed: int) -> Drives:
        """All scenes in closed loop with `num_steps` Euler steps; the same seed gives the same noise."""
        self.policy.config.num_steps = num_steps
        torch.manual_seed(seed)
        return drive(scenes, self.waypoints, replan_every=self.policy.config.n_action_steps)

    def latency_ms(self, num_steps: int, repeats: int = 30) -> float:
        """Median milliseconds of one `predict_action_chunk` for one observation."""
        self.policy.config.num_steps = num_steps
        position = np.zeros((1, 2))
        observation = self._observe(position, render(position, np.zeros(1)))
        seconds = []
        for _ in range(repeats + 3):
            start = time.perf_counter()
            self.policy.predict_action_chunk(dict(observation))
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[3:])) * 1e3

    def _observe(self, positions: np.ndarray, images: np.ndarray) -> dict[str, Any]:
        return self.preprocessor(
            {
                "observation.state": torch.as_tensor(positions, dtype=torch.float32),
                CAMERA: torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0,
                "task": [TASK] * len(positions),
            }
        )
