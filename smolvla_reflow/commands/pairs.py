"""`smolvla-reflow-pairs`: make a teacher's couplings once, and train on them from disk.

    smolvla-reflow-pairs --reflow.teacher_path=... --dataset.repo_id=... --output_dir=DIR
    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --reflow.pairs_path=DIR

The same command continues an interrupted run. `--repair` makes missing or damaged files again.
"""

import atexit
from collections.abc import Sequence

from accelerate import PartialState

from smolvla_reflow.commands.console import (
    asks_for_help,
    is_given,
    load_plugins,
    own_log,
    parsed,
    reported_errors,
    with_values,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs.config import PairsConfig, check_values
from smolvla_reflow.pairs.make import make_pairs

PROGRAM = "smolvla-reflow-pairs"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        if not asks_for_help(argv, __doc__) and not is_given(argv, "dataset.repo_id"):
            raise ReflowError("Name the teacher's dataset: --dataset.repo_id=... (--dataset.root=...).")
        cfg = parsed(PairsConfig, load_plugins(with_values(argv, "repair")))
        check_values(cfg)
        process = PartialState(cpu=cfg.policy.device == "cpu")  # connects the processes launched together
        # A process group that is still open when Python ends can abort the process, and replace its exit code.
        atexit.register(process.destroy_process_group)
        with own_log(process.is_main_process):
            made = make_pairs(cfg, process)
        if process.is_main_process:
            print(made)


if __name__ == "__main__":
    main()
