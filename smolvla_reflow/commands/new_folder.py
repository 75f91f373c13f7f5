"""The command line of the commands that read one checkpoint and write another."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolvla_reflow.commands.console import asks_for_help, parse_errors


def old_and_new(
    program: str, about: str | None, argv: Sequence[str], flags: Mapping[str, Mapping[str, Any]]
) -> argparse.Namespace:
    """Parse the checkpoint `old`, the folder `new` and some flags, given as arguments of argparse's `add_argument`."""
    asks_for_help(argv, about)
    parser = argparse.ArgumentParser(program, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="folder or hub id of the checkpoint to read; it is not changed")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the stock checkpoint; must not exist yet")
    for flag, settings in flags.items():
        parser.add_argument(flag, **settings)
    with parse_errors():
        args = parser.parse_args(argv)
    args.new = args.new.expanduser()
    return args
