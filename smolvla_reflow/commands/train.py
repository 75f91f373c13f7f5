"""`smolvla-reflow-train`: LeRobot's training, with a teacher.

    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --output_dir=...

It takes every flag of lerobot-train and those of --reflow.*, and fills in what a reflow run needs where you give
none: the student starts from the teacher, at a lower learning rate. Resuming, logging, evaluation, the hub and several
GPUs are LeRobot's own.
"""

from collections.abc import Sequence

from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins

from smolvla_reflow.commands.console import asks_for_help, command_line, parse_errors, reported_errors
from smolvla_reflow.compat import refuse_remote_job
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.training.arguments import Arguments, complete
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.preflight import check_run
from smolvla_reflow.training.run import open_inputs, train

PROGRAM = "smolvla-reflow-train"


@parser.wrap()
def parse(cfg: ReflowTrainPipelineConfig) -> ReflowTrainPipelineConfig:
    """LeRobot's parser, on `sys.argv`."""
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        if asks_for_help(argv, __doc__):
            with command_line(PROGRAM, ["--policy.type=smolvla", "--help"]):
                parse()
        run(complete(argv))


def run(arguments: Arguments) -> None:
    """Check everything that can be checked without writing, then train."""
    register_third_party_plugins()
    with command_line(PROGRAM, arguments.flags):
        cfg = parsed(arguments)
        refuse_remote_job(cfg)
        inputs = open_inputs(cfg, arguments)
        validate(cfg)
        stats = check_run(cfg, inputs.teacher, inputs.pairs, arguments.typed)
        train(cfg, inputs, stats, arguments)


def parsed(arguments: Arguments) -> ReflowTrainPipelineConfig:
    """Parse the configuration, and delete the temporary file that the arguments name."""
    try:
        with parse_errors():
            return parse()
    finally:
        if arguments.config_file is not None:
            arguments.config_file.unlink()


def validate(cfg: ReflowTrainPipelineConfig) -> None:
    """LeRobot's own validation, which `train()` will repeat, while an error costs nothing yet."""
    with parse_errors():
        try:
            cfg.validate()
        except (ValueError, OSError) as error:
            raise ReflowError(str(error)) from None


if __name__ == "__main__":
    main()
