"""Drive past an obstacle: the smallest task on which averaging two good answers is a bad one.

A vehicle crosses a field from x = 0 to x = 1. A disc stands in the way, in one of three lanes; going
round it above or below is equally good, going in between means hitting it. Where the disc stands is visible only
in the camera image. An action is the next waypoint (x, y); an expert demonstration picks a side by coin toss.

    y ^        .-~~-.
      |      .'  __  '.         expert, above
    0 |S----'   (  )   '----G
      |      '.  ~~  .'         expert, below
      +------------------------> x
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tqdm import tqdm

TASK = "drive past"
REPO_ID = "smolvla-reflow/demo"
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


@dataclass(frozen=True)
class Scenes:
    """`n` starting situations, one per row."""

    start_y: np.ndarray  # (n,)
    obstacle_y: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.start_y)

    @classmethod
    def repeat(cls, start_y: float, obstacle_y: float, n: int) -> "Scenes":
        """The same scene `n` times."""
        return cls(np.full(n, start_y), np.full(n, obstacle_y))


@dataclass(frozen=True)
class Drives:
    """What came of driving `n` scenes."""

    paths: np.ndarray  # (n, steps + 1, 2) positions
    hit: np.ndarray  # (n,) bool: touched the obstacle
    arrived: np.ndarray  # (n,) bool: crossed the field

    @property
    def success(self) -> np.ndarray:
        """(n,) bool: arrived without touching the obstacle."""
        return self.arrived & ~self.hit


def draw_scenes(n: int, seed: int) -> Scenes:
    """`n` random scenes; the same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    return Scenes(
        start_y=rng.uniform(-START_SPREAD, START_SPREAD, n),
        obstacle_y=rng.choice([-OBSTACLE_SPREAD, 0.0, OBSTACLE_SPREAD], n),
    )


def expert_path(start_y: float, obstacle_y: float, side: int) -> np.ndarray:
    """Waypoints `(EPISODE_STEPS + 1, 2)` round the obstacle, above it (`side=1`) or below (`side=-1`)."""
    x = np.linspace(0.0, 1.0, EPISODE_STEPS + 1)
    pass_y = obstacle_y + side * (OBSTACLE_RADIUS + CLEARANCE)
    there = 0.5 - 0.5 * np.cos(np.pi * np.clip(x / OBSTACLE_X, 0.0, 1.0))
    back = 0.5 - 0.5 * np.cos(np.pi * np.clip((x - OBSTACLE_X) / (1.0 - OBSTACLE_X), 0.0, 1.0))
    y = start_y + (pass_y - start_y) * there - pass_y * back
    return np.stack([x, y], axis=-1)


def render(positions: np.ndarray, obstacle_y: np.ndarray) -> np.ndarray:
    """Camera images `(n, IMAGE_SIZE, IMAGE_SIZE, 3)`, uint8: obstacle red, vehicle blue."""
    column = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    row = VIEW_HALF_HEIGHT * (1.0 - 2.0 * column)
    obstacles = np.stack([np.full_like(obstacle_y, OBSTACLE_X), obstacle_y], axis=-1)
    images: np.ndarray = np.full((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), 240.0)
    for centres, radius, colour in (
        (obstacles, OBSTACLE_RADIUS, (200, 40, 40)),
        (positions, 0.05, (40, 80, 200)),
    ):
        dx = column[None, None, :] - centres[:, 0, None, None]
        dy = row[None, :, None] - centres[:, 1, None, None]
        # Soft edges one pixel wide, so that a shift by less than a pixel shows.
        cover = np.clip(0.5 + (radius - np.hypot(dx, dy)) * IMAGE_SIZE, 0.0, 1.0)[..., None]
        images = images * (1.0 - cover) + np.array(colour) * cover
    return images.round().astype(np.uint8)


def drive(scenes: Scenes, choose_waypoints, replan_every: int, max_steps: int = EPISODE_STEPS + 2) -> Drives:
    """Drive all scenes side by side in closed loop.

    Args:
        choose_waypoints: called with positions `(n, 2)` float64 and camera images
            `(n, IMAGE_SIZE, IMAGE_SIZE, 3)` uint8; returns waypoints `(n, >= replan_every, 2)`.
        replan_every: how many waypoints are driven before new ones are asked for.
    """
    position = np.stack([np.zeros(len(scenes)), scenes.start_y], axis=-1)
    obstacle = np.stack([np.full(len(scenes), OBSTACLE_X), scenes.obstacle_y], axis=-1)
    path, hit = [position], np.zeros(len(scenes), dtype=bool)
    for step in range(max_steps):
        if step % replan_every == 0:
            waypoints = choose_waypoints(position, render(position, scenes.obstacle_y))
        move = waypoints[:, step % replan_every] - position
        length = np.linalg.norm(move, axis=-1, keepdims=True)
        move = move * np.minimum(1.0, MAX_STEP / np.maximum(length, 1e-9))
        hit |= _distance_to_segment(obstacle, position, move) < OBSTACLE_RADIUS
        position = position + move
        path.append(position)
    arrived = (position[:, 0] > 0.9) & (np.abs(position[:, 1]) < VIEW_HALF_HEIGHT)
    return Drives(paths=np.stack(path, axis=1), hit=hit, arrived=arrived)


def _distance_to_segment(point: np.ndarray, start: np.ndarray, move: np.ndarray) -> np.ndarray:
    along = ((point - start) * move).sum(-1) / np.maximum((move**2).sum(-1), 1e-12)
    closest = start + np.clip(along, 0.0, 1.0)[:, None] * move
    return np.linalg.norm(point - closest, axis=-1)


def write_dataset(folder: Path, episodes: int, seed: int = 0) -> LeRobotDataset:
    """Record expert demonstrations into a LeRobotDataset at `folder` (which must not exist)."""
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(episodes, seed)
    dataset = LeRobotDataset.create(
        REPO_ID,
        fps=FPS,
        root=folder,
        use_videos=False,
        features={
            "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
            "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
            CAMERA: {
                "dtype": "image",
                "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
                "names": ["height", "width", "channel"],
            },
        },
    )
    for start_y, obstacle_y in tqdm(
        zip(scenes.start_y, scenes.obstacle_y, strict=True), total=episodes, desc="      recording", unit="episode"
    ):
        path = expert_path(start_y, obstacle_y, side=rng.choice([-1, 1]))
        images = render(path[:-1], np.full(EPISODE_STEPS, obstacle_y))
        for here, there, image in zip(path[:-1], path[1:], images, strict=True):
            dataset.add_frame(
                {
                    "observation.state": here.astype(np.float32),
                    "action": there.astype(np.float32),
                    CAMERA: image,
                    "task": TASK,
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return dataset
