"""What differs between the supported LeRobot versions, 0.4.4 to 0.6.1, and nothing else."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lerobot
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.factory import dataset_to_policy_features
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.scripts import lerobot_train
from packaging.version import Version
from torch import Tensor

from smolvla_reflow.errors import ReflowError

SUPPORTED = "0.4.4 to 0.6.1"
POLICY_FORWARD = ("batch", "noise", "time", "reduction")
MODEL_FORWARD = ("images", "img_masks", "lang_tokens", "lang_masks", "state", "actions", "noise", "time")

__all__ = [
    "LeRobotDatasetMetadata",
    "accelerator_arguments",
    "check_signatures",
    "copy_prefix",
    "dataset_to_policy_features",
    "gradient_accumulation",
    "refuse_remote_job",
    "renamed_statistics",
    "resuming_keeps_statistics",
    "train",
]


def train(cfg: TrainPipelineConfig, hooked: Callable[[Accelerator], Accelerator]) -> None:
    """Run LeRobot's `train()` on this configuration, with a hooked Accelerator.

    It is called past its parser, which recognises only its own config class.

    Until 0.6.1 `train()` takes an Accelerator; from 0.6.2 on it has the config build one.

    Args:
        cfg: validated.
        hooked: what is done to the Accelerator that LeRobot would have used.

    Raises:
        ReflowError: this LeRobot does neither.
    """
    stock = inspect.unwrap(lerobot_train.train)
    if "accelerator" in inspect.signature(stock).parameters:
        stock(cfg, accelerator=hooked(Accelerator(**accelerator_arguments(cfg))))
        return
    settings: Any = getattr(cfg, "accelerator", None)
    if not hasattr(settings, "build"):
        raise ReflowError(f"This LeRobot trains without an Accelerator that could be handed in: {unsupported()}")
    build = settings.build
    settings.build = lambda *args, **kwargs: hooked(build(*args, **kwargs))
    try:
        stock(cfg)
    finally:
        del settings.build


def check_signatures(policy: SmolVLAPolicy) -> None:
    """Raise ReflowError unless SmolVLA's forwards take the arguments that this package knows.

    The functions of the classes are looked at; an instance's own may be compiled or wrapped.
    """
    for module, known in ((policy, POLICY_FORWARD), (policy.model, MODEL_FORWARD)):
        found = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if found != known:
            raise ReflowError(
                f"{type(module).__name__}.forward takes ({', '.join(found)}) in this LeRobot and not "
                f"({', '.join(known)}): {unsupported()}"
            )


def unsupported() -> str:
    return (
        f"this version of smolvla-reflow supports LeRobot {SUPPORTED}, and {lerobot.__version__} is installed. "
        "Install a supported one, or a newer smolvla-reflow."
    )


def accelerator_arguments(cfg: TrainPipelineConfig) -> dict[str, Any]:
    """Arguments with which this LeRobot version's `train()` would build its own Accelerator."""
    policy = cfg.policy
    assert policy is not None  # validated
    arguments: dict[str, Any] = {
        "step_scheduler_with_optimizer": False,
        "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)],
        "cpu": policy.device == "cpu",
    }
    version = Version(lerobot.__version__)
    if version >= Version("0.6.0"):
        arguments["mixed_precision"] = None
    # Until 0.6.0 training ignores `use_amp`; from then on it follows it in the device's default autocast dtype.
    if version >= Version("0.6.1") and policy.use_amp:
        dtype = torch.get_autocast_dtype(torch.device(policy.device).type)
        arguments["mixed_precision"] = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return arguments


def gradient_accumulation(cfg: TrainPipelineConfig) -> int:
    """Backward passes for each optimizer step; LeRobot accumulates gradients from 0.6.2 on."""
    settings = getattr(getattr(cfg, "accelerator", None), "gradient_accumulation", None)
    return getattr(settings, "steps", 1)


def copy_prefix(prefix: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """What the sampler hands to `denoise_step`, a mask and the cache of keys and values, each sample `times` in a row.

    The cache is a dictionary of tensors up to LeRobot 0.6.0 and transformers' own class from 0.6.1 on, into which
    `denoise_step` writes. The tensors are shared with the original as long as `times` is 1.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if times == 1 else value.repeat_interleave(times, dim=0)
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if value is not None:
            # Writing and repeating replace each layer's tensors, so that layers of its own are all the copy needs. A
            # deep copy would take up memory for nothing, and cannot be made of tensors with a gradient.
            value = copy.copy(value)
            value.layers = [copy.copy(layer) for layer in value.layers]
            if times > 1:
                value.batch_repeat_interleave(times)
        return value

    return {key: copied(value) for key, value in prefix.items()}


def resuming_keeps_statistics() -> bool:
    """Whether a resumed run normalises by the statistics saved in its checkpoint, and not by the dataset's.

    LeRobot does from 0.6.1 on.
    """
    return Version(lerobot.__version__) >= Version("0.6.1")


def renamed_statistics(stats: Mapping[str, Any], rename_map: dict[str, str]) -> Mapping[str, Any]:
    """The dataset's statistics under the names that training looks them up by; LeRobot renames them from 0.6.2 on."""
    rename = getattr(lerobot_train, "rename_stats", None)
    return stats if rename is None else rename(dict(stats), rename_map)


def refuse_remote_job(cfg: TrainPipelineConfig) -> None:
    """Raise ReflowError for LeRobot 0.6's `--job.target`, which would submit `lerobot-train` without reflow."""
    job = getattr(cfg, "job", None)
    if job is not None and job.is_remote:
        raise ReflowError(
            f"--job.target={job.target} would run lerobot-train, not reflow, on the remote machine; "
            "install smolvla-reflow there and run smolvla-reflow-train on it."
        )
