"""Everything that can be refused before anything is loaded or measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.smolvla.checkpoint import Checkpoint
from smolvla_reflow.smolvla.features import check_features
from smolvla_reflow.smolvla.policy import check_device


def check_values(cfg: EvalConfig) -> None:
    """Raise ReflowError for a flag that is missing, out of range, or makes no sense beside the others."""
    if not cfg.policy.path:
        raise ReflowError("Name the checkpoint to evaluate: --policy.path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name a folder for the report: --output_dir=...")
    if cfg.output_dir.exists():
        raise ReflowError(f"--output_dir={cfg.output_dir} exists already; name a new folder or remove that one.")
    if cfg.earlier_rounds and not cfg.teacher_path:
        raise ReflowError("--earlier_rounds needs --teacher_path, the teacher of the first round.")
    if not cfg.num_steps or min(cfg.num_steps) < 1:
        raise ReflowError(f"--num_steps={cfg.num_steps}: give numbers of steps, each at least 1.")
    for name, least in (("num_frames", 1), ("num_noises", 2), ("reference_steps", 2), ("batch_size", 1)):
        if getattr(cfg, name) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")
    if not cfg.tolerance >= 0:
        raise ReflowError(f"--tolerance={cfg.tolerance} is negative.")
    if cfg.write_num_steps and not Path(cfg.policy.path).expanduser().is_dir():
        raise ReflowError("--write_num_steps needs --policy.path to be a folder, whose config.json it writes.")
    check_device(cfg.policy.device)


def check_checkpoints(checkpoints: Sequence[Checkpoint], features: dict[str, Any], rename_map: dict[str, str]) -> None:
    """Raise ReflowError unless all policies can use this dataset and can be compared with the first.

    Args:
        checkpoints: of the policies.
        features: of the dataset, by name, each with its "shape".
        rename_map: from the dataset's names to the policies'.
    """
    for checkpoint in checkpoints:
        check_features(checkpoint, features, rename_map)
        if checkpoint.config.adapt_to_pi_aloha:
            raise ReflowError(f"{checkpoint.source} has adapt_to_pi_aloha=true, whose units cannot be compared yet.")
        check_comparable(checkpoint, checkpoints[0])


def check_comparable(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ReflowError unless both solve ODEs of the same shape, so that they can start from the same noise."""
    for name in ("chunk_size", "max_action_dim"):
        here, there = getattr(checkpoint.config, name), getattr(teacher.config, name)
        if here != there:
            raise ReflowError(
                f"{checkpoint.source} and the teacher cannot be compared: {name} is {here} in it and {there} in the "
                "teacher."
            )
