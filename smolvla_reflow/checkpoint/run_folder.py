"""The checkpoints in a training run's folder, and the one that a path means.

LeRobot writes a checkpoint file by file, and points `checkpoints/last` at it once all are written. A run that is killed
meanwhile leaves a checkpoint that is cut off, or a moment without `last`. A copy of the folder may lack `last` too.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME
from lerobot.utils.constants import (
    CHECKPOINTS_DIR,
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    PRETRAINED_MODEL_DIR,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
)
from safetensors import SafetensorError

from smolvla_reflow.checkpoint.tensors import StoredTensors

TRAIN_CONFIG_NAME = "train_config.json"
CONFIG = Path(PRETRAINED_MODEL_DIR) / TRAIN_CONFIG_NAME


def find_config(path: Path) -> Path:
    """The `train_config.json` that a path means; the path itself if there is none.

    A policy's and a checkpoint's folder mean their own file, and a run's folder means that of `checkpoints/last`. A
    `last` that is missing or cut off means the newest complete checkpoint.
    """
    path = path.absolute()
    if (path / CHECKPOINTS_DIR).is_dir():
        path = path / CHECKPOINTS_DIR
    if path.name == CHECKPOINTS_DIR:
        path = path / LAST_CHECKPOINT_LINK
    last = next((folder for folder in (path, *path.parents) if folder.name == LAST_CHECKPOINT_LINK), None)
    if last is not None and not is_complete(last):
        path = next(complete_checkpoints(last.parent.parent), path)
    if path.name == CONFIG_NAME:  # the policy's, which stands beside the run's
        path = path.parent
    return next((file for file in (path / CONFIG, path / TRAIN_CONFIG_NAME) if file.is_file()), path)


def complete_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The complete checkpoints of a run, newest first."""
    folders = [folder for folder in (output_dir / CHECKPOINTS_DIR).glob("*") if folder.name.isdecimal()]
    return filter(is_complete, sorted(folders, key=lambda folder: int(folder.name), reverse=True))


def is_complete(checkpoint: Path) -> bool:
    """True if the file that LeRobot saves last is there, and no file is cut off."""
    try:
        scheduled = json.loads((checkpoint / CONFIG).read_text()).get("scheduler")
        for path in checkpoint.rglob("*.json"):
            json.loads(path.read_text())
        for path in checkpoint.rglob("*.safetensors"):
            StoredTensors(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return (checkpoint / TRAINING_STATE_DIR / (SCHEDULER_STATE if scheduled else OPTIMIZER_PARAM_GROUPS)).is_file()
