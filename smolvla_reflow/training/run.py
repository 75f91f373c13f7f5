"""One run of `smolvla-reflow-train`, from its parsed configuration to LeRobot's `train()`.

open_inputs    the teacher, the student's start and the stored pairs that the configuration names
check_run      (preflight.py) everything that can be checked without writing
train          LeRobot's own, whose Accelerator attaches the teacher to the policy passing through it
"""

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from lerobot.configs.parser import PLUGIN_DISCOVERY_SUFFIX
from lerobot.datasets.video_utils import FrameTimestampError
from safetensors import SafetensorError
from torch import nn

from smolvla_reflow.attachment import Attachment, attach
from smolvla_reflow.checkpoint.load import weights_of
from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import gradient_accumulation, prints_metrics
from smolvla_reflow.compat import train as lerobot_train
from smolvla_reflow.dataset import frame_error
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import get_loss_strategy, is_file_strategy
from smolvla_reflow.pairs.loading import read_in_loader
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.features import saved_rename_map
from smolvla_reflow.smolvla.prefix import is_trained
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.solver import Solver
from smolvla_reflow.teacher import FrozenTeacher, base_policy, frozen_source, keep_whole
from smolvla_reflow.training.accelerator import hook
from smolvla_reflow.training.arguments import NOTHING, Arguments
from smolvla_reflow.training.checkpoints import (
    by_name,
    check_base,
    name_start,
    open_start,
    open_teacher,
    restore_adapter,
)
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.console_line import ConsoleLine
from smolvla_reflow.training.loss_check import EXPLODED, LossCheck
from smolvla_reflow.training.measuring import Measuring, begin, training_preprocessor
from smolvla_reflow.training.preflight import check_options
from smolvla_reflow.training.run_folder import how_to_go_on, training_step

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Inputs:
    """What a run learns from besides the dataset.

    Attributes:
        teacher: whose couplings the student learns.
        pairs: couplings that the teacher made before, if they are used.
        start: where the student starts, as a rule the teacher; None of a resumed run, of which LeRobot knows.
    """

    teacher: Checkpoint
    pairs: Pairs | None
    start: Checkpoint | None


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
    flags = by_name(arguments.flags)
    backbone = flags.get("policy.vlm_model_name") if cfg.policy is None else getattr(cfg.policy, "vlm_model_name", None)
    teacher = open_teacher(reflow, arguments.typed, backbone, resume=arguments.resume)
    start = None if arguments.resume else open_start(arguments.flags, teacher, backbone)
    if start is not None and cfg.peft is not None:
        check_base(start)
    names_of_dataset = flags.get("policy.input_features", "").lower() in NOTHING[1:]  # which LeRobot then gives it
    if not cfg.resume and not cfg.rename_map and "rename_map" not in arguments.typed and not names_of_dataset:
        cfg.rename_map = saved_rename_map(teacher)
    pairs = Pairs(reflow.pairs_path) if reflow.pairs_path else None
    if pairs is not None:
        reflow.pairs_path = str(pairs.folder)
    return Inputs(teacher, pairs, start)


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
    attachments: list[Attachment] = []
    measurings: list[Measuring] = []

    def attach_to(policy: nn.Module, sharded: bool) -> None:
        announce(cfg, inputs, arguments)
        measured_by = measure_with(cfg, inputs, stats, policy) if cfg.reflow.measure_freq else None
        if inputs.start is not None:
            name_start(policy, inputs.start)
        else:
            restore_adapter(policy, Path(str(cfg.policy.pretrained_path)))
        source: dict[str, Any] = {"pairs": inputs.pairs}
        if inputs.pairs is None:
            solver = cfg.reflow.to_solver() if get_loss_strategy(cfg.reflow.strategy).couples else None
            source = {"teacher": inputs.teacher, "solver": solver}
        attached = attach(
            policy,
            **source,
            strategy=cfg.reflow.strategy,
            recipe=cfg.reflow.recipe(),
            dataset_stats=stats,
            train_state_proj=cfg.reflow.train_state_proj or state_has_to_be_learned(policy, inputs),
        )
        attachments.append(attached)
        if measured_by is not None:
            measurings.append(measured_by(attached, step=first_step(cfg)))
            attached.step_metrics.reports.append(measurings[-1])
        if sharded and attached.teacher is not None:
            keep_whole(attached.teacher)
            logging.info("Reflow: the student is sharded; each process holds the teacher whole.")

    def hooked(accelerator: Accelerator) -> Accelerator:
        on_loader, sharded = None, accelerator.distributed_type == DistributedType.FSDP
        if sharded and cfg.reflow.measure_freq:
            raise ReflowError("--reflow.measure_freq cannot measure a student that FSDP has sharded; leave it out.")
        if inputs.pairs is not None:
            inputs.pairs.check(PartialState())  # now that the processes know of each other, and before any writes
            on_loader = partial(read_in_loader, pairs=inputs.pairs, per_frame=cfg.reflow.recipe().couplings_per_frame)
        check = loss_check(cfg, arguments, accelerator)
        line = ConsoleLine(first_step(cfg), cfg.log_freq, lambda: attachments[-1].step_metrics.reported)

        def on_loss(loss: float) -> None:
            check(loss)
            if not prints_metrics():
                line(loss)

        return hook(accelerator, on_policy=partial(attach_to, sharded=sharded), on_loss=on_loss, on_loader=on_loader)

    try:
        lerobot_train(cfg, hooked)
        for measuring in measurings:
            measuring.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(cfg, arguments)) from None
    except FrameTimestampError as error:
        raise ReflowError(f"{frame_error(error, cfg.tolerance_s)} {how_to_continue(cfg, arguments)}") from None
    except (OSError, SafetensorError) as error:
        if not cannot_write(error):
            raise
        raise ReflowError(f"--output_dir={cfg.output_dir or '.'}: {error}. {how_to_continue(cfg, arguments)}") from None


def measure_with(
    cfg: ReflowTrainPipelineConfig, inputs: Inputs, stats: Statistics, policy: nn.Module
) -> Callable[..., Measuring]:
    """What measures this student, once it is attached. Until then its configuration says where it starts.

    With stored pairs a teacher is built for it, and forgotten once it has given its fine solutions.
    """
    preprocessor = training_preprocessor(cfg, base_policy(policy), stats)
    teacher = None if inputs.pairs is None else frozen_source(inputs.teacher, policy, Solver(), stats)

    def measured_by(attached: Attachment, step: int) -> Measuring:
        source = teacher or attached.source
        assert isinstance(source, FrozenTeacher)
        return begin(
            cfg,
            attached.policy,
            source,
            preprocessor,
            attached.step_metrics.deviations,
            num_steps=inputs.teacher.config.num_steps,
            step=step,
        )

    return measured_by


def state_has_to_be_learned(policy: nn.Module, inputs: Inputs) -> bool:
    """Whether a student of stored pairs starts with another `state_proj` than their teacher's, which it trains.

    Of a teacher that is there `attach` finds out itself.
    """
    state_proj = base_policy(policy).model.state_proj
    if inputs.pairs is None or not is_trained(state_proj):
        return False
    weights = weights_of(inputs.teacher)
    names = {f"model.state_proj.{name}": parameter for name, parameter in state_proj.named_parameters()}
    learned = not all(name in weights and torch.equal(weights[name].to(p), p) for name, p in names.items())
    if learned:
        logging.info("Reflow: the student's state_proj is not that of the pairs' teacher.")
    return learned


def announce(cfg: ReflowTrainPipelineConfig, inputs: Inputs, arguments: Arguments) -> None:
    """Log what is used, and what the user did not ask for.

    Called once LeRobot has set up logging, which it does for the main process only.
    """
    if arguments.resume:
        logging.info("Reflow: resuming, teacher %s.", inputs.teacher.cited())
    else:
        filled_in = " ".join(f"--{name}={value}" for name, value in arguments.chosen.items())
        logging.info(
            "Reflow: teacher %s, %d steps, batch %d; filled in: %s",
            inputs.teacher.cited(),
            cfg.steps,
            cfg.batch_size,
            filled_in or "nothing",
        )
        if cfg.rename_map and "rename_map" not in arguments.typed:
            logging.info("Reflow: the dataset's names are mapped as for the teacher: %s.", cfg.rename_map)
    if inputs.pairs is not None:
        made = inputs.pairs.manifest.provenance.solver.in_words()
        logging.info("Reflow: %d pairs from %s, no teacher is loaded.", len(inputs.pairs), inputs.pairs.folder)
        logging.info("Reflow: the pairs were solved by %s.", made)
    elif get_loss_strategy(cfg.reflow.strategy).couples:
        own = inputs.teacher.config.num_steps
        solver = cfg.reflow.to_solver().of_couplings(own)
        logging.info("Reflow: couplings by %s. The teacher's config says num_steps %d.", solver.in_words(), own)
    if cfg.reflow.measure_freq and cfg.reflow.measure_episodes:
        logging.info("Reflow: episodes %s are measured on and not trained on.", cfg.reflow.measure_episodes)


def first_step(cfg: ReflowTrainPipelineConfig) -> int:
    """How many steps have been trained before this run begins."""
    return training_step(Path(cfg.checkpoint_path)) if cfg.resume and cfg.checkpoint_path else 0


def loss_check(cfg: ReflowTrainPipelineConfig, arguments: Arguments, accelerator: Accelerator) -> LossCheck:
    """What looks at each loss of this run."""
    return LossCheck(
        first_step(cfg),
        gradient_accumulation(cfg),
        accelerator.scaler,
        partial(how_to_continue, cfg, arguments),
        exploded=EXPLODED**0.5 if cfg.reflow.weighting == "huber" else EXPLODED,
    )


def how_to_continue(cfg: ReflowTrainPipelineConfig, arguments: Arguments) -> str:
    """What to do about this run, which has broken off, with the flags that no checkpoint of it may have saved."""
    given = by_name(arguments.flags)
    if arguments.resume:
        again = {name: value for name, value in given.items() if name not in ("config_path", "resume")}
    else:
        again = {name: value for name, value in given.items() if name.endswith(PLUGIN_DISCOVERY_SUFFIX)}
    if is_file_strategy(cfg.reflow.strategy):
        again["reflow.strategy"] = cfg.reflow.strategy
    return how_to_go_on(Path(cfg.output_dir or "."), [f"--{name}={value}" for name, value in again.items()])


def cannot_write(error: OSError | SafetensorError) -> bool:
    """Whether an error comes from a full or read-only disk."""
    return getattr(error, "errno", None) in UNWRITABLE or "os error" in str(error)
