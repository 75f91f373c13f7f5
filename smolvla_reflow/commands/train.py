"""`smolvla-reflow-train`: LeRobot's training, with a teacher.

    flags -> complete -> LeRobot's parser -> checks -> LeRobot's train(), whose Accelerator is equipped to
    attach the teacher to the policy passing through it

Everything `lerobot-train` does (resuming, logging, evaluation, the hub, several GPUs) is LeRobot's.
"""

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors import SafetensorError
from torch import nn

from smolvla_reflow.arguments import Arguments, complete
from smolvla_reflow.attach import attach
from smolvla_reflow.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.commands.console import asks_for_help, command_line, parse_errors, reported_errors
from smolvla_reflow.compat import gradient_accumulation, refuse_remote_job, train
from smolvla_reflow.config import ReflowTrainPipelineConfig
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs import Pairs
from smolvla_reflow.preflight import check_run
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.run_folder import how_to_go_on, training_step
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import get_loss_strategy
from smolvla_reflow.teaching import equip

PROGRAM = "smolvla-reflow-train"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


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

        output_dir = Path(cfg.output_dir or ".")
        try:
            train(cfg, lambda accelerator: equip(accelerator, teach, lost_loss(cfg)))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(output_dir)) from None
        except (OSError, SafetensorError) as error:
            if not cannot_write(error):
                raise
            raise ReflowError(f"--output_dir={output_dir}: {error}. {how_to_go_on(output_dir)}") from None
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            misfit = str(error).splitlines()[1].strip()
            raise ReflowError(f"The student's weights do not fit its --policy.* configuration: {misfit}") from None


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
    return Recipe(**{field: getattr(cfg.reflow, field) for field in Recipe.__dataclass_fields__})


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


def lost_loss(cfg: ReflowTrainPipelineConfig) -> Callable[[int, float], str]:
    """What to say when the loss is NaN, infinite or has exploded."""
    started = training_step(Path(cfg.checkpoint_path)) if cfg.resume and cfg.checkpoint_path else 0
    accumulation = gradient_accumulation(cfg)

    def say(passes: int, loss: float) -> str:
        return (
            f"The loss is {loss:g} in step {started + passes // accumulation + 1}, so the run was stopped. A lower "
            "--policy.optimizer_lr helps where training has diverged; otherwise look for NaN in the dataset. "
            + how_to_go_on(Path(cfg.output_dir or "."))
        )

    return say


def cannot_write(error: OSError | SafetensorError) -> bool:
    """Whether it is about a full or read-only disk rather than about this program."""
    return getattr(error, "errno", None) in UNWRITABLE or "os error" in str(error)


if __name__ == "__main__":
    main()
