"""Everything that can be refused before anything is loaded or measured."""

import math
from collections.abc import Mapping
from pathlib import Path

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata, dataset_to_policy_features
from smolvla_reflow.dataset import check_as_recorded
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.journal import NAME as UNFINISHED
from smolvla_reflow.smolvla.features import fitted


def check_values(cfg: EvalConfig) -> None:
    """Raise ReflowError for a flag that is missing, out of range, or makes no sense beside the others."""
    if not cfg.policy.path:
        raise ReflowError("Name the checkpoint to evaluate: --policy.path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name a folder for the report: --output_dir=...")
    if cfg.output_dir.exists() and not (cfg.output_dir / UNFINISHED).is_file():
        raise ReflowError(f"--output_dir={cfg.output_dir} exists already; name a new folder or remove that one.")
    if cfg.earlier_rounds and not cfg.teacher_path:
        raise ReflowError("--earlier_rounds needs --teacher_path, the teacher of the first round.")
    if not cfg.num_steps or min(cfg.num_steps) < 1:
        raise ReflowError(f"--num_steps={cfg.num_steps}: give numbers of steps, each at least 1.")
    least_of = {"num_frames": 2, "num_noises": 2, "reference_steps": 2, "bar_num_steps": 1, "batch_size": 1}
    for name, least in least_of.items():
        given = getattr(cfg, name)
        if given is not None and given < least:
            raise ReflowError(f"--{name}={given}: at least {least} is needed.")
    if not 0 < cfg.success_margin < 1:
        raise ReflowError(f"--success_margin={cfg.success_margin}: give a share between 0 and 1, such as 0.05.")
    if not 0 < cfg.energy_margin < math.inf:
        raise ReflowError(f"--energy_margin={cfg.energy_margin}: give a number above 0, such as 0.003.")
    if cfg.env_task is not None and cfg.env is None:
        raise ReflowError("--env_task has no effect without --env.type; leave it out.")
    if cfg.write_num_steps and not Path(cfg.policy.path).expanduser().is_dir():
        raise ReflowError("--write_num_steps needs --policy.path to be a folder, whose config.json it writes.")
    check_as_recorded(cfg.dataset, "policies are measured on")


def fit_to_dataset(
    checkpoints: Mapping[str, Checkpoint], metadata: LeRobotDatasetMetadata, rename_map: dict[str, str]
) -> dict[str, Checkpoint]:
    """The checkpoints as LeRobot would run them on this dataset.

    Args:
        checkpoints: of the policies, the reference first.
        metadata: of the dataset.
        rename_map: from the dataset's names to the policies'; if it is empty, each checkpoint's own holds.

    Raises:
        ReflowError: one of them cannot use this dataset, or cannot be compared with the first.
    """
    features = dataset_to_policy_features(metadata.features)
    reference = next(iter(checkpoints.values()))
    for checkpoint in checkpoints.values():
        check_comparable(checkpoint, reference)
    return {name: fitted(checkpoint, features, rename_map) for name, checkpoint in checkpoints.items()}


def check_comparable(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ReflowError unless both solve ODEs of the same shape, so that they can start from the same noise."""
    for name in ("chunk_size", "max_action_dim"):
        here, there = getattr(checkpoint.config, name), getattr(teacher.config, name)
        if here != there:
            raise ReflowError(
                f"{checkpoint.source} and the teacher cannot be compared: {name} is {here} in it and {there} in the "
                "teacher."
            )
