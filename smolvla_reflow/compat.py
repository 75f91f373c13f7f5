"""All differences between the supported LeRobot versions, 0.4.4 to 0.6.1, and nothing else."""

import copy
import importlib.util
import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lerobot
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import factory, utils
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import dataset_to_policy_features as dataset_to_policy_features
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.scripts import lerobot_train
from lerobot.utils.constants import OBS_PREFIX
from lerobot.utils.logging_utils import MetricsTracker
from packaging.version import Version
from torch import Tensor

from smolvla_reflow.errors import ReflowError

SUPPORTED = "0.4.4 to 0.6.1"
# Names that LeRobot's training logs by itself, in one version or another.
REPORTED_BY_LEROBOT = frozenset(
    {
        *("loss", "grad_norm", "lr", "update_s", "dataloading_s", "gpu_mem_gb", "samples_per_s"),
        *("preprocessing_s", "step_s", "steps", "samples", "episodes", "epochs"),
    }
)
POLICY_FORWARD = ("batch", "noise", "time", "reduction")
MODEL_FORWARD = ("images", "img_masks", "lang_tokens", "lang_masks", "state", "actions", "noise", "time")


def train(cfg: TrainPipelineConfig, hooked: Callable[[Accelerator], Accelerator]) -> None:
    """Run LeRobot's `train()`, past its parser, on a validated config, with `hooked` applied to its Accelerator.

    Until 0.6.1 `train()` takes an Accelerator; from 0.6.2 on the config builds it.
    """
    stock = inspect.unwrap(lerobot_train.train)
    if "accelerator" in inspect.signature(stock).parameters:
        stock(cfg, accelerator=hooked(Accelerator(**accelerator_arguments(cfg))))
        return
    settings: Any = getattr(cfg, "accelerator", None)
    if not hasattr(settings, "build"):
        raise ReflowError(f"This LeRobot trains without an Accelerator that could be handed in: {unsupported()}")
    # From 0.6.2 on training ignores `use_amp`, while inference follows it.
    sharded = getattr(getattr(cfg, "parallelism", None), "is_sharded", False)
    assert cfg.policy is not None  # validated
    if cfg.policy.use_amp and settings.mixed_precision == "no" and not sharded:
        settings.mixed_precision = autocast_precision(cfg.policy.device)
    build = settings.build
    settings.build = lambda *args, **kwargs: hooked(build(*args, **kwargs))
    try:
        stock(cfg)
    finally:
        del settings.build


def check_signatures(policy: SmolVLAPolicy) -> None:
    """Raise ReflowError unless SmolVLA's forwards, as their classes define them, take the known arguments."""
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
    """The arguments of the Accelerator that this LeRobot version's `train()` would build."""
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
        arguments["mixed_precision"] = autocast_precision(policy.device)
    return arguments


def autocast_precision(device: str | None) -> str:
    """Accelerate's name for the number format of a device's autocast, which `use_amp` turns on."""
    dtype = torch.get_autocast_dtype(torch.device(device or "cpu").type)
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def copy_prefix(prefix: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Copy the sampler's arguments for `denoise_step`, a mask and the key-value cache, with each tensor changed.

    The cache is a dictionary of tensors up to LeRobot 0.6.0, and transformers' own class from 0.6.1 on. `denoise_step`
    writes into the latter, so the copy has its own layers. Later versions may nest tuples, and hand over numbers.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(changed(item) for item in value)
        if hasattr(value, "layers"):
            # A deep copy would take up memory for nothing, and cannot be made of tensors with a gradient.
            value = copy.copy(value)
            value.layers = [copy.copy(layer) for layer in value.layers]
            for layer in value.layers:
                layer.keys, layer.values = changed(layer.keys), changed(layer.values)
        return value

    return {key: changed(item) for key, item in prefix.items()}


def resuming_keeps_statistics() -> bool:
    """True if a resumed run normalises by its checkpoint's statistics instead of the dataset's: from 0.6.1 on."""
    return Version(lerobot.__version__) >= Version("0.6.1")


def renamed_statistics(stats: Mapping[str, Any], rename_map: dict[str, str]) -> Mapping[str, Any]:
    """The dataset's statistics under the names that training looks them up by; LeRobot renames them from 0.6.2 on."""
    rename = getattr(lerobot_train, "rename_stats", None)
    return stats if rename is None else rename(dict(stats), rename_map)


def renamed_early(rename_map: Mapping[str, str]) -> dict[str, str]:
    """The part of a map that the preprocessor does not know, and that LeRobot applies before it: from 0.6.2 on."""
    if getattr(lerobot_train, "rename_batch_keys", None) is None:
        return {}
    return {name: to for name, to in rename_map.items() if not name.startswith(OBS_PREFIX)}


def renamed_batch(batch: dict[str, Any], rename_map: dict[str, str]) -> dict[str, Any]:
    """A raw batch under the names that LeRobot's training gives to the preprocessor; see `renamed_early`."""
    renames = renamed_early(rename_map)
    return lerobot_train.rename_batch_keys(batch, renames) if renames else batch


def refuse_remote_job(cfg: TrainPipelineConfig) -> None:
    """Raise ReflowError for LeRobot 0.6's `--job.target`, which would submit `lerobot-train` without reflow."""
    job = getattr(cfg, "job", None)
    if job is not None and job.is_remote:
        raise ReflowError(
            f"--job.target={job.target} would run lerobot-train, not reflow, on the remote machine; "
            "install smolvla-reflow there and run smolvla-reflow-train on it."
        )


def open_metadata_as_training(dataset: DatasetConfig) -> LeRobotDatasetMetadata:
    """The dataset's metadata, as this LeRobot's `make_dataset()` opens it; storage buckets exist from 0.6.1 on."""
    kind = {"repo_type": dataset.repo_type} if hasattr(dataset, "repo_type") else {}
    return LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision, **kind)


def open_as_training(cfg: TrainPipelineConfig, *, held_out: bool = False) -> LeRobotDataset:
    """The dataset as this LeRobot's `train()` opens it, or the episodes that it holds out (from 0.6.0 on), if any."""
    split = getattr(factory, "make_train_eval_datasets", None)
    if split is None:
        return factory.make_dataset(cfg)
    training, evaluation = split(cfg)
    return evaluation if held_out and evaluation is not None else training


def chosen_by_lerobot(dataset: DatasetConfig, total_episodes: int) -> list[int] | None:
    """The episodes that the configuration chooses, None for all; from 0.6.2 on, some can be excluded."""
    resolve = getattr(utils, "resolve_episode_indices", None)
    if resolve is None:
        return dataset.episodes
    return resolve(dataset.episodes, total_episodes, getattr(dataset, "exclude_episodes", None))


def excludes_episodes(dataset: DatasetConfig) -> bool:
    """True if the configuration leaves episodes out by their numbers, as it can from 0.6.2 on."""
    return bool(getattr(dataset, "exclude_episodes", None))


def collate_function(metadata: LeRobotDatasetMetadata) -> Callable[[list[Any]], Any] | None:
    """The collate function of training, None for PyTorch's own; from 0.6.0 on columns may hold annotations."""
    if not getattr(metadata, "has_language_columns", False):
        return None
    from lerobot.utils.collate import lerobot_collate_fn

    return lerobot_collate_fn


def statistics_command(repo_id: str, root: Path) -> str:
    """LeRobot's own command that computes all statistics of a dataset anew."""
    module = _installed("lerobot.scripts", "lerobot.datasets.v30", name="augment_dataset_quantile_stats")
    return f"python -m {module} --repo-id={repo_id} --root={shlex.quote(str(root))} --overwrite"


def conversion_command(repo_id: str, root: Path) -> str:
    """LeRobot's own command that converts a dataset of format v2.1 in a folder."""
    module = _installed("lerobot.scripts", "lerobot.datasets.v30", name="convert_dataset_v21_to_v30")
    if module.startswith("lerobot.datasets"):  # before 0.5 its root is a folder that holds a folder named by the id
        repo_id, root = root.name, root.parent
    return f"python -m {module} --repo-id={repo_id} --root={shlex.quote(str(root))} --push-to-hub=false"


def _installed(*packages: str, name: str) -> str:
    """The module of this name in the first of these packages that has one; LeRobot moved its scripts in 0.5."""
    for package in packages:
        if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{name}"):
            return f"{package}.{name}"
    return f"{packages[0]}.{name}"


def resumes_from_hub() -> bool:
    """True if a run resumes from the checkpoints that it pushed to the hub: from 0.6.0 on."""
    return Version(lerobot.__version__) >= Version("0.6.0")


def prints_metrics() -> bool:
    """True if training averages and prints a policy's metrics: from 0.6.0 on. Before, the last step's go to W&B."""
    return hasattr(MetricsTracker, "update_metrics")


def hub_destinations(cfg: TrainPipelineConfig) -> list[str]:
    """The repositories that training pushes to: from 0.6.0 on checkpoints too, from 0.6.2 on averaged weights."""
    policy = cfg.policy
    assert policy is not None  # validated
    if not policy.repo_id or not (policy.push_to_hub or getattr(cfg, "save_checkpoint_to_hub", False)):
        return []
    averages = getattr(getattr(cfg, "ema", None), "enable", False)
    return [policy.repo_id, *([f"{policy.repo_id}-ema"] if averages else [])]


def download_last_checkpoint(repo_id: str, output_dir: Path) -> Path:
    """Download the last checkpoint of a run on the hub as LeRobot does to resume it, from 0.6.0 on; its folder."""
    from lerobot.common.train_utils import resolve_resume_checkpoint

    return resolve_resume_checkpoint(repo_id, output_dir)


def holds_out(dataset: DatasetConfig) -> bool:
    """True if training holds out a share of the episodes, as it can from 0.6.0 on."""
    return getattr(dataset, "eval_split", 0.0) > 0


def is_bucket(dataset: DatasetConfig) -> bool:
    """True if the dataset is a storage bucket, which exists from 0.6.1 on."""
    return getattr(dataset, "repo_type", "dataset") != "dataset"


def depth_cameras(metadata: LeRobotDatasetMetadata) -> list[str]:
    """The depth cameras of a dataset, which exist from 0.6.0 on."""
    return list(getattr(metadata, "depth_keys", ()))


def can_hold_out(dataset: DatasetConfig) -> bool:
    """True if training can hold out a share of the episodes (`--dataset.eval_split`); LeRobot does from 0.6.0 on."""
    return hasattr(dataset, "eval_split")


def control_frequency(env: EnvConfig) -> float:
    """Control steps a second. LeRobot 0.4 says 30 for LIBERO, whose simulator takes 20 there whatever `fps` says."""
    ignores_fps = env.type == "libero" and type(env).__dataclass_fields__["fps"].default == 30
    return 20 if ignores_fps else env.fps


def installed() -> str:
    """The installed LeRobot's name and version, for messages."""
    return f"LeRobot {lerobot.__version__}"
