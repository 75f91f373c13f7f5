"""`smolvla-reflow-train`: LeRobot's training, with a teacher.

    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --output_dir=...

It takes every flag of lerobot-train and those of --reflow.*, and fills in what a reflow run needs where you give
none: the student starts from the teacher, at a lower learning rate. Resuming, logging, evaluation, the hub and several
GPUs are LeRobot's own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import lerobot
from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins

from smolvla_reflow.commands.console import (
    asks_for_help,
    command_line,
    load_plugins,
    parse_errors,
    reported_errors,
    with_values,
)
from smolvla_reflow.compat import refuse_remote_job
from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.training.arguments import Arguments, complete
from smolvla_reflow.training.checkpoints import starting_from
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.preflight import check_destination, check_run
from smolvla_reflow.training.run import open_inputs, train
from smolvla_reflow.training.run_folder import CONFIG, flaw

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
        run(complete(with_values(argv, "resume")))


def run(arguments: Arguments) -> None:
    """Check everything that can be checked without writing, then train."""
    register_third_party_plugins()
    with command_line(PROGRAM, arguments.flags), hub_errors(arguments.hub_id):
        cfg = parsed(arguments)
    refuse_remote_job(cfg)
    with command_line(PROGRAM, arguments.flags):
        inputs = open_inputs(cfg, arguments)
    with starting_from(inputs.start, arguments.flags) as flags:
        with command_line(PROGRAM, flags), hub_errors(arguments.hub_id):
            validate(cfg)
        check_destination(cfg, inputs.teacher, arguments.typed)
        with command_line(PROGRAM, downloaded(cfg, flags) if arguments.hub_id else flags):
            stats = check_run(cfg, inputs.teacher, inputs.pairs, arguments.typed, inputs.start)
            train(cfg, inputs, stats, arguments)


def parsed(arguments: Arguments) -> ReflowTrainPipelineConfig:
    """Parse the configuration, and delete the temporary file that the arguments name."""
    try:
        load_plugins(arguments.flags)  # which LeRobot's parser does too, where an error would be a traceback
        with parse_errors():
            return parse()
    except ReflowError as error:
        if "are not valid for" not in str(error):
            raise
        what_to_do = "resume with the one that saved it" if arguments.resume else "take them out of the file"
        raise ReflowError(
            f"{error} A file that another LeRobot than the installed {lerobot.__version__} saved has such fields; "
            f"{what_to_do}."
        ) from None
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


def downloaded(cfg: ReflowTrainPipelineConfig, flags: Sequence[str]) -> list[str]:
    """The flags with which LeRobot finds here what it has downloaded, and does not do so again."""
    checkpoint = Path(str(cfg.checkpoint_path))
    lacks = flaw(checkpoint)
    if lacks is not None:
        raise ReflowError(f"The checkpoint that was downloaded to {checkpoint} is not whole: {lacks}.")
    return [*(flag for flag in flags if not flag.startswith("--config_path=")), f"--config_path={checkpoint / CONFIG}"]


@contextlib.contextmanager
def hub_errors(hub_id: str | None) -> Iterator[None]:
    """Turn what goes wrong between LeRobot and the hub into a ReflowError, if it is asked for this repository."""
    try:
        yield
    except ReflowError:
        raise
    except Exception as error:  # the hub client's errors share no base class
        if hub_id is None:
            raise
        raise ReflowError(
            f"--config_path={hub_id} does not exist, and as a hub id it cannot be resumed ({first_line(error)})."
        ) from None


if __name__ == "__main__":
    main()
