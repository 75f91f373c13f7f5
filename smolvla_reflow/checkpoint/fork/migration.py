"""The earlier fork's flags by their present names, and stock checkpoints of the fork's checkpoints.

The fork wrote additional fields into `config.json`, and sometimes the whole teacher into `model.safetensors`. `plan`
says what has to go, and `write` makes a stock checkpoint in a new folder. Only JSON and safetensors are read.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from safetensors.torch import save_file

from smolvla_reflow.checkpoint.fork.marks import FORK_FIELDS, TEACHER_PREFIX
from smolvla_reflow.checkpoint.merging import copy_processors
from smolvla_reflow.checkpoint.read import (
    PREPROCESSOR_NAME,
    TRAIN_CONFIG_NAME,
    StoredTensors,
    locate,
    read_checkpoint,
    read_config,
    read_json,
)
from smolvla_reflow.errors import ReflowError, check_new_folder, doing, whole_folder, write_json

FORK_FLAGS = {
    "policy.training_mode": "reflow.strategy",
    "policy.use_reflow": "reflow.strategy",
    "policy.teacher_model_path": "reflow.teacher_path",
}


def rename_fork_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The flags, with the fork's under their present names. Raises ReflowError if two flags contradict each other."""
    renamed = dict(given)
    for old, new in FORK_FLAGS.items():
        if old in renamed:
            value = renamed.pop(old)
            if old == "policy.use_reflow":
                value = "reflow" if str(value).lower() in ("true", "1", "yes") else "standard"
            if str(renamed.setdefault(new, value)) != str(value):
                raise ReflowError(f"--{old} (--{new}={value}) contradicts --{new}={renamed[new]}; give one of them.")
    return renamed


@dataclass(frozen=True)
class Migration:
    """The difference between a checkpoint of the fork and its stock checkpoint."""

    old: Path
    contents: dict[str, dict[str, Any]]  # of the JSON files, by name, without the fork's fields
    fields: dict[str, dict[str, Any]]  # removed from these files
    tensors: list[str]  # removed from `model.safetensors`

    @property
    def changes(self) -> bool:
        return bool(self.tensors or any(self.fields.values()))


def plan(old: str | Path) -> Migration:
    """Read a checkpoint of the fork and find what has to change.

    Raises ReflowError for a checkpoint without marks of the fork and without processors, such as LeRobot 0.3's.
    """
    folder = locate(old).folder
    if not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ReflowError(f"{old} holds no {SAFETENSORS_SINGLE_FILE}; pickled weights are never loaded.")
    contents = {name: read_json(folder / name) for name in (CONFIG_NAME, TRAIN_CONFIG_NAME) if (folder / name).exists()}
    fields = {}
    for name, content in contents.items():
        policy = content if name == CONFIG_NAME else content.get("policy")
        policy = policy if isinstance(policy, dict) else {}
        fields[name] = {field: policy.pop(field) for field in FORK_FIELDS if field in policy}
    weights = StoredTensors(folder / SAFETENSORS_SINGLE_FILE)
    tensors = sorted(name for name in weights if name.startswith(TEACHER_PREFIX))
    migration = Migration(folder, contents, fields, tensors)
    if not migration.changes:
        read_checkpoint(old).processor_steps(PREPROCESSOR_NAME)
    return migration


def write(migration: Migration, new: Path) -> None:
    """Write the stock checkpoint, with the files that LeRobot reads, into the new folder completely or not at all."""
    check_new_folder(new, migration.old)
    with doing(f"writing {new}"), whole_folder(new) as folder:
        copy_processors(migration.old, folder)
        for name, content in migration.contents.items():
            write_json(folder / name, content)
        read_config(folder)
        _write_weights(migration, folder / SAFETENSORS_SINGLE_FILE)


def _write_weights(migration: Migration, new: Path) -> None:
    old = migration.old / SAFETENSORS_SINGLE_FILE
    if not migration.tensors:
        shutil.copyfile(old, new)
        return
    weights = StoredTensors(old)
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: weights[name] for name in weights if name not in migration.tensors}, new, metadata)
