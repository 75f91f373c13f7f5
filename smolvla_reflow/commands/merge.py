"""`smolvla-reflow-merge`: make a stock checkpoint of a PEFT adapter, which `lerobot-train --peft.*` saves.

    smolvla-reflow-merge ADAPTER NEW_FOLDER

The new checkpoint acts as the adapter does on its base. It needs no base, no adapter and no package peft.
"""

from collections.abc import Sequence

from smolvla_reflow.checkpoint.merging import write_merged
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands.console import reported_errors
from smolvla_reflow.commands.new_folder import old_and_new
from smolvla_reflow.errors import ReflowError, check_new_folder, doing, whole_folder

PROGRAM = "smolvla-reflow-merge"
FLAGS = {
    "--revision": {"help": "branch, tag or commit of an adapter on the hub (default main)"},
    "--policy.vlm_model_name": {
        "dest": "backbone",
        "metavar": "BACKBONE",
        "help": "folder or hub id of the vision-language backbone (default: the adapter's)",
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        args = old_and_new(PROGRAM, __doc__, argv, FLAGS)
        adapter = open_checkpoint(args.old, args.revision, args.backbone)
        if adapter.base is None:
            raise ReflowError(f"{args.old} is no adapter: it holds all of its weights, so there is nothing to merge.")
        check_new_folder(args.new, adapter.folder)
        with doing(f"writing {args.new}"), whole_folder(args.new) as folder:
            write_merged(adapter, folder)
        print(f"Written: {args.new}, a stock SmolVLA checkpoint: {adapter.cited()} merged into {adapter.base.source}.")
