"""`smolvla-reflow-demo`: train, reflow and measure a small SmolVLA, in a few minutes on a laptop CPU, offline.

The demo records a small dataset of a task that can be done in two ways. `lerobot-train` trains a SmolVLA on the
dataset, `smolvla-reflow-train` reflows the checkpoint, and `smolvla-reflow-eval` measures both at 1, 2, 5 and 10 steps.
"""

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands.console import asks_for_help, parsed, reported_errors
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.run import run_demo
from smolvla_reflow.errors import ReflowError

PROGRAM = "smolvla-reflow-demo"


@dataclass
class DemoConfig:
    output_dir: Path | None = None
    """Folder for everything the demo makes, which must not exist yet. Default is outputs/demo/DATE/TIME."""
    seed: int = 0
    """Seed of both trainings, and of the policies' noise."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        asks_for_help(argv, __doc__)
        run(parsed(DemoConfig, argv))


def run(cfg: DemoConfig) -> None:
    """Run the demo in a new folder, and print where its results are."""
    start = time.monotonic()
    folder = cfg.output_dir or Path("outputs/demo") / f"{dt.datetime.now():%Y-%m-%d/%H-%M-%S}"
    if cfg.seed < 0:
        raise ReflowError(f"--seed={cfg.seed}: at least 0 is needed.")
    if folder.exists():
        raise ReflowError(f"--output_dir={folder} exists already; name a new folder.")
    folder = folder.resolve()
    run_demo(folder, cfg.seed, measure=eval_command.main)
    print(f"Picture: {folder / 'paths.png'}")
    print(f"Student: {folder / '2rf' / LAST} (a stock SmolVLA checkpoint)")
    print(f"The demo took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
