"""The teacher as a maker of pairs: it encodes each frame's prefix once and solves for all its couplings together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.checkpoint.load import load_policy, load_processors, stock_autocast
from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.pairs.manifest import DTYPES, Provenance
from smolvla_reflow.smolvla.normalization import SpaceMaps
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of


@dataclass(frozen=True)
class PairMaker:
    """A teacher that solves for all the couplings of a batch of frames.

    Attributes:
        policy: the teacher.
        preprocessor: of its checkpoint, from a dataset's batch to its input.
        space: the maps between the dataset's normalised space and the teacher's, None if they are the same.
        provenance: what to solve for.
    """

    policy: SmolVLAPolicy
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    space: SpaceMaps | None
    provenance: Provenance

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Actions `(B, couplings_per_frame, chunk_size, max_action_dim)`, float32 on the CPU.

        Raises:
            ReflowError: they are not finite, or too large for the number format they are stored in.
        """
        made = self.provenance
        frames = batch["index"].tolist()
        noise = frames_noise(made.seed, frames, made.couplings_per_frame, (made.chunk_size, made.max_action_dim))
        observation = observe(self.policy, self.preprocessor(dict(batch)))
        with stock_autocast(self.policy):
            velocity = velocity_of(self.policy.model, observation).repeated(made.couplings_per_frame)
            actions = made.solver.integrate(velocity, noise.to(observation.state.device))
        if self.space is not None:
            actions = self.space.actions(actions)
        if not (actions.abs() < torch.finfo(DTYPES[made.dtype]).max).all():
            raise ReflowError(
                f"The teacher's actions for frames {frames[0]} to {frames[-1]} are not finite, or beyond "
                f"{made.dtype}; check its checkpoint and the dataset's frames."
            )
        return actions.unflatten(0, (len(frames), made.couplings_per_frame)).float().cpu()


def load_pair_maker(
    teacher: Checkpoint, provenance: Provenance, space: SpaceMaps | None, device: str, rename_map: dict[str, str]
) -> PairMaker:
    """Load the teacher as plain LeRobot would, on `device`."""
    preprocessor = load_processors(teacher, device, rename_map).before
    return PairMaker(load_policy(teacher, device), preprocessor, space, provenance)
