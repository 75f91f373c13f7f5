"""The stock checkpoint of an adapter: its base's weights with the adapter merged into them, and its own other files."""

import json
import shutil
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.load import load_policy
from smolvla_reflow.checkpoint.read import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    TRAIN_CONFIG_NAME,
    Checkpoint,
    read_json,
)
from smolvla_reflow.checkpoint.saved_steps import named_files


def write_merged(adapter: Checkpoint, folder: Path) -> None:
    """Write the stock checkpoint of an adapter into an empty folder.

    The processors are copied with the files that they name, and both configurations are as they were, but for
    `use_peft`. The adapter's model card is left out, which names another base and library.

    Raises:
        ReflowError: the adapter cannot be merged.
        OSError: the folder cannot be written.
        SafetensorError: the weights cannot be, for want of space.
    """
    load_policy(adapter, "cpu").save_pretrained(folder)
    config = read_json(adapter.folder / CONFIG_NAME)
    _write_json(folder / CONFIG_NAME, {**config, "use_peft": False})
    training = adapter.folder / TRAIN_CONFIG_NAME
    if training.is_file():
        content = read_json(training)
        if isinstance(content.get("policy"), dict):
            content["policy"] = {**content["policy"], "use_peft": False}
        _write_json(folder / TRAIN_CONFIG_NAME, content)
    for processor in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME):
        if (adapter.folder / processor).is_file():
            files, folders = named_files(read_json(adapter.folder / processor))
            for name in (processor, *files):
                _copy(adapter.folder / name, folder / name)
            for name in folders:
                shutil.copytree(adapter.folder / name, folder / name, dirs_exist_ok=True)


def _copy(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(old, new)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")
