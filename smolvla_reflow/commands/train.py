"""`smolvla-reflow-train`: LeRobot's training, with a teacher.

    flags -> complete -> LeRobot's parser -> checks -> LeRobot's train(), handed an Accelerator whose
    prepare() attaches the teacher to the policy passing through it

Everything `lerobot-train` does (resuming, logging, evaluation, the hub, several GPUs) is LeRobot's.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins
from torch import nn

from smolvla_reflow.arguments import Arguments, complete
from smolvla_reflow.attach import attach
from smolvla_reflow.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.commands.console import asks_for_help, command_line, parse_errors, reported_errors
from smolvla_reflow.compat import accelerator_arguments, refuse_remote_job, train_function
from smolvla_reflow.config import ReflowTrainPipelineConfig
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs import Pairs
from smolvla_reflow.preflight import check_run
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import get_loss_strategy

PROGRAM = "smolvla-reflow-train"


class TeachingAccelerator(Accelerator):
    """An Accelerator that teaches: every module passing through `prepare` is first handed to `teach`.

    LeRobot's `train()` hands the policy it made to `prepare`, after loading and PEFT, before DDP or FSDP.
    """

    def __init__(self, teach: Callable[[nn.Module], object], **arguments: Any):
        super().__init__(**arguments)
        self._teach = teach

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        for item in args:
            if isinstance(item, nn.Module):
                self._teach(item)
        return super().prepare(*args, **kwargs)


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
        try:
            with parse_errors():
                cfg = parse()
        finally:
            if arguments.config_file is not None:
                arguments.config_file.unlink()
        refuse_remote_job(cfg)
        teacher = open_teacher(cfg)
        pairs = open_pairs(cfg)
        validate(cfg)
        stats = check_run(cfg, teacher, pairs)

        def teach(policy: nn.Module) -> None:
            announce(cfg, arguments)
            if pairs is not None:
                logging.info("Reflow: %d pairs from %s, no teacher is loaded.", len(pairs), pairs.folder)
                attach(policy, pairs=pairs, strategy=cfg.reflow.strategy, recipe=recipe(cfg))
                return
            attach(
                policy,
                teacher,
                strategy=cfg.reflow.strategy,
                recipe=recipe(cfg),
                solver=cfg.reflow.solver,
                num_steps=cfg.reflow.num_steps,
                rtol=cfg.reflow.rtol,
                atol=cfg.reflow.atol,
                dataset_stats=stats,
            )

        accelerator = TeachingAccelerator(teach, **accelerator_arguments(cfg))
        try:
            train_function()(cfg, accelerator=accelerator)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(cfg)) from None


def open_teacher(cfg: ReflowTrainPipelineConfig) -> Checkpoint:
    """Open the teacher and pin it in the config by a path that holds from any folder."""
    if not cfg.reflow.teacher_path:
        raise ReflowError(
            "This configuration names no teacher (reflow.teacher_path), so it is not one of a reflow run; "
            "resume it with lerobot-train."
        )
    get_loss_strategy(cfg.reflow.strategy)
    try:
        recipe(cfg)
        Solver(cfg.reflow.solver, cfg.reflow.num_steps, cfg.reflow.rtol, cfg.reflow.atol)
    except ReflowError as error:
        raise ReflowError(f"--reflow.{error}") from None
    teacher = open_checkpoint(cfg.reflow.teacher_path)
    cfg.reflow.teacher_path = teacher.source
    return teacher


def recipe(cfg: ReflowTrainPipelineConfig) -> Recipe:
    """Raises ReflowError if something in it is unknown or out of range."""
    return Recipe(cfg.reflow.time_sampling, cfg.reflow.loss, cfg.reflow.real_data_ratio)


def open_pairs(cfg: ReflowTrainPipelineConfig) -> Pairs | None:
    """Open the stored couplings, if there are any, and pin them by a path that holds from any folder."""
    if not cfg.reflow.pairs_path:
        return None
    pairs = Pairs(cfg.reflow.pairs_path)
    cfg.reflow.pairs_path = str(pairs.folder)
    return pairs


def validate(cfg: ReflowTrainPipelineConfig) -> None:
    """LeRobot's own validation, which `train()` will repeat, while an error costs nothing yet."""
    with parse_errors():
        try:
            cfg.validate()
        except (ValueError, OSError) as error:
            raise ReflowError(str(error)) from None


def announce(cfg: ReflowTrainPipelineConfig, arguments: Arguments) -> None:
    """Say in one line what is used and what the user did not ask for.

    Called once LeRobot has set up logging, which it does for the main process only.
    """
    if arguments.resume:
        logging.info("Reflow: resuming, teacher %s.", cfg.reflow.teacher_path)
        return
    filled = " ".join(f"--{name}={value}" for name, value in arguments.chosen.items())
    logging.info(
        "Reflow: teacher %s, %d steps, batch %d; filled in: %s",
        cfg.reflow.teacher_path,
        cfg.steps,
        cfg.batch_size,
        filled or "nothing",
    )


def how_to_go_on(cfg: ReflowTrainPipelineConfig) -> str:
    """What to do about a run that was interrupted."""
    last = Path(cfg.output_dir or ".") / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    if last.is_file():
        return f"Go on from the last checkpoint with --config_path={last} --resume=true"
    return f"No checkpoint was saved yet; start again with another --output_dir than {cfg.output_dir}."


if __name__ == "__main__":
    main()
