"""Measure a student while it trains, on frames of the episodes that are held out (`hold_out.py`).

    begin(...) -> Measuring     solve the teacher's ODE finely on some of their frames, once
    measuring()                 before each training step: measure the student's distance, every so many steps

Flow error and energy distance are measured as in `smolvla-reflow-eval` (`smolvla_reflow.distance`), on fewer frames.
Nothing is drawn at random, so a run trains to the same weights with and without measuring. Every process measures the
same.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.random_utils import get_rng_state, set_rng_state
from torch import Tensor

from smolvla_reflow.compat import holds_out
from smolvla_reflow.dataset.frames import evenly_spaced, load_batches
from smolvla_reflow.dataset.opening import open_configured
from smolvla_reflow.distance import FINE_STEPS, distance, frame_flow
from smolvla_reflow.errors import doing
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
NUM_STEPS = (1, 2)  # of the student's Euler steps; MEASURED names them


class _Frames(NamedTuple):
    """Some frames, on the CPU."""

    seen: Observation  # by the student
    indices: list[int]  # in the dataset
    fine: Tensor  # (N, NOISES, chunk_size, D), the teacher's fine solutions, in standard deviations


@dataclass(eq=False)
class Measuring:
    """A function of the student, to be called before each training step."""

    student: SmolVLAPolicy
    deviations: Tensor  # (D,) standard deviations in one normalised unit of an action, 0 if it never moves
    every: int  # steps between two measurements
    step: int  # number of steps that have been trained
    frames: list[_Frames] = field(default_factory=list)  # to measure on, some at once
    measured: dict[str, float] = field(default_factory=dict)  # the last values, by their names in the log

    def __call__(self) -> Mapping[str, float]:
        """The values that hold now, measured in the first call and every so many steps."""
        if not self.measured or self.step % self.every == 0:
            self.measure()
        self.step += 1
        return self.measured

    def finish(self) -> None:
        """Measure after the last step, if it is time."""
        if self.step % self.every == 0:
            self.measure()

    def measure(self) -> None:
        """Solve the student's ODE on all frames, and log the distances."""
        fine = torch.cat([each.fine for each in self.frames])
        with inference(self.student):
            found = [distance(torch.cat([self._ends(each, n) for each in self.frames]), fine) for n in NUM_STEPS]
        values = [each.flow_error for each in found] + [each.energy_distance for each in found]
        self.measured = dict(zip(MEASURED, values, strict=True))
        numbers = " ".join(f"{name}:{value:.4f}" for name, value in self.measured.items())
        logging.info("Reflow: held out, after step %d: %s", self.step, numbers)

    def _ends(self, frames: _Frames, num_steps: int) -> Tensor:
        seen = _on(next(self.student.parameters()).device, frames.seen)
        flow = frame_flow(velocity_of(self.student.model, seen), frames.indices, NOISES, SEED)
        return self.in_deviations(flow.solve(Solver("euler", num_steps)))

    def in_deviations(self, actions: Tensor) -> Tensor:
        """The robot's dimensions that move of (N, NOISES, chunk_size, max_action_dim), in standard deviations."""
        actions = actions[..., : len(self.deviations)] * self.deviations.to(actions)
        return actions[..., self.deviations.cpu() > 0].cpu()


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
    """Solve the teacher's ODE finely on the frames, and log its distance with its own `num_steps`."""
    measuring, own = Measuring(student, deviations, cfg.reflow.measure_freq, step), []
    with inference(teacher.policy):
        for batch in held_out_frames(cfg):
            preprocessed, indices = preprocessor(dict(batch)), batch["index"].tolist()
            seen = observe(student, preprocessed)
            flow = frame_flow(teacher.velocity(teacher.observe(preprocessed, student, seen)), indices, NOISES, SEED)
            ends = [flow.solve(solver) for solver in (Solver("rk4", FINE_STEPS), Solver("euler", num_steps))]
            fine, coarse = (measuring.in_deviations(teacher.space.actions(x) if teacher.space else x) for x in ends)
            measuring.frames.append(_Frames(_on(torch.device("cpu"), seen), indices, fine))
            own.append(coarse)
    fine = torch.cat([each.fine for each in measuring.frames])
    logging.info(
        "Reflow: measuring on %d held-out frames every %d steps. The teacher's own num_steps=%d: flow_error:%.4f "
        "energy_distance:%.4f",
        len(fine),
        measuring.every,
        num_steps,
        *distance(torch.cat(own), fine),
    )
    return measuring


def held_out_frames(cfg: ReflowTrainPipelineConfig) -> list[dict[str, Any]]:
    """Raw batches of frames of the held-out episodes, as they were recorded."""
    cfg = copy.copy(cfg)
    cfg.dataset = copy.deepcopy(cfg.dataset)
    cfg.dataset.image_transforms.enable = False
    if cfg.reflow.measure_episodes:
        cfg.dataset.episodes = cfg.reflow.measure_episodes
        if holds_out(cfg.dataset):
            cfg.dataset.eval_split = 0.0
    before = get_rng_state()  # a loader draws a seed
    try:
        with doing("reading the held-out frames (--reflow.measure_freq)"):
            dataset = open_configured(cfg, held_out=True)
            positions = evenly_spaced(len(dataset), FRAMES)
            at_once = [positions[i : i + FRAMES_AT_ONCE] for i in range(0, len(positions), FRAMES_AT_ONCE)]
            # Decoders opened in this process would not survive in the processes that LeRobot then forks off it.
            return list(load_batches(dataset, at_once, num_workers=min(1, cfg.num_workers), rename_map=cfg.rename_map))
    finally:
        set_rng_state(before)


def training_preprocessor(
    cfg: ReflowTrainPipelineConfig, policy: SmolVLAPolicy, stats: Statistics
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The preprocessor of LeRobot's `train()`, which normalises a dataset's batches by `stats`."""
    config = policy.config
    features = {**config.input_features, **config.output_features}
    overrides = {
        "device_processor": {"device": torch.device(config.device).type},
        "normalizer_processor": {"stats": stats, "features": features, "norm_map": config.normalization_mapping},
        "rename_observations_processor": {"rename_map": cfg.rename_map},
    }
    return make_pre_post_processors(config, str(cfg.policy.pretrained_path), preprocessor_overrides=overrides)[0]


@contextmanager
def inference(policy: SmolVLAPolicy) -> Iterator[None]:
    """Run a policy as its stock inference would, and give it back its modes."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad(), torch.autocast(torch.device(policy.config.device).type, enabled=policy.config.use_amp):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _on(device: torch.device, seen: Observation) -> Observation:
    images, masks = ([tensor.to(device) for tensor in each] for each in (seen.images, seen.img_masks))
    return Observation(images, masks, *(tensor.to(device) for tensor in seen[2:]))
