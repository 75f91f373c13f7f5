"""The stock checkpoint of an adapter: its base's weights with the adapter merged into them, and its own other files."""

import shutil
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.load import load_policy
from smolvla_reflow.checkpoint.read import PROCESSORS, Checkpoint, read_json
from smolvla_reflow.checkpoint.run_folder import TRAIN_CONFIG_NAME
from smolvla_reflow.checkpoint.saved_steps import named_files
from smolvla_reflow.errors import write_json

# Kinds of files that processors read. Files of other kinds can be executed, or may be pickles.
COPIED = (".json", ".safetensors", ".txt", ".model", ".jinja")


def write_merged(adapter: Checkpoint, folder: Path) -> None:
    """Write the stock checkpoint of an adapter into an empty folder; both configurations change in `use_peft` alone.

    Raises OSError, or SafetensorError for the weights, if the disk is full.
    """
    load_policy(adapter, "cpu").save_pretrained(folder)
    write_json(folder / CONFIG_NAME, {**read_json(adapter.folder / CONFIG_NAME), "use_peft": False})
    if (adapter.folder / TRAIN_CONFIG_NAME).is_file():
        content = read_json(adapter.folder / TRAIN_CONFIG_NAME)
        if isinstance(content.get("policy"), dict):
            content["policy"]["use_peft"] = False
        write_json(folder / TRAIN_CONFIG_NAME, content)
    copy_processors(adapter.folder, folder)


def copy_processors(old: Path, new: Path) -> None:
    """Copy a checkpoint's processors and the files that they name, without links to files outside the checkpoint."""
    # A snapshot in the hub's cache consists of links to files in the repository's folder.
    home = (old.parent.parent if old.parent.name == "snapshots" else old).resolve()
    for processor in PROCESSORS:
        if (old / processor).is_file():
            files, folders = named_files(read_json(old / processor))
            inner = [path for name in folders for path in (old / name).rglob("*") if path.is_file()]
            for path in (old / processor, *(old / name for name in files), *inner):
                if path.suffix in COPIED and path.resolve().is_relative_to(home):
                    copy = new / path.relative_to(old)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
