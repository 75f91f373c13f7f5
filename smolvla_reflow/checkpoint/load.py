"""A checkpoint's policy and processors, loaded as plain LeRobot loads them."""

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.checkpoint.adapter import merged
from smolvla_reflow.checkpoint.backbone import check_backbone, load_tokenizer
from smolvla_reflow.checkpoint.read import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    STATISTICS_AMONG_WEIGHTS,
    TOKENIZER_STEP,
    Checkpoint,
)
from smolvla_reflow.checkpoint.tensors import StoredTensors
from smolvla_reflow.errors import ReflowError, doing


def load_policy(checkpoint: Checkpoint, device: str) -> SmolVLAPolicy:
    """Load a checkpoint's policy for inference on `device`, uncompiled and without real-time chunking.

    An adapter is merged into its base. Raises ReflowError if weights do not fit the configuration or are not finite.
    """
    config = copy.deepcopy(checkpoint.config)
    config.device, config.compile_model, config.rtc_config = device, False, None
    check_backbone(config)
    with doing(f"loading the policy of {checkpoint.source}"):
        policy = SmolVLAPolicy.from_pretrained(checkpoint.weights_file.parent, config=config)
        if checkpoint.base is not None:
            policy = merged(policy, checkpoint.folder)
        policy = policy.to(device)
    check_loaded(policy, checkpoint)
    return policy.eval().requires_grad_(False)


def weights_of(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's policy by name, each read when it is asked for; an adapter's are merged first."""
    if checkpoint.base is None:
        return StoredTensors(checkpoint.weights_file)
    return load_policy(checkpoint, "cpu").state_dict()


def check_loaded(policy: SmolVLAPolicy, checkpoint: Checkpoint) -> None:
    """Raise ReflowError for missing, unknown or non-finite weights; LeRobot warns at most."""
    check_names(
        policy, StoredTensors(checkpoint.weights_file), f"The weights in {checkpoint.source} do not fit its config.json"
    )
    for name, tensor in policy.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ReflowError(f"{name} in {checkpoint.source} holds NaN or infinity. Use an earlier checkpoint.")


def check_names(policy: SmolVLAPolicy, stored: Collection[str], problem: str) -> None:
    """Raise ReflowError for a parameter that is not stored under any of its names, or a stored name that is unknown."""
    # Tied parameters are one object under several names, and a checkpoint stores one of these names.
    loaded = {id(parameter) for name, parameter in policy.named_parameters(remove_duplicate=False) if name in stored}
    for name, parameter in policy.named_parameters():
        if id(parameter) not in loaded:
            raise ReflowError(f"{problem}: they lack {name}.")
    # Weights that an older library saved may hold a buffer that is derived now.
    known = policy.state_dict().keys() | dict(policy.named_buffers()).keys()
    for name in stored:
        if name not in known and not name.startswith(STATISTICS_AMONG_WEIGHTS):
            raise ReflowError(f"{problem}: they have the unknown {name}.")


def stock_autocast(policy: SmolVLAPolicy) -> contextlib.AbstractContextManager[object]:
    """The autocast that LeRobot would use for this policy: its device's if `use_amp` is set, else none."""
    config = policy.config
    return torch.autocast(torch.device(config.device).type) if config.use_amp else contextlib.nullcontext()


class Processors(NamedTuple):
    """A checkpoint's own processors."""

    before: Callable[[dict[str, Any]], dict[str, Any]]  # from a dataset's batch to the policy's input
    after: Callable[[Tensor], Tensor]  # from normalised actions to the robot's units


def load_processors(checkpoint: Checkpoint, device: str, rename_map: dict[str, str]) -> Processors:
    """Load a checkpoint's processors for `device`; `rename_map` goes from the dataset's names to the policy's."""
    overrides: dict[str, Any] = {"device_processor": {"device": device}}
    if rename_map:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    for processor in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME):
        checkpoint.processor_steps(processor)
    name, config, folder = checkpoint.tokenizer, checkpoint.config, str(checkpoint.folder)
    if name is not None:
        overrides[TOKENIZER_STEP] = {"tokenizer": load_tokenizer(name)}
    with doing(f"loading the processors of {checkpoint.source}"):
        return Processors(*make_pre_post_processors(config, folder, preprocessor_overrides=overrides))
