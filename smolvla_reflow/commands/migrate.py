"""`smolvla-reflow-migrate`: make a stock checkpoint of one that the earlier fork wrote.

smolvla-reflow-migrate OLD NEW            # says what would change
smolvla-reflow-migrate OLD NEW --write    # writes NEW; OLD is left as it is
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from smolvla_reflow.checkpoint.fork.migration import Migration, plan, write
from smolvla_reflow.commands.console import asks_for_help, parse_errors, reported_errors
from smolvla_reflow.errors import check_new_folder

PROGRAM = "smolvla-reflow-migrate"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        asks_for_help(argv, __doc__)
        with parse_errors():
            args = parser().parse_args(argv)
        new = args.new.expanduser()
        migration = plan(args.old)
        check_new_folder(new, migration.old)
        print(in_words(migration))
        if not migration.changes:
            print(f"{migration.old} is a stock checkpoint already; there is nothing to migrate.")
        elif args.write:
            write(migration, new)
            print(f"Written: {new}, a stock SmolVLA checkpoint.")
        else:
            print(f"Nothing was written. To write {new}, add --write.")


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    result = argparse.ArgumentParser(PROGRAM, allow_abbrev=False)
    result.add_argument("old", metavar="OLD", help="checkpoint of the earlier fork, a folder or hub id")
    result.add_argument("new", metavar="NEW", type=Path, help="folder of the stock checkpoint; must not exist yet")
    result.add_argument("--write", action="store_true", help="write it; without this, only show what would change")
    return result


def in_words(migration: Migration) -> str:
    """The planned changes, one line for each file."""
    lines = [
        f"{file}: without {name} (which is {value!r})"
        for file, fields in migration.fields.items()
        for name, value in fields.items()
    ]
    if migration.tensors:
        first, count = migration.tensors[0], len(migration.tensors)
        lines.append(f"{SAFETENSORS_SINGLE_FILE}: without the teacher's {count} tensors ({first}, ...)")
    lines += [f"{name}: as it is" for name in migration.copied]
    lines += [f"{name}: left out" for name in migration.left_out]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
