"""A checkpoint's policy and processors, loaded as plain LeRobot loads them."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from smolvla_reflow.checkpoint.adapter import merged
from smolvla_reflow.checkpoint.backbone import check_backbone, load_tokenizer
from smolvla_reflow.checkpoint.read import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    STATISTICS_AMONG_WEIGHTS,
    TOKENIZER_STEP,
    Checkpoint,
    stored_tensors,
)
from smolvla_reflow.errors import ReflowError, first_line, in_one_line


def load_policy(checkpoint: Checkpoint, device: str) -> SmolVLAPolicy:
    """A checkpoint's policy for inference on `device`, neither compiled nor guided by an earlier chunk.

    An adapter's is its base, with the adapter merged into it.

    Raises:
        ReflowError: its backbone is not here, or its weights do not fit its configuration or are not finite.
    """
    config = copy.deepcopy(checkpoint.config)
    config.device, config.compile_model, config.rtc_config = device, False, None
    check_backbone(config)
    try:
        policy = SmolVLAPolicy.from_pretrained(checkpoint.weights_file.parent, config=config)
        if checkpoint.base is not None:
            policy = merged(policy, checkpoint.folder)
        policy = policy.to(device)
    except ReflowError:
        raise
    except Exception as error:  # LeRobot and transformers let through whatever a checkpoint leads them to
        reason = misfit(error) or in_one_line(error)
        raise ReflowError(f"The policy in {checkpoint.source} cannot be loaded: {reason}") from error
    check_loaded(policy, checkpoint)
    return policy.eval().requires_grad_(False)


def misfit(error: Exception) -> str | None:
    """The first tensor of which PyTorch says, loading weights, that it does not fit; None if it says something else."""
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict") else None


def check_loaded(policy: SmolVLAPolicy, checkpoint: Checkpoint) -> None:
    """Raise ReflowError for missing, unknown or non-finite weights, of which LeRobot warns at most."""
    stored = stored_tensors(checkpoint.weights_file)
    # Tied parameters are one object under several names, of which a checkpoint stores one.
    loaded = {id(parameter) for name, parameter in policy.named_parameters(remove_duplicate=False) if name in stored}
    missing = [name for name, parameter in policy.named_parameters() if id(parameter) not in loaded]
    known = policy.state_dict()
    unknown = [name for name in stored if name not in known and not name.startswith(STATISTICS_AMONG_WEIGHTS)]
    for problem, found in (("lack", missing), ("have the unknown", unknown)):
        if found:
            raise ReflowError(
                f"The weights in {checkpoint.source} do not fit its config.json: they {problem} {found[0]}."
            )
    for name, tensor in known.items():
        if not torch.isfinite(tensor).all():
            raise ReflowError(
                f"The weights in {checkpoint.source} are broken: {name} holds NaN or infinity. Use an earlier "
                "checkpoint."
            )


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
    """A checkpoint's processors, for a policy on `device`; `rename_map` from the dataset's names to the policy's.

    Raises:
        ReflowError: it has none, or they cannot be loaded.
    """
    overrides: dict[str, Any] = {"device_processor": {"device": device}}
    if rename_map:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    return Processors(*_load(checkpoint, overrides, {}))


def check_processors(checkpoint: Checkpoint) -> None:
    """Raise ReflowError unless LeRobot's `train()`, which fills in four steps of them, can load the processors."""
    before: dict[str, Any] = {"normalizer_processor": {}, "rename_observations_processor": {}}
    _load(checkpoint, {**before, "device_processor": {"device": "cpu"}}, {"unnormalizer_processor": {}})


def _load(
    checkpoint: Checkpoint, before: dict[str, Any], after: dict[str, Any]
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The two pipelines, with these arguments in place of the saved ones, by the step's name."""
    for processor in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME):
        checkpoint.steps(processor)
    if checkpoint.tokenizer is not None:
        before = {**before, TOKENIZER_STEP: {"tokenizer": _tokenizer(checkpoint, checkpoint.tokenizer)}}
    try:
        return make_pre_post_processors(
            checkpoint.config, str(checkpoint.folder), preprocessor_overrides=before, postprocessor_overrides=after
        )
    except Exception as error:  # LeRobot's loader lets through whatever a broken file leads it to
        reason = in_one_line(error)
        raise ReflowError(
            f"The processors of {checkpoint.source} cannot be loaded: {reason}. If a file was cut off, copy the "
            "checkpoint again."
        ) from error


def _tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    try:
        return load_tokenizer(name)
    except Exception as error:  # also whatever damaged files lead transformers to
        raise ReflowError(
            f"{checkpoint.folder / PREPROCESSOR_NAME} names the tokenizer '{name}', which is not here, nor could it be "
            f"downloaded ({first_line(error)}). If the backbone has moved, say where it is now: "
            "--policy.vlm_model_name=..."
        ) from error


def check_device(device: str) -> None:
    """Raise ReflowError if nothing can be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ReflowError(
            f"--policy.device={device} cannot be used ({first_line(error)}); name another one, such as "
            "--policy.device=cpu."
        ) from None
