"""A training run's output folder: which of its checkpoints are whole, and how to go on from one.

LeRobot writes a checkpoint file by file and then points `checkpoints/last` at it. A run that was killed meanwhile
leaves a checkpoint that is not whole, or a moment without `last`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from smolvla_reflow.smolvla.checkpoint import StoredTensors

CHECKPOINTS = "checkpoints"
LAST = "last"
CONFIG = Path("pretrained_model") / "train_config.json"
NEEDED = (
    "pretrained_model/config.json",
    "pretrained_model/train_config.json",
    "pretrained_model/policy_preprocessor.json",
    "pretrained_model/policy_postprocessor.json",
    "training_state/training_step.json",
    "training_state/rng_state.safetensors",
)
SCHEDULER = "training_state/scheduler_state.json"  # the last file LeRobot writes, where there is a scheduler


def whole_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The checkpoints of a run that can be resumed, newest first."""
    folders = [f for f in (output_dir / CHECKPOINTS).glob("*") if f.name.isdecimal() and f.is_dir()]
    return (folder for folder in sorted(folders, key=lambda f: int(f.name), reverse=True) if is_whole(folder))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there and none was cut off."""
    if not all((checkpoint / name).is_file() for name in NEEDED):
        return False
    try:
        texts = {path: json.loads(path.read_text()) for path in checkpoint.rglob("*.json")}
        for path in checkpoint.rglob("*.safetensors"):
            StoredTensors(path)
        return (checkpoint / SCHEDULER).is_file() or not texts[checkpoint / CONFIG].get("scheduler")
    except (OSError, ValueError, RecursionError, AttributeError, SafetensorError):
        return False


def last_good(output_dir: Path) -> Path | None:
    """The newest whole checkpoint whose weights are all finite; None if there is none."""
    for checkpoint in whole_checkpoints(output_dir):
        files = [StoredTensors(path) for path in (checkpoint / "pretrained_model").glob("*model.safetensors")]
        if files and all(torch.isfinite(file[name]).all() for file in files for name in file):
            return checkpoint
    return None


def resumable_config(config_path: Path) -> Path | None:
    """The `train_config.json` to resume from instead of one that is missing or belongs to a torn checkpoint.

    Returns:
        `config_path` itself where nothing is wrong with it, that of the run's newest whole checkpoint where it
        was `last` that broke off, or None.
    """
    checkpoint = config_path.parent.parent
    if is_whole(checkpoint):
        return config_path
    if checkpoint.name != LAST or checkpoint.parent.name != CHECKPOINTS:
        return None
    newest = next(whole_checkpoints(checkpoint.parent.parent), None)
    return newest and newest / CONFIG


def training_step(checkpoint: Path) -> int:
    """The step at which a whole checkpoint was saved."""
    return int(json.loads((checkpoint / "training_state/training_step.json").read_text())["step"])


def how_to_go_on(output_dir: Path, typed: Sequence[str] = ()) -> str:
    """What to do about a run that was cut short; `typed` are flags that have to be given again."""
    checkpoint = last_good(output_dir)
    if checkpoint is None:
        return f"No checkpoint was saved yet; start again with another --output_dir than {output_dir}."
    flags = " ".join([f"--config_path={checkpoint / CONFIG}", "--resume=true", *typed])
    return f"Go on from the last good checkpoint with {flags}"
