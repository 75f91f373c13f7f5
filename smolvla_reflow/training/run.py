"""One run of `smolvla-reflow-train`, from its parsed configuration to LeRobot's `train()`.

run = open_run(cfg, arguments)      the teacher, the student's start and the stored pairs
run.check()                         what would go wrong silently (checks.py)
run.train()                         LeRobot's own training, whose Accelerator calls the run back
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from lerobot.configs.parser import PLUGIN_DISCOVERY_SUFFIX
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.utils import format_big_number
from torch import nn
from torch.utils.data import DataLoader

from smolvla_reflow.attachment import Attachment, attach
from smolvla_reflow.checkpoint.load import weights_of
from smolvla_reflow.checkpoint.read import Checkpoint, read_json
from smolvla_reflow.compat import prints_metrics, refuse_remote_job
from smolvla_reflow.compat import train as lerobot_train
from smolvla_reflow.dataset.frames import check_finite, name_unreadable_frames, trained_columns
from smolvla_reflow.errors import ReflowError, doing
from smolvla_reflow.losses import LossStrategy, is_file_strategy
from smolvla_reflow.pairs.loading import read_in_loader
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.features import saved_rename_map
from smolvla_reflow.smolvla.prefix import is_trained
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.solver import Solver
from smolvla_reflow.teacher import FrozenTeacher, base_policy, frozen_source, keep_whole
from smolvla_reflow.training.accelerator import hook
from smolvla_reflow.training.arguments import NOTHING, Arguments
from smolvla_reflow.training.checkpoints import check_base, name_start, open_start, open_teacher, restore_adapter
from smolvla_reflow.training.checks import check_flags, check_run
from smolvla_reflow.training.config import ReflowTrainPipelineConfig
from smolvla_reflow.training.hold_out import in_words
from smolvla_reflow.training.inherited import solves_otherwise
from smolvla_reflow.training.loss_check import LossCheck
from smolvla_reflow.training.measuring import Measuring, begin, training_preprocessor
from smolvla_reflow.training.run_folder import OutputFolder, how_to_go_on, training_step


@dataclass(eq=False)
class Run:
    """A reflow run. LeRobot's training calls back `attach`, `on_loss` and `on_loader`."""

    cfg: ReflowTrainPipelineConfig  # validated before `check`
    arguments: Arguments  # the command line
    loss: LossStrategy  # the run's loss strategy
    teacher: Checkpoint  # makes the couplings that the student learns
    start: Checkpoint | None  # checkpoint that the student starts from, as a rule the teacher; None for a resumed run
    pairs: Pairs | None  # couplings that the teacher made before, if they are used
    stats: Statistics = field(default_factory=dict)  # statistics of the batches' normalisation, known from `check` on
    sharded: bool = False  # True if FSDP shards the student
    attached: Attachment | None = None  # known once LeRobot has made the policy
    measuring: Measuring | None = None  # of the student on held-out frames, if the configuration asks for it
    loss_check: LossCheck = field(init=False)

    def check(self) -> None:
        """Raise ReflowError if this run would train something else than the user expects."""
        self.stats = check_run(self.cfg, self.teacher, self.start, self.pairs, self.arguments.typed)

    def train(self) -> None:
        """Run LeRobot's training. A ReflowError or KeyboardInterrupt says how to go on, once something was written."""
        try:
            self.cfg.output_dir = OutputFolder(self.cfg.output_dir or ".")
            with doing("training"):
                lerobot_train(self.cfg, self.hooked)
                if self.measuring is not None:
                    self.measuring.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.how_to_continue()) from None
        except ReflowError as error:
            said = str(error)
            if Path(self.cfg.output_dir or ".").exists():  # something was written
                said = f"{said.rstrip('.')}. {self.how_to_continue()}"
            raise ReflowError(said) from error.__cause__

    def hooked(self, accelerator: Accelerator) -> Accelerator:
        """The Accelerator that LeRobot trains with, hooked up to this run."""
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and self.cfg.reflow.measure_freq:
            raise ReflowError("--reflow.measure_freq cannot measure a student that FSDP has sharded; leave it out.")
        if self.pairs is not None:
            self.pairs.check()  # now that the processes know of each other, and before any writes
        self.loss_check = LossCheck(self.first_step, accelerator.scaler)
        return hook(accelerator, on_policy=self.attach, on_loss=self.on_loss, on_loader=self.on_loader)

    def attach(self, policy: nn.Module) -> None:
        """Attach the teacher, or its pairs, to the policy that LeRobot made."""
        announce(self)
        cfg = self.cfg.reflow
        measured_teacher = None
        if cfg.measure_freq:
            preprocessor = training_preprocessor(self.cfg, base_policy(policy), self.stats)
            if self.pairs is not None:  # built for the fine solutions alone
                measured_teacher = frozen_source(self.teacher, policy, Solver(), self.stats)
        if self.start is not None:
            name_start(policy, self.start)
        else:
            restore_adapter(policy, Path(str(self.cfg.policy.pretrained_path)))
        self.attached = attach(
            policy,
            teacher=self.teacher if self.pairs is None else None,
            pairs=self.pairs,
            solver=cfg.to_solver() if self.pairs is None and self.loss.couples else None,
            strategy=cfg.strategy,
            recipe=cfg.recipe(),
            dataset_stats=self.stats,
            train_state_proj=cfg.train_state_proj or self.state_has_to_be_learned(policy),
            cuda_graph=cfg.cuda_graph,
        )
        if cfg.measure_freq:
            source = measured_teacher or self.attached.source
            assert isinstance(source, FrozenTeacher)
            self.measuring = begin(
                self.cfg,
                self.attached.policy,
                source,
                preprocessor,
                self.attached.step_metrics.deviations,
                num_steps=self.teacher.config.num_steps,
                step=self.first_step,
            )
            self.attached.step_metrics.reports.append(self.measuring)
        if self.sharded and self.attached.teacher is not None:
            keep_whole(self.attached.teacher)
            logging.info("Reflow: the student is sharded; each process holds a complete teacher.")

    def on_loss(self, loss: float) -> None:
        """Check a loss, and log the metrics of its step if LeRobot does not."""
        assert self.attached is not None
        step_metrics = self.attached.step_metrics
        self.loss_check(loss, step_metrics.not_finite)
        step, every, reported = self.loss_check.step, self.cfg.log_freq, step_metrics.reported
        if reported and every > 0 and step % every == 0 and not prints_metrics():
            numbers = " ".join(f"{name}:{value:.3f}" for name, value in reported.items())
            logging.info("step:%s %s", format_big_number(step), numbers)

    def on_loader(self, loader: DataLoader) -> None:
        """Check the frames, let an unreadable frame be named, and let stored pairs be read along with the frames."""
        if isinstance(dataset := loader.dataset, LeRobotDataset):  # not streamed
            check_finite(dataset, trained_columns(dataset.meta.features, self.cfg.rename_map))
            name_unreadable_frames(dataset)
        loader.worker_init_fn = partial(quietly, loader.worker_init_fn)
        if self.pairs is not None:
            read_in_loader(loader, self.pairs, self.cfg.reflow.couplings_per_frame)

    @property
    def first_step(self) -> int:
        """The number of steps trained before this run begins."""
        return training_step(Path(self.cfg.checkpoint_path)) if self.cfg.resume and self.cfg.checkpoint_path else 0

    def state_has_to_be_learned(self, policy: nn.Module) -> bool:
        """True if a student of stored pairs starts with another `state_proj` than the teacher that made the pairs."""
        state_proj = base_policy(policy).model.state_proj
        if self.pairs is None or not is_trained(state_proj):
            return False
        of_teacher = weights_of(self.teacher)
        values = ((p, of_teacher[f"model.state_proj.{name}"]) for name, p in state_proj.named_parameters())
        learned = not all(torch.equal(value.to(p), p) for p, value in values)
        if learned:
            logging.info("Reflow: the student's state_proj is not that of the pairs' teacher.")
        return learned

    def how_to_continue(self) -> str:
        """The command line that continues this run, with the flags that its checkpoints may not have saved."""
        given = self.arguments.by_name
        if self.arguments.resume:
            again = {name: value for name, value in given.items() if name not in ("config_path", "resume")}
        else:
            again = {name: value for name, value in given.items() if name.endswith(PLUGIN_DISCOVERY_SUFFIX)}
        if is_file_strategy(self.cfg.reflow.strategy):
            again["reflow.strategy"] = self.cfg.reflow.strategy
        return how_to_go_on(Path(self.cfg.output_dir or "."), [f"--{name}={value}" for name, value in again.items()])


def quietly(init: Callable[[int], object] | None, worker: int) -> None:
    """Begin a loader's process, which is silent if the main process is interrupted while it takes over a batch."""
    report = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, ConnectionError | EOFError) else report(kind, *rest)
    if init is not None:
        init(worker)


def open_run(cfg: ReflowTrainPipelineConfig, arguments: Arguments) -> Run:
    """Open what the configuration names, and write it down there by names that hold in any folder."""
    refuse_remote_job(cfg)
    reflow, given, typed = cfg.reflow, arguments.by_name, arguments.typed
    if not reflow.teacher_path:
        raise ReflowError(
            "This configuration names no teacher (reflow.teacher_path), so it is not that of a reflow run; resume it "
            "with lerobot-train."
        )
    if is_file_strategy(reflow.strategy):
        if "reflow.strategy" not in typed:
            raise ReflowError(
                f"The configuration's loss is in a file, {reflow.strategy}, which would be run. If you trust that "
                f"file, name it yourself: --reflow.strategy={reflow.strategy}"
            )
        path, _, name = reflow.strategy.rpartition(":")
        reflow.strategy = f"{Path(path).expanduser().resolve()}:{name}"
    if arguments.resume and "reflow.num_steps" not in typed:
        saved = read_json(Path(given["config_path"])).get("reflow") or {}
        if solves_otherwise({f"reflow.{name}": value for name, value in saved.items()}, given):
            reflow.num_steps = None
    loss = check_flags(reflow)
    backbone = given.get("policy.vlm_model_name") if cfg.policy is None else cfg.policy.vlm_model_name
    teacher = open_teacher(reflow, typed, backbone, resume=arguments.resume)
    start = None if arguments.resume else open_start(given, teacher, backbone)
    if start is not None and cfg.peft is not None:
        check_base(start)
    dataset_names = given.get("policy.input_features", "").lower() in NOTHING[1:]  # LeRobot then takes the dataset's
    if not cfg.resume and not cfg.rename_map and "rename_map" not in typed and not dataset_names:
        cfg.rename_map = saved_rename_map(teacher)
    pairs = Pairs(reflow.pairs_path) if reflow.pairs_path else None
    if pairs is None and loss.couples:
        # The run keeps its solver, whatever is written into the teacher's config meanwhile.
        reflow.num_steps = reflow.to_solver().of_couplings(teacher.config.num_steps).num_steps
    if pairs is not None:
        reflow.pairs_path = str(pairs.folder)
    return Run(cfg, arguments, loss, teacher, start, pairs)


def announce(run: Run) -> None:
    """Log what is used, and what the user did not ask for. LeRobot sets up logging for the main process only."""
    cfg = run.cfg
    if run.arguments.resume:
        logging.info("Reflow: resuming, teacher %s.", run.teacher.cited())
        schedule = cfg.scheduler
        if isinstance(schedule, CosineDecayWithWarmupSchedulerConfig) and cfg.steps > schedule.num_decay_steps:
            logging.info(
                "Reflow: the learning rate's schedule ends at step %d. From there to step %d the rate stays at %g. "
                "--scheduler.num_decay_steps=%d stretches the schedule.",
                *(schedule.num_decay_steps, cfg.steps, schedule.decay_lr, cfg.steps),
            )
    else:
        filled_in = " ".join(f"--{name}={value}" for name, value in run.arguments.chosen.items()) or "nothing"
        used = (run.teacher.cited(), cfg.steps, cfg.batch_size, filled_in)
        logging.info("Reflow: teacher %s, %d steps, batch %d; filled in: %s", *used)
        if cfg.rename_map and "rename_map" not in run.arguments.typed:
            logging.info("Reflow: the dataset's names are mapped as for the teacher: %s.", cfg.rename_map)
    if run.pairs is not None:
        solver = run.pairs.manifest.provenance.solver
        logging.info("Reflow: %d pairs from %s, no teacher is loaded.", len(run.pairs), run.pairs.folder)
        logging.info("Reflow: the pairs were solved by %s.", solver.in_words())
    elif run.loss.couples:
        own, solver = run.teacher.config.num_steps, cfg.reflow.to_solver()
        logging.info("Reflow: couplings by %s. The teacher's config says num_steps %d.", solver.in_words(), own)
    if held_out := in_words(cfg):
        logging.info("Reflow: %s", held_out)
