"""`smolvla-reflow-eval`: the smallest number of steps that is enough for a policy, and the policy's speed.

    smolvla-reflow-eval --policy.path=STUDENT --teacher_path=TEACHER --dataset.repo_id=... --output_dir=DIR

Teacher and student are measured on the same frames, from the same noise, in episodes that the student was not trained
on if there are any. The command recommends the smallest number of steps that is shown to be enough. The student is then
as good as the teacher with that number, and with every larger number up to the teacher's own. With --env.type=... the
policies run in that simulated environment, as in lerobot-eval, and their success in the same scenes decides. Otherwise
the distance between the distributions of their actions decides. Without --teacher_path the report is about one policy
alone and says if it needs reflow.
--earlier_rounds='[2RF,3RF]' adds the earlier rounds of reflow to the report.

If the command is interrupted, the same command goes on.
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
