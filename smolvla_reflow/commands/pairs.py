"""`smolvla-reflow-pairs`: make a teacher's couplings once, and train on them from disk.

    smolvla-reflow-pairs --reflow.teacher_path=... --dataset.repo_id=... --output_dir=DIR
    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --reflow.pairs_path=DIR

If it is interrupted, the same command continues. `--repair` makes missing or damaged files again.
`--verify=DIR --teacher_path=... --dataset_root=...` checks every file, solves a sample of the pairs again and reports
the largest difference; `--verify=DIR --help` lists its flags.
"""

import atexit
from collections.abc import Sequence

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
from smolvla_reflow.pairs.config import PairsConfig, VerifyConfig, check_values
from smolvla_reflow.pairs.generate import make_pairs
from smolvla_reflow.pairs.verify import verify

PROGRAM = "smolvla-reflow-pairs"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        argv = with_values(argv, "repair")
        verifying = is_given(argv, "verify")
        if not asks_for_help(argv, __doc__):
            check_flags(argv, verifying)
        argv = load_plugins(argv)
        if verifying:
            print(verify(parsed(VerifyConfig, argv)).in_words())
        else:
            make(parsed(PairsConfig, argv))


def check_flags(argv: Sequence[str], verifying: bool) -> None:
    """Raise ReflowError where the parser's own message would not help."""
    if is_given(argv, "pairs_per_frame"):
        raise ReflowError("--pairs_per_frame is called --couplings_per_frame now.")
    if not verifying and not is_given(argv, "dataset.repo_id"):
        raise ReflowError("Name the teacher's dataset: --dataset.repo_id=... (--dataset.root=...).")


def make(cfg: PairsConfig) -> None:
    """Make the pairs, or what is missing of them, and say what there is."""
    check_values(cfg)
    process = cfg.policy.this_process()
    # A process group that is still open when Python ends can abort the process, and replace its exit code.
    atexit.register(process.destroy_process_group)
    with own_log(process.is_main_process):
        made = make_pairs(cfg, process)
    if process.is_main_process:
        print(made.in_words())


if __name__ == "__main__":
    main()
