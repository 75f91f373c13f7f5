"""`smolvla-reflow-eval`: with how many steps can this policy run, and how much faster is it then?

    smolvla-reflow-eval --policy.path=STUDENT --teacher_path=TEACHER --dataset.repo_id=... --output_dir=DIR

Teacher and student are measured on the same frames, from the same noise. Recommended is the smallest number of steps
at which the student is shown to be as good as the teacher with its own. With --env.type=... the policies run in that
simulated environment, as in lerobot-eval, and how often they succeed decides; otherwise it is how far the distribution
of their actions is from the teacher's. Without --teacher_path the report is about one policy alone and says whether it
needs reflow. After several rounds of reflow, --earlier_rounds='[2RF,3RF]' puts all of them into one report.

If the command is broken off, the same command goes on where it was.
"""

from collections.abc import Sequence

from smolvla_reflow.commands.console import (
    asks_for_help,
    is_given,
    load_plugins,
    parsed,
    reported_errors,
    with_values,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.run import run

PROGRAM = "smolvla-reflow-eval"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        if not asks_for_help(argv, __doc__) and not is_given(argv, "dataset.repo_id"):
            raise ReflowError("Name the dataset to measure on: --dataset.repo_id=... (--dataset.root=...).")
        run(parsed(EvalConfig, load_plugins(with_values(argv, "write_num_steps"))))


if __name__ == "__main__":
    main()
