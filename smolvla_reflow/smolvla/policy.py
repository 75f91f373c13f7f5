"""A checkpoint's policy and processors, loaded as plain LeRobot loads them."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.smolvla.checkpoint import Checkpoint


def load_policy(checkpoint: Checkpoint, device: str) -> SmolVLAPolicy:
    """A checkpoint's policy for inference on `device`, neither compiled nor guided by an earlier chunk."""
    config = copy.deepcopy(checkpoint.config)
    config.device, config.compile_model, config.rtc_config = device, False, None
    policy = SmolVLAPolicy.from_pretrained(checkpoint.folder, config=config)
    return policy.to(device).eval().requires_grad_(False)


def stock_autocast(policy: SmolVLAPolicy) -> contextlib.AbstractContextManager[object]:
    """The autocast in which LeRobot would run this policy: that of its device if `use_amp` is set, or none."""
    config = policy.config
    return torch.autocast(torch.device(config.device).type) if config.use_amp else contextlib.nullcontext()


@dataclass(frozen=True)
class Processors:
    """A checkpoint's own processors.

    Attributes:
        before: from a dataset's batch to the policy's input.
        after: from normalised actions to the robot's units.
    """

    before: Callable[[dict[str, Any]], dict[str, Any]]
    after: Callable[[Tensor], Tensor]


def load_processors(checkpoint: Checkpoint, device: str, rename_map: dict[str, str]) -> Processors:
    """A checkpoint's processors, for a policy on `device`; `rename_map` from the dataset's names to the policy's."""
    overrides: dict[str, Any] = {"device_processor": {"device": device}}
    if rename_map:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    return Processors(
        *make_pre_post_processors(checkpoint.config, str(checkpoint.folder), preprocessor_overrides=overrides)
    )


def check_device(device: str) -> None:
    """Raise ReflowError if nothing can be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ReflowError(
            f"--policy.device={device} cannot be used ({first_line(error)}); name another one, such as "
            "--policy.device=cpu."
        ) from None
