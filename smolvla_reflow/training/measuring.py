"""Measure a student while it trains, on frames of episodes that it does not train on.

    hold_out(cfg, metadata)     which episodes those are; they are taken out of those trained on
    begin(...) -> Measuring     the teacher's fine solutions on some of their frames, once
    measuring()                 before each training step: the student's distance to them, every so many steps

Flow error and energy distance are those of `smolvla-reflow-eval` (`smolvla_reflow.distance`), on fewer frames. Nothing
is drawn at random, so that a run trains to the same weights with and without it. Every process measures the same.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.random_utils import get_rng_state, set_rng_state
from torch import Tensor

from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.dataset import chosen_episodes, evenly_spaced, load_batches, open_configured
from smolvla_reflow.distance import energy_distance, squared_error
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.smolvla.observation import Observation, observe
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.solver import Solver
from smolvla_reflow.step_metrics import MEASURED
from smolvla_reflow.teacher import FrozenTeacher
from smolvla_reflow.training.config import ReflowTrainPipelineConfig

FRAMES = 32  # evenly spaced over the held-out episodes
NOISES = 4  # for each frame
FRAMES_AT_ONCE = 8
SEED = 0  # of the noise
FINE = Solver("rk4", num_steps=32)
NUM_STEPS = (1, 2)  # of the student's Euler steps; MEASURED names them


def hold_out(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata, typed: Collection[str] = ()) -> None:
    """Take the episodes to measure on out of those to train on, if it is not said which those are.

    Args:
        cfg: validated. Its `dataset.episodes` becomes all episodes but those of `reflow.measure_episodes`, if it is
            None.
        metadata: of the dataset.
        typed: names of the flags on the command line.

    Raises:
        ReflowError: an episode is not there or trained on, none is left to train on, or there are none to measure on.
    """
    dataset, held = cfg.dataset, cfg.reflow.measure_episodes
    if cfg.reflow.measure_freq == 0:
        if held is not None and "reflow.measure_episodes" in typed:
            raise ReflowError(
                "--reflow.measure_episodes has no effect without --reflow.measure_freq=N, every how many steps to "
                "measure; leave it out."
            )
        return
    if dataset.streaming:
        raise ReflowError("--reflow.measure_freq needs frames that can be read in any order; not --dataset.streaming.")
    if not held:
        if getattr(dataset, "eval_split", 0.0):
            return
        split = ", or let LeRobot choose some, --dataset.eval_split=0.1" if hasattr(dataset, "eval_split") else ""
        raise ReflowError(
            f"--reflow.measure_freq={cfg.reflow.measure_freq}: name episodes to measure on and not to train on, "
            f"--reflow.measure_episodes=[0,1]{split}."
        )
    missing = [episode for episode in held if not 0 <= episode < metadata.total_episodes]
    if missing:
        raise ReflowError(
            f"--reflow.measure_episodes: the dataset has {metadata.total_episodes}, and no episode {missing[0]}; they "
            "are counted from 0."
        )
    if dataset.episodes is None:
        dataset.episodes = [episode for episode in range(metadata.total_episodes) if episode not in held]
        if not dataset.episodes:
            raise ReflowError("--reflow.measure_episodes names every episode, so that none is left to train on.")
    elif both := sorted({*held}.intersection(chosen_episodes(metadata, dataset) or ())):
        raise ReflowError(
            f"--reflow.measure_episodes: episode {both[0]} is trained on, too; take it out of --dataset.episodes, or "
            "measure on others."
        )


class _Frames(NamedTuple):
    """Some frames, on the CPU."""

    seen: Observation  # by the student
    noise: Tensor  # (N * NOISES, chunk_size, max_action_dim)
    fine: Tensor  # (N, NOISES, chunk_size, D), the teacher's fine solutions, in standard deviations


class _Distance(NamedTuple):
    """Of some solutions to the teacher's fine ones, in standard deviations."""

    flow_error: float  # RMS, noise by noise
    energy_distance: float  # of the distributions, averaged over the frames


@dataclass(eq=False)
class Measuring:
    """To be called before each training step.

    Attributes:
        student: the policy that trains.
        frames: to measure on, some at once.
        deviations: (D,), how many standard deviations one normalised unit of each action dimension is, 0 where it
            never moves.
        every: how many steps.
        step: how many have been trained.
        measured: the last values, by their names in the log.
    """

    student: SmolVLAPolicy
    frames: Sequence[_Frames]
    deviations: Tensor
    every: int
    step: int
    measured: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> Mapping[str, float]:
        """The values that hold now, measured in the first call and every so many steps."""
        if not self.measured or self.step % self.every == 0:
            self.measure()
        self.step += 1
        return self.measured

    def finish(self) -> None:
        """Measure what has come of the last step, if it is one of those."""
        if self.step % self.every == 0:
            self.measure()

    def measure(self) -> None:
        """Solve the student's ODE on all frames, and log what is found."""
        fine = [each.fine for each in self.frames]
        with inference(self.student):
            found = [_distance(self._solved(Solver("euler", num_steps=n)), fine) for n in NUM_STEPS]
        values = [each.flow_error for each in found] + [each.energy_distance for each in found]
        self.measured = dict(zip(MEASURED, values, strict=True))
        numbers = " ".join(f"{name}:{value:.4f}" for name, value in self.measured.items())
        logging.info("Reflow: held out, after step %d: %s", self.step, numbers)

    def _solved(self, solver: Solver) -> list[Tensor]:
        device, ends = next(self.student.parameters()).device, []
        for seen, noise, _ in self.frames:
            velocity = velocity_of(self.student.model, _on(device, seen)).repeated(NOISES)
            ends.append(self.in_deviations(solver.integrate(velocity, noise.to(device))))
        return ends

    def in_deviations(self, actions: Tensor) -> Tensor:
        """Of (N * NOISES, chunk_size, max_action_dim) the robot's dimensions that move, as in `_Frames.fine`."""
        actions = actions[..., : len(self.deviations)] * self.deviations.to(actions)
        return actions[..., self.deviations.cpu() > 0].unflatten(0, (-1, NOISES)).cpu()


def begin(
    cfg: ReflowTrainPipelineConfig,
    student: SmolVLAPolicy,
    teacher: FrozenTeacher,
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]],
    deviations: Tensor,
    *,
    num_steps: int,
    step: int,
) -> Measuring:
    """Load the frames, solve the teacher's ODE on them finely, and log how it does with its own number of steps.

    Args:
        cfg: of the run, with its held-out episodes.
        student: the policy that trains.
        teacher: its teacher.
        preprocessor: from a dataset's batch to the student's input.
        deviations: see `Measuring`.
        num_steps: that the teacher's own config says.
        step: that the run begins after.

    Raises:
        ReflowError: a frame cannot be read.
    """
    frames: list[_Frames] = []
    measuring, own_steps = Measuring(student, frames, deviations, cfg.reflow.measure_freq, step), []
    with inference(teacher.policy):
        for batch in held_out_frames(cfg):
            preprocessed = preprocessor(dict(batch))
            seen = observe(student, preprocessed)
            shape = (student.config.chunk_size, student.config.max_action_dim)
            noise = frames_noise(SEED, batch["index"].tolist(), NOISES, shape)
            velocity = teacher.velocity(teacher.observe(preprocessed, student, seen)).repeated(NOISES)
            solved = (s.integrate(velocity, noise.to(seen.state.device)) for s in (FINE, Solver("euler", num_steps)))
            mapped = (actions if teacher.space is None else teacher.space.actions(actions) for actions in solved)
            fine, own = map(measuring.in_deviations, mapped)
            frames.append(_Frames(_on(torch.device("cpu"), seen), noise, fine))
            own_steps.append(own)
    bar = _distance(own_steps, [each.fine for each in frames])
    logging.info(
        "Reflow: measuring on %d held-out frames every %d steps. The teacher's own num_steps=%d: flow_error:%.4f "
        "energy_distance:%.4f",
        sum(len(each.fine) for each in frames),
        cfg.reflow.measure_freq,
        num_steps,
        *bar,
    )
    return measuring


def held_out_frames(cfg: ReflowTrainPipelineConfig) -> list[dict[str, Any]]:
    """Raw batches of frames of the held-out episodes, as they were recorded.

    Raises:
        ReflowError: a frame cannot be read.
    """
    cfg = copy.copy(cfg)
    cfg.dataset = copy.deepcopy(cfg.dataset)
    cfg.dataset.image_transforms.enable = False
    if cfg.reflow.measure_episodes:
        cfg.dataset.episodes = cfg.reflow.measure_episodes
        if hasattr(cfg.dataset, "eval_split"):
            cfg.dataset.eval_split = 0.0
    before = get_rng_state()  # of which a loader draws a seed
    try:
        dataset = open_configured(cfg, held_out=True)
        positions = evenly_spaced(len(dataset), FRAMES)
        at_once = [positions[i : i + FRAMES_AT_ONCE] for i in range(0, len(positions), FRAMES_AT_ONCE)]
        # Decoders that this process had opened would not survive in the processes that LeRobot then forks off it.
        return list(load_batches(dataset, at_once, num_workers=min(1, cfg.num_workers)))
    finally:
        set_rng_state(before)


def training_preprocessor(
    cfg: ReflowTrainPipelineConfig, policy: SmolVLAPolicy, stats: Statistics
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What LeRobot's `train()` makes of a dataset's batch before it reaches this policy.

    Args:
        cfg: validated, whose `policy.pretrained_path` the processors are read from.
        policy: with the features of the dataset in its config.
        stats: by which LeRobot normalises the batches.
    """
    config = policy.config
    preprocessor, _ = make_pre_post_processors(
        config,
        str(cfg.policy.pretrained_path),
        preprocessor_overrides={
            "device_processor": {"device": torch.device(config.device).type},
            "normalizer_processor": {
                "stats": stats,
                "features": {**config.input_features, **config.output_features},
                "norm_map": config.normalization_mapping,
            },
            "rename_observations_processor": {"rename_map": cfg.rename_map},
        },
    )
    return preprocessor


@contextmanager
def inference(policy: SmolVLAPolicy) -> Iterator[None]:
    """Run a policy as its stock inference would, within whatever it is in the middle of."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad(), torch.autocast(torch.device(policy.config.device).type, enabled=policy.config.use_amp):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _distance(ends: Sequence[Tensor], fine: Sequence[Tensor]) -> _Distance:
    """Of solutions (N, NOISES, chunk_size, D), in some batches, to the fine ones of the same noises."""
    actions, reference = torch.cat(list(ends)), torch.cat(list(fine))
    flow_error = squared_error(actions, reference).mean().sqrt().item()
    return _Distance(flow_error, energy_distance(actions, reference).mean().item())


def _on(device: torch.device, seen: Observation) -> Observation:
    images, masks = ([tensor.to(device) for tensor in each] for each in (seen.images, seen.img_masks))
    return Observation(images, masks, *(tensor.to(device) for tensor in seen[2:]))
