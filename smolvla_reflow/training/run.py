"""One run of `smolvla-reflow-train`, from its parsed configuration to LeRobot's `train()`.

open_inputs    the teacher and the stored pairs that the configuration names
check_run      (preflight.py) everything that can be checked without writing
train          LeRobot's own, whose Accelerator attaches the teacher to the policy passing through it
"""

import errno
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from torch import nn

from smolvla_reflow.attach import attach
from smolvla_reflow.compat import gradient_accumulation
from smolvla_reflow.compat import train as lerobot_train
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import get_loss_strategy, is_file_strategy
from smolvla_reflow.pairs.loading import read_in_loader
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.smolvla.features import saved_rename_map
from smolvla_reflow.smolvla.normalization import Statistics
from smolvla_reflow.training.accelerator import hook
from smolvla_reflow.training.arguments import Arguments
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.preflight import check_options
from smolvla_reflow.training.run_folder import how_to_go_on, training_step

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# Actions are normalised, so that a loss of 1 is that of a policy which has learnt nothing.
EXPLODED = 1e4


@dataclass(frozen=True)
class Inputs:
    """What a run learns from besides the dataset.

    Attributes:
        teacher: where the student starts, and whose couplings it learns.
        pairs: couplings that the teacher made before, if they are used.
    """

    teacher: Checkpoint
    pairs: Pairs | None


def open_inputs(cfg: ReflowTrainPipelineConfig, arguments: Arguments) -> Inputs:
    """Open what the configuration names, and pin it there by paths that hold from any folder.

    Raises:
        ReflowError: something is not there, is unknown, or has no effect.
    """
    reflow = cfg.reflow
    if not reflow.teacher_path:
        raise ReflowError(
            "This configuration names no teacher (reflow.teacher_path), so it is not one of a reflow run; "
            "resume it with lerobot-train."
        )
    if is_file_strategy(reflow.strategy):
        if "reflow.strategy" not in arguments.typed:
            raise ReflowError(
                f"The configuration's loss is in a file, {reflow.strategy}, which would be run. If you trust that "
                f"file, name it yourself: --reflow.strategy={reflow.strategy}"
            )
        path, _, name = reflow.strategy.rpartition(":")
        reflow.strategy = f"{Path(path).expanduser().resolve()}:{name}"
    check_options(reflow)
    teacher = open_checkpoint(reflow.teacher_path)
    reflow.teacher_path = teacher.source
    if not cfg.resume and not cfg.rename_map and "rename_map" not in arguments.typed:
        cfg.rename_map = saved_rename_map(teacher)
    pairs = Pairs(reflow.pairs_path) if reflow.pairs_path else None
    if pairs is not None:
        reflow.pairs_path = str(pairs.folder)
    return Inputs(teacher, pairs)


def train(cfg: ReflowTrainPipelineConfig, inputs: Inputs, stats: Statistics, arguments: Arguments) -> None:
    """LeRobot's training, with the teacher attached to the policy it makes.

    Args:
        cfg: validated.
        inputs: opened, and checked against the dataset.
        stats: by which LeRobot normalises the batches.
        arguments: the command line, for what is said at the start.

    Raises:
        ReflowError: the pairs are damaged, the loss is lost, the disk is full, or the weights do not fit the
            configuration.
        KeyboardInterrupt: with how to go on.
    """

    def attach_to(policy: nn.Module) -> None:
        announce(cfg, inputs, arguments)
        strategy, recipe = cfg.reflow.strategy, cfg.reflow.recipe()
        if inputs.pairs is not None:
            attach(policy, pairs=inputs.pairs, strategy=strategy, recipe=recipe, dataset_stats=stats)
        else:
            solver = cfg.reflow.to_solver() if get_loss_strategy(strategy).couples else None
            attach(policy, inputs.teacher, strategy=strategy, recipe=recipe, solver=solver, dataset_stats=stats)

    def hooked(accelerator: Accelerator) -> Accelerator:
        on_loader = None
        if inputs.pairs is not None:
            inputs.pairs.check(PartialState())  # now that the processes know of each other, and before any writes
            on_loader = partial(
                read_in_loader, pairs=inputs.pairs, per_frame=cfg.reflow.recipe().couplings_per_frame
            )
        return hook(accelerator, on_policy=attach_to, on_loss=loss_check(cfg), on_loader=on_loader)

    try:
        lerobot_train(cfg, hooked)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(cfg)) from None
    except (OSError, SafetensorError) as error:
        if not cannot_write(error):
            raise
        raise ReflowError(f"--output_dir={cfg.output_dir or '.'}: {error}. {how_to_continue(cfg)}") from None
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        misfit = str(error).splitlines()[1].strip()
        raise ReflowError(f"The student's weights do not fit its --policy.* configuration: {misfit}") from None


def announce(cfg: ReflowTrainPipelineConfig, inputs: Inputs, arguments: Arguments) -> None:
    """Log what is used, and what the user did not ask for.

    Called once LeRobot has set up logging, which it does for the main process only.
    """
    if arguments.resume:
        logging.info("Reflow: resuming, teacher %s.", inputs.teacher.source)
    else:
        filled_in = " ".join(f"--{name}={value}" for name, value in arguments.chosen.items())
        logging.info(
            "Reflow: teacher %s, %d steps, batch %d; filled in: %s",
            inputs.teacher.source,
            cfg.steps,
            cfg.batch_size,
            filled_in or "nothing",
        )
        if cfg.rename_map and "rename_map" not in arguments.typed:
            logging.info("Reflow: the dataset's names are mapped as for the teacher: %s.", cfg.rename_map)
    if inputs.pairs is not None:
        logging.info("Reflow: %d pairs from %s, no teacher is loaded.", len(inputs.pairs), inputs.pairs.folder)


def loss_check(cfg: ReflowTrainPipelineConfig) -> Callable[[float], None]:
    """A function to call with each loss, which stops the run at one that is NaN, infinite or above 1e4."""
    step = training_step(Path(cfg.checkpoint_path)) if cfg.resume and cfg.checkpoint_path else 0
    accumulation, passes = gradient_accumulation(cfg), 0

    def check(loss: float) -> None:
        nonlocal passes
        if not math.isfinite(loss) or loss > EXPLODED:
            raise ReflowError(
                f"The loss is {loss:g} in step {step + passes // accumulation + 1}, so the run was stopped. A lower "
                "--policy.optimizer_lr helps where training has diverged; otherwise look for NaN in the dataset. "
                + how_to_continue(cfg)
            )
        passes += 1

    return check


def how_to_continue(cfg: ReflowTrainPipelineConfig) -> str:
    """What to do about this run, which has broken off."""
    typed = [f"--reflow.strategy={cfg.reflow.strategy}"] if is_file_strategy(cfg.reflow.strategy) else []
    return how_to_go_on(Path(cfg.output_dir or "."), typed)


def cannot_write(error: OSError | SafetensorError) -> bool:
    """Whether an error comes from a full or read-only disk."""
    return getattr(error, "errno", None) in UNWRITABLE or "os error" in str(error)
