"""The stock checkpoint of an adapter: its base's weights with the adapter merged into them, and its own other files."""

import shutil
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.load import load_policy
from smolvla_reflow.checkpoint.read import TRAIN_CONFIG_NAME, Checkpoint, read_json
from smolvla_reflow.checkpoint.saved_steps import named_files
from smolvla_reflow.errors import write_json


def write_merged(adapter: Checkpoint, folder: Path) -> None:
    """Write the stock checkpoint of an adapter into an empty folder.

    The processors are copied with the files that they name. Both configurations change in `use_peft` alone. The
    adapter's model card is left out, since it names another base and library.

    Raises:
        ReflowError: the adapter cannot be merged.
        OSError: the folder cannot be written.
        SafetensorError: the disk is full.
    """
    load_policy(adapter, "cpu").save_pretrained(folder)
    write_json(folder / CONFIG_NAME, {**read_json(adapter.folder / CONFIG_NAME), "use_peft": False})
    if (adapter.folder / TRAIN_CONFIG_NAME).is_file():
        content = read_json(adapter.folder / TRAIN_CONFIG_NAME)
        if isinstance(content.get("policy"), dict):
            content["policy"]["use_peft"] = False
        write_json(folder / TRAIN_CONFIG_NAME, content)
    for processor in adapter.processors:
        files, folders = named_files(read_json(adapter.folder / processor))
        for name in (processor, *files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(adapter.folder / name, folder / name)
        for name in folders:
            shutil.copytree(adapter.folder / name, folder / name, dirs_exist_ok=True)
