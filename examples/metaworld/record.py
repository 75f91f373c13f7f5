"""Record demonstrations of a Meta-World task, going round the wall on either side by coin toss.

    MUJOCO_GL=osmesa python examples/metaworld/record.py --output_dir=outputs/metaworld/dataset

Meta-World's scripted expert knows one way, so a flow trained on it is nearly straight already. Here the hand
first goes low, round the left or the right end of the wall, and only then the expert takes over: the average of the two
ways runs into the wall. The environments are LeRobot's own (`--env.type=metaworld`), so that what is recorded is what
`smolvla-reflow-eval` will show the policy.
"""

import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import draccus
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import resize_with_pad
from tqdm import tqdm

REPO_ID = "smolvla-reflow/metaworld"
CAMERA = "observation.image"  # what LeRobot's metaworld environment is mapped to
FPS = 80
IMAGE_SIZE = 64
MAX_STEPS = 250
REACHED = 0.03  # metres
GAIN = 25.0  # full speed until 4 cm from a waypoint
PUSHES = 0.15  # standard deviation of random pushes, of full speed: shows how to come back


@dataclass(frozen=True)
class Wall:
    """A wall in Meta-World's coordinates, metres: from `left` to `right`, across the way at `y`."""

    left: float
    right: float
    y: float

    def waypoints(self, side: str) -> list[np.ndarray]:
        """Low before the wall and low behind it, on one side."""
        x = self.left - 0.09 if side == "left" else self.right + 0.09
        return [np.array([x, self.y - 0.10, 0.08]), np.array([x, self.y + 0.07, 0.08])]


TASK = "button-press-wall-v3"
WALL = Wall(left=0.0, right=0.2, y=0.6)


@dataclass
class RecordConfig:
    output_dir: Path = Path("outputs/metaworld/dataset")
    """Where the LeRobotDataset goes; must not exist yet."""
    episodes: int = 50
    """Demonstrations, those that fail not counted."""
    seed: int = 100_000
    """Of the first episode; an evaluation begins at LeRobot's 1000."""
    workers: int = os.cpu_count() or 1
    """Processes that simulate and render."""


@dataclass(frozen=True)
class Episode:
    """One demonstration: images (T, 64, 64, 3) uint8, states and actions (T, 4) float32."""

    task: str
    images: np.ndarray
    states: np.ndarray
    actions: np.ndarray
    success: bool


def demonstrate(seed: int) -> Episode:
    """One episode, its side chosen by the seed."""
    from lerobot.envs.metaworld import MetaworldEnv

    warnings.filterwarnings("ignore", message="Constant")
    rng = np.random.default_rng(seed)
    waypoints = WALL.waypoints(str(rng.choice(["left", "right"])))
    env = MetaworldEnv(TASK, obs_type="pixels_agent_pos")
    observation, _ = env.reset(seed=seed)
    images, states, actions, success = [], [], [], False
    for _ in range(MAX_STEPS):
        state = observation["agent_pos"]
        if waypoints and np.linalg.norm(state[:3] - waypoints[0]) < REACHED:
            waypoints.pop(0)
        if waypoints:
            action = np.append(GAIN * (waypoints[0] - state[:3]), 0.0)
        else:
            action = env.expert_policy.get_action(env._env._get_obs())
        action = np.clip(action, -1.0, 1.0)
        images.append(as_the_policy_sees(observation["pixels"]))
        states.append(state.astype(np.float32))
        actions.append(action.astype(np.float32))
        pushed = action + np.append(rng.normal(scale=PUSHES, size=3), 0.0)
        observation, _, success, _, _ = env.step(np.clip(pushed, -1.0, 1.0).astype(np.float32))
        if success:
            break
    env.close()
    return Episode(env.task_description, np.stack(images), np.stack(states), np.stack(actions), success)


def as_the_policy_sees(image: np.ndarray) -> np.ndarray:
    """Shrunk by SmolVLA's own resizing: the same pixels as when the policy shrinks the environment's image itself."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    small = resize_with_pad(pixels, IMAGE_SIZE, IMAGE_SIZE, pad_value=0)[0]
    return small.round().to(torch.uint8).permute(1, 2, 0).numpy()


def record(cfg: RecordConfig) -> None:
    """All demonstrations into one dataset."""
    dataset = LeRobotDataset.create(
        REPO_ID,
        fps=FPS,
        root=cfg.output_dir,
        use_videos=False,
        features={
            "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
            "action": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
            CAMERA: {"dtype": "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "names": ["height", "width", "channel"]},
        },
    )
    recorded, seed = 0, cfg.seed
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(cfg.workers, mp_context=spawn) as pool,
        tqdm(total=cfg.episodes, desc=TASK, unit="episode") as bar,
    ):
        while recorded < cfg.episodes:
            seeds = range(seed, seed + cfg.episodes - recorded)
            seed = seeds.stop
            for episode in filter(lambda e: e.success, pool.map(demonstrate, seeds)):
                add(dataset, episode)
                recorded += 1
                bar.update()
    dataset.finalize()
    print(f"{dataset.num_episodes} episodes, {dataset.num_frames} frames in {cfg.output_dir}")


def add(dataset: LeRobotDataset, episode: Episode) -> None:
    """Write one episode."""
    for image, state, action in zip(episode.images, episode.states, episode.actions, strict=True):
        dataset.add_frame({"observation.state": state, "action": action, CAMERA: image, "task": episode.task})
    dataset.save_episode()


if __name__ == "__main__":
    record(draccus.parse(RecordConfig))
