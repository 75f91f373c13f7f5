"""The demo's task, driven by SparkMind Inference, a runtime that does not load checkpoints through LeRobot's policy.

It reads config.json and model.safetensors itself. It prepares images, state and sentence by its own code, and has a
flow-matching model of its own. Each chunk starts from new normal noise.

Make an environment for it, with Python 3.12 or 3.13. It brings LeRobot 0.5.1, and does not need smolvla-reflow:

    python3.13 -m venv .venv-sparkmind
    .venv-sparkmind/bin/pip install "sparkmind-inference[vla]==1.0.0rc7"

Make a student with smolvla-reflow, then drive:

    smolvla-reflow-demo --output_dir=outputs/demo
    .venv-sparkmind/bin/python examples/runtimes/with_sparkmind.py --drives=40 \\
        --checkpoint=outputs/demo/2rf/checkpoints/last/pretrained_model

The number of steps is `num_steps` of config.json. `--num_steps=N` overrides it.
"""

import runpy
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sparkmind_inference import create_engine

TASK_FILE = Path(__file__).parents[2] / "smolvla_reflow/demo/task.py"
# By path: an import would run smolvla_reflow/__init__.py, which needs the whole package's dependencies.
task = SimpleNamespace(**runpy.run_path(str(TASK_FILE)))
MAX_STEPS = task.EPISODE_STEPS + 2
CAMERA = task.CAMERA.removeprefix("observation.images.")


def load(checkpoint: Path, num_steps: int | None):
    """The SDK's engine with the checkpoint's weights, on the CPU."""
    engine = create_engine("smolvla", device="cpu")
    loaded, error = engine.load(str(checkpoint))
    if not loaded:
        raise RuntimeError(error)
    engine.set_instruction(task.TASK)
    if num_steps is not None:
        engine.config.num_steps = num_steps
    return engine


def drive(engine, scene) -> bool:
    """Drive one scene; True if the vehicle arrives without touching the obstacle."""
    engine.reset()
    position = np.array([0.0, scene.start_y])
    for _ in range(MAX_STEPS):
        image = task.render(position, scene.obstacle_y)
        bgr = np.ascontiguousarray(image[..., ::-1])  # the SDK's order of colours
        waypoint = engine.step({CAMERA: bgr}, position)
        position, hit = task.move(position, waypoint, scene.obstacle_y)
        if hit:
            return False
        if task.has_arrived(position):
            return True
    return False


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with config.json and model.safetensors")
    parser.add_argument("--drives", type=int, default=40, help="each drive has a scene of its own")
    parser.add_argument("--num_steps", type=int, help="overrides the checkpoint's num_steps")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes and the noise; demonstrations have seed 0")
    args = parser.parse_args()

    engine = load(args.checkpoint, args.num_steps)
    torch.manual_seed(args.seed)
    success = [drive(engine, scene) for scene in task.draw_scenes(args.drives, args.seed)]
    print(f"num_steps={engine.config.num_steps}: {np.mean(success):.0%} of {len(success)} drives get past")


if __name__ == "__main__":
    main()
