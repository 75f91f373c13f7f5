"""A policy to be measured, with its processors, run as plain LeRobot runs it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.checkpoint.load import load_policy, load_processors, stock_autocast
from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.evaluation.start import NORMAL, constant_noise
from smolvla_reflow.smolvla.binding import bind
from smolvla_reflow.smolvla.normalization import Affine, robot_units


@dataclass(frozen=True)
class MeasuredPolicy:
    """A policy and everything needed to run it."""

    name: str  # in the report "teacher", "round 1", "student", or "policy" for a policy alone
    policy: SmolVLAPolicy  # in eval mode
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]  # from a batch of the dataset to the policy's input
    postprocessor: Callable[[Tensor], Tensor]  # from a normalised action to the robot's units
    robot_units: Affine  # the same for a whole chunk, (..., chunk_size, action_dim)
    num_steps: int  # its default number of Euler steps
    start: str = NORMAL  # the noise of its chunks (`start.py`)

    @contextlib.contextmanager
    def inference(self, num_steps: int) -> Iterator[None]:
        """Run the policy without gradients, with `num_steps` Euler steps, in LeRobot's autocast, from its noise."""
        config, model = self.policy.config, self.policy.model
        config.num_steps, before = num_steps, config.num_steps
        binding = bind(model) if self.start == NORMAL else bind(model, sample_noise=self._constant_noise)
        try:
            with torch.no_grad(), stock_autocast(self.policy):
                yield
        finally:
            config.num_steps = before
            binding.undo()

    def _constant_noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return constant_noise(self.start, shape).to(device)


def load_measured_policy(name: str, checkpoint: Checkpoint, device: str, rename_map: dict[str, str]) -> MeasuredPolicy:
    """Load a checkpoint's policy and processors; `rename_map` goes from the dataset's names to the policy's."""
    processors, policy = load_processors(checkpoint, device, rename_map), load_policy(checkpoint, device)
    units, num_steps = robot_units(checkpoint, policy), checkpoint.config.num_steps
    return MeasuredPolicy(name, policy, processors.before, processors.after, units, num_steps)
