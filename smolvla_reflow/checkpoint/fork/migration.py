"""The earlier fork's flags and checkpoints: what its flags are called here, and stock checkpoints of its own.

The fork wrote fields of its own into `config.json`, and sometimes the whole teacher into `model.safetensors`. `plan`
says what has to go and whether a stock checkpoint is left; `write` makes that one, in a new folder. Only JSON and
safetensors are read, nothing in them is executed, and the old folder is only read from.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from safetensors.torch import save_file

from smolvla_reflow.checkpoint.read import (
    FORK_FIELDS,
    TEACHER_PREFIX,
    StoredTensors,
    locate,
    read_config,
    read_json,
    stored_tensors,
)
from smolvla_reflow.errors import ReflowError, check_new_folder, whole_folder

TRAIN_CONFIG_NAME = "train_config.json"
# Of the folder and what lies in it, such as a tokenizer. What can be executed, or may be a pickle, stays behind.
COPIED = (".json", ".safetensors", ".md", ".txt", ".jinja")


FORK_FLAGS = {
    "policy.training_mode": "reflow.strategy",
    "policy.use_reflow": "reflow.strategy",
    "policy.teacher_model_path": "reflow.teacher_path",
}


def rename_fork_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The flags with those of the fork by their names here.

    Raises:
        ReflowError: a flag of the fork contradicts another one.
    """
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
    """What has to change to get a stock checkpoint.

    Attributes:
        old: the fork's checkpoint.
        fields: what goes from each JSON file, by the file's name.
        tensors: what goes from `model.safetensors`.
        copied: files taken over as they are.
        left_out: files of the old folder that no LeRobot needs, and that may be pickles.
    """

    old: Path
    fields: dict[str, dict[str, Any]]
    tensors: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def changes(self) -> bool:
        return bool(self.tensors or any(self.fields.values()))


def plan(old: str | Path) -> Migration:
    """Read a checkpoint of the fork and say what a stock one of it takes.

    Raises:
        ReflowError: there is no such checkpoint, or without the fork's additions it would be no stock one either.
    """
    folder = locate(old).folder
    config = read_json(folder / CONFIG_NAME)
    if not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ReflowError(f"{old} holds no {SAFETENSORS_SINGLE_FILE}; pickled weights are never loaded.")
    fields = {CONFIG_NAME: _of_the_fork(config)}
    if (folder / TRAIN_CONFIG_NAME).is_file():
        policy = read_json(folder / TRAIN_CONFIG_NAME).get("policy")
        fields[TRAIN_CONFIG_NAME] = _of_the_fork(policy if isinstance(policy, dict) else {})
    weights = stored_tensors(folder / SAFETENSORS_SINGLE_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG_NAME).write_text(json.dumps(_without_fork(config)))
        read_config(Path(scratch))

    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {name for name in files if name.endswith(COPIED)}
    return Migration(
        old=folder,
        fields=fields,
        tensors=tuple(sorted(name for name in weights if name.startswith(TEACHER_PREFIX))),
        copied=tuple(sorted(wanted - fields.keys() - {SAFETENSORS_SINGLE_FILE})),
        left_out=tuple(sorted(files - wanted)),
    )


def write(migration: Migration, new: Path) -> None:
    """Make the stock checkpoint in `new`, which appears whole or not at all.

    Raises:
        ReflowError: `new` exists, lies within the old folder, or cannot be written.
    """
    check_new_folder(new, migration.old)
    try:
        with whole_folder(new) as partial:
            _write_files(migration, partial)
    except (OSError, ValueError) as error:
        raise ReflowError(f"{new} cannot be written ({error}).") from None


def _write_files(migration: Migration, folder: Path) -> None:
    for name in migration.copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(migration.old / name, folder / name)
    for name in migration.fields:
        content = read_json(migration.old / name)
        if name == CONFIG_NAME:
            content = _without_fork(content)
        elif isinstance(content.get("policy"), dict):
            content["policy"] = _without_fork(content["policy"])
        (folder / name).write_text(json.dumps(content, indent=4) + "\n")
    old, new = (path / SAFETENSORS_SINGLE_FILE for path in (migration.old, folder))
    if migration.tensors:
        weights: StoredTensors = stored_tensors(old)
        with safe_open(old, framework="pt") as file:
            metadata = file.metadata()
        save_file({name: weights[name] for name in weights if name not in migration.tensors}, new, metadata)
    else:
        shutil.copyfile(old, new)


def _of_the_fork(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in FORK_FIELDS if name in fields}


def _without_fork(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in FORK_FIELDS}
