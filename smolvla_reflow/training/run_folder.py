"""A training run's output folder: written without symbolic links if need be, and the command that continues the run."""

import errno
import functools
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.utils.constants import OPTIMIZER_STATE, PRETRAINED_MODEL_DIR, TRAINING_STATE_DIR, TRAINING_STEP

from smolvla_reflow.checkpoint.adapter import ADAPTER_WEIGHTS_NAME
from smolvla_reflow.checkpoint.run_folder import CONFIG, complete_checkpoints
from smolvla_reflow.checkpoint.tensors import StoredTensors

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # as FAT, CIFS and some mounted buckets answer


class OutputFolder(type(Path())):  # type: ignore[misc]  # the class of this system's paths
    """An output folder that needs no symbolic links: where none can be made, a run goes on without `checkpoints/last`.

    LeRobot makes `last` by a path that it derives from the output folder, which is then of this class too.
    """

    def symlink_to(self, target: Any, target_is_directory: bool = False) -> None:
        """Make a link. If the file system has no links, say so once."""
        try:
            super().symlink_to(target, target_is_directory)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            say_once(
                f"{self.parent} can hold no symbolic links ({error.strerror}), so the run goes on without {self.name}. "
                "--config_path and --policy.path find the newest checkpoint in the run's folder all the same."
            )


@functools.cache
def say_once(warning: str) -> None:
    """Log a warning the first time."""
    logging.warning("Reflow: %s", warning)


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
