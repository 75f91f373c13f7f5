"""A training run's output folder: its checkpoints, and the command that continues the run.

LeRobot writes a checkpoint file by file, and points `checkpoints/last` at it once all are written. A run that is killed
meanwhile leaves a checkpoint that is cut off, or a moment without `last`.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.utils.constants import (
    CHECKPOINTS_DIR,
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    OPTIMIZER_STATE,
    PRETRAINED_MODEL_DIR,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from safetensors import SafetensorError

from smolvla_reflow.checkpoint.adapter import ADAPTER_WEIGHTS_NAME
from smolvla_reflow.checkpoint.read import TRAIN_CONFIG_NAME, StoredTensors

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


def last_good(output_dir: Path) -> Path | None:
    """The newest complete checkpoint whose weights and optimizer state are all finite; None if there is none."""
    for checkpoint in complete_checkpoints(output_dir):
        policy, state = checkpoint / PRETRAINED_MODEL_DIR, checkpoint / TRAINING_STATE_DIR
        paths = (policy / SAFETENSORS_SINGLE_FILE, policy / ADAPTER_WEIGHTS_NAME, state / OPTIMIZER_STATE)
        files = [StoredTensors(path) for path in paths if path.is_file()]
        if all(torch.isfinite(file[name]).all() for file in files for name in file):
            return checkpoint
    return None


def training_step(checkpoint: Path) -> int:
    """The number of steps trained before a checkpoint was saved."""
    return int(json.loads((checkpoint / TRAINING_STATE_DIR / TRAINING_STEP).read_text())["step"])


def how_to_go_on(output_dir: Path, typed: Sequence[str] = ()) -> str:
    """The command line that continues a run which broke off; `typed` are flags that have to be given again."""
    checkpoint = last_good(output_dir)
    if checkpoint is None:
        again = f"; start again with another --output_dir than {output_dir}" if output_dir.exists() else ""
        return f"No checkpoint was saved yet{again}."
    flags = shlex.join([f"--config_path={checkpoint / CONFIG}", "--resume=true", *typed])
    return f"Go on from the last good checkpoint with {flags}"
