"""`smolvla-reflow-migrate`: make a stock checkpoint of one that the earlier fork wrote.

smolvla-reflow-migrate OLD NEW            # shows what would change
smolvla-reflow-migrate OLD NEW --write    # writes NEW; OLD is not changed
"""

from collections.abc import Sequence

from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from smolvla_reflow.checkpoint.fork.migration import Migration, plan, write
from smolvla_reflow.commands.console import reported_errors
from smolvla_reflow.commands.new_folder import old_and_new
from smolvla_reflow.errors import check_new_folder

PROGRAM = "smolvla-reflow-migrate"
FLAGS = {"--write": {"action": "store_true", "help": "write NEW (default: only show what would change)"}}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        args = old_and_new(PROGRAM, __doc__, argv, FLAGS)
        migration = plan(args.old)
        check_new_folder(args.new, migration.old)
        print(in_words(migration))
        if not migration.changes:
            print(f"{migration.old} is a stock checkpoint already; there is nothing to migrate.")
        elif args.write:
            write(migration, args.new)
            print(f"Written: {args.new}, a stock SmolVLA checkpoint with the files that LeRobot reads.")
        else:
            print(f"Nothing was written. To write {args.new}, add --write.")


def in_words(migration: Migration) -> str:
    """The planned changes, a line for each."""
    removed = [
        (file, f"{name} (which is {value!r})") for file, of in migration.fields.items() for name, value in of.items()
    ]
    if migration.tensors:
        teachers = f"the teacher's {len(migration.tensors)} tensors ({migration.tensors[0]}, ...)"
        removed.append((SAFETENSORS_SINGLE_FILE, teachers))
    return "\n".join(f"{file}: without {what}" for file, what in removed)
