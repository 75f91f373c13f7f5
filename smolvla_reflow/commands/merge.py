"""`smolvla-reflow-merge`: make a stock checkpoint of a PEFT adapter, which `lerobot-train --peft.*` saves.

    smolvla-reflow-merge ADAPTER NEW_FOLDER

ADAPTER is a folder or hub id, and is left as it is. The new checkpoint acts as the adapter does on its base, and needs
neither of them, nor the package peft.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from smolvla_reflow.checkpoint.merging import write_merged
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands.console import asks_for_help, parse_errors, reported_errors
from smolvla_reflow.errors import ReflowError, check_new_folder, whole_folder

PROGRAM = "smolvla-reflow-merge"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        asks_for_help(argv, __doc__)
        with parse_errors():
            args = parser().parse_args(argv)
        new = args.new.expanduser()
        adapter = open_checkpoint(args.adapter, args.revision, args.backbone)
        if adapter.base is None:
            raise ReflowError(
                f"{args.adapter} is no adapter: it holds all of its weights, and nothing is to be merged."
            )
        check_new_folder(new, adapter.folder)
        try:
            with whole_folder(new) as folder:
                write_merged(adapter, folder)
        except (OSError, SafetensorError) as error:
            raise ReflowError(f"{new} cannot be written ({error}).") from None
        print(f"Written: {new}, a stock SmolVLA checkpoint: {adapter.cited()} merged into {adapter.base.name}.")


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    result = argparse.ArgumentParser(PROGRAM, allow_abbrev=False)
    result.add_argument("adapter", metavar="ADAPTER", help="checkpoint with a PEFT adapter, a folder or hub id")
    result.add_argument("new", metavar="NEW_FOLDER", type=Path, help="of the stock checkpoint; must not exist yet")
    result.add_argument("--revision", help="of an adapter on the hub: a branch, tag or commit")
    result.add_argument(
        "--policy.vlm_model_name",
        dest="backbone",
        metavar="BACKBONE",
        help="folder or hub id of the vision-language backbone, if it is not where the adapter says",
    )
    return result


if __name__ == "__main__":
    main()
