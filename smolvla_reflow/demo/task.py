"""Drive past an obstacle: the smallest task with two good answers whose average is bad.

A vehicle crosses a field from x = 0 to x = 1. A disc stands in the way, in one of three lanes. The ways above and below
the disc are equally good, and the average of both hits it. The disc is visible only in the camera image. An action is
the next waypoint (x, y). An expert demonstration picks a side by coin toss.

    y ^        .-~~-.
      |      .'  __  '.         expert, above
    0 |S----'   (  )   '----G
      |      '.  ~~  .'         expert, below
      +------------------------> x
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

TASK = "drive past"
REPO_ID = "smolvla-reflow/demo"
DEMONSTRATIONS = 200
CAMERA = "observation.images.top"
FPS = 10

EPISODE_STEPS = 6
OBSTACLE_X = 0.45
OBSTACLE_RADIUS = 0.14
CLEARANCE = 0.22
MAX_STEP = 0.4
IMAGE_SIZE = 32
VIEW_HALF_HEIGHT = 0.6
START_SPREAD = 0.1
OBSTACLE_SPREAD = 0.2


class Scene(NamedTuple):
    """A starting situation; the vehicle starts at (0, start_y)."""

    start_y: float
    obstacle_y: float


def draw_scenes(n: int, seed: int) -> list[Scene]:
    """`n` random scenes; the same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(-START_SPREAD, START_SPREAD, n)
    obstacles = rng.choice([-OBSTACLE_SPREAD, 0.0, OBSTACLE_SPREAD], n)
    return [Scene(*map(float, both)) for both in zip(starts, obstacles, strict=True)]


def expert_path(scene: Scene, side: int) -> np.ndarray:
    """Waypoints `(EPISODE_STEPS + 1, 2)` round the obstacle, above it (`side=1`) or below (`side=-1`)."""
    x = np.linspace(0.0, 1.0, EPISODE_STEPS + 1)
    pass_y = scene.obstacle_y + side * (OBSTACLE_RADIUS + CLEARANCE)
    there = 0.5 - 0.5 * np.cos(np.pi * np.clip(x / OBSTACLE_X, 0.0, 1.0))
    back = 0.5 - 0.5 * np.cos(np.pi * np.clip((x - OBSTACLE_X) / (1.0 - OBSTACLE_X), 0.0, 1.0))
    y = scene.start_y + (pass_y - scene.start_y) * there - pass_y * back
    return np.stack([x, y], axis=-1)


def render(position: np.ndarray, obstacle_y: float) -> np.ndarray:
    """The camera's image `(IMAGE_SIZE, IMAGE_SIZE, 3)`, uint8: obstacle red, vehicle blue, at `position` (2,)."""
    column = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    row = VIEW_HALF_HEIGHT * (1.0 - 2.0 * column)
    image: np.ndarray = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 240.0)
    for (x, y), radius, colour in (
        ((OBSTACLE_X, obstacle_y), OBSTACLE_RADIUS, (200, 40, 40)),
        (position, 0.05, (40, 80, 200)),
    ):
        # Soft edges one pixel wide, so that a shift by less than a pixel shows.
        distance = np.hypot(column[None, :] - x, row[:, None] - y)
        cover = np.clip(0.5 + (radius - distance) * IMAGE_SIZE, 0.0, 1.0)[..., None]
        image = image * (1.0 - cover) + np.array(colour) * cover
    return image.round().astype(np.uint8)


class Move(NamedTuple):
    """One step of the vehicle."""

    position: np.ndarray  # (2,), after the step
    hit: bool  # True if the vehicle touched the obstacle on the way


def move(position: np.ndarray, waypoint: np.ndarray, obstacle_y: float) -> Move:
    """Take one step towards `waypoint` (2,), at most MAX_STEP long."""
    way = np.asarray(waypoint, dtype=np.float64) - position
    way = way * min(1.0, MAX_STEP / max(float(np.linalg.norm(way)), 1e-9))
    obstacle = np.array([OBSTACLE_X, obstacle_y])
    along = np.clip((obstacle - position) @ way / max(float(way @ way), 1e-12), 0.0, 1.0)
    hit = np.linalg.norm(obstacle - position - along * way) < OBSTACLE_RADIUS
    return Move(position + way, bool(hit))


def has_arrived(position: np.ndarray) -> bool:
    """True if the field is crossed, and not left sideways."""
    return bool(position[0] > 0.9 and abs(position[1]) < VIEW_HALF_HEIGHT)


def write_dataset(folder: Path, episodes: int, seed: int = 0) -> LeRobotDataset:
    """Record expert demonstrations into a LeRobotDataset at `folder` (which must not exist)."""
    rng = np.random.default_rng(seed)
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    image = {"dtype": "image", "shape": (IMAGE_SIZE, IMAGE_SIZE, 3), "names": ["height", "width", "channel"]}
    features = {"observation.state": vector, "action": vector, CAMERA: image}
    dataset = LeRobotDataset.create(REPO_ID, fps=FPS, root=folder, use_videos=False, features=features)
    for scene in tqdm(draw_scenes(episodes, seed), desc="      recording", unit="episode"):
        path = expert_path(scene, side=rng.choice([-1, 1]))
        for position, waypoint in pairwise(path):
            vectors = {"observation.state": position.astype(np.float32), "action": waypoint.astype(np.float32)}
            dataset.add_frame({**vectors, CAMERA: render(position, scene.obstacle_y), "task": TASK})
        dataset.save_episode()
    dataset.finalize()
    return dataset
