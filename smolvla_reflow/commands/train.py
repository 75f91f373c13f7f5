"""`smolvla-reflow-train`: LeRobot's training, with a teacher.

    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --output_dir=...

It takes every flag of lerobot-train, and --reflow.*. Unless you say otherwise, the student starts from the teacher, at
the learning rate 2e-5. Resuming, logging, evaluation, the hub and several GPUs are LeRobot's own.
"""

from collections.abc import Sequence

from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins

from smolvla_reflow.commands.console import asks_for_help, command_line, parse_errors, reported_errors, with_values
from smolvla_reflow.errors import doing
from smolvla_reflow.training.arguments import Arguments, complete
from smolvla_reflow.training.checkpoints import starting_from
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.run import open_run

PROGRAM = "smolvla-reflow-train"


@parser.wrap()
def parse(cfg: ReflowTrainPipelineConfig) -> ReflowTrainPipelineConfig:
    """Parse `sys.argv` as LeRobot does."""
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        if asks_for_help(argv, __doc__):
            with command_line(PROGRAM, ["--policy.type=smolvla", "--help"]):
                parse()
        register_third_party_plugins()
        arguments = complete(with_values(argv, "resume"))
        with command_line(PROGRAM, arguments.flags):
            run = open_run(parsed(arguments), arguments)
        with starting_from(run.start, arguments.flags) as flags, command_line(PROGRAM, flags):
            with doing("checking the configuration"), parse_errors():
                run.cfg.validate()
            run.check()
            run.train()


def parsed(arguments: Arguments) -> ReflowTrainPipelineConfig:
    """The configuration; the temporary file that the arguments name is deleted."""
    try:
        with doing("reading the configuration"), parse_errors():
            return parse()
    finally:
        if arguments.config_file is not None:
            arguments.config_file.unlink()


if __name__ == "__main__":
    main()
