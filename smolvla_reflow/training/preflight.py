"""The checks of a training run, before anything is written: its options, dataset, teacher and pairs."""

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from transformers import AutoConfig

from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    dataset_to_policy_features,
    renamed_statistics,
    resuming_keeps_statistics,
)
from smolvla_reflow.dataset import dataset_statistics, frame_ranges, open_metadata
from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.losses import get_loss_strategy
from smolvla_reflow.pairs.manifest import differences
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.checkpoint import Checkpoint, locate
from smolvla_reflow.smolvla.features import fitted
from smolvla_reflow.smolvla.normalization import Statistics, fingerprint, saved_statistics, space_maps
from smolvla_reflow.smolvla.teacher import check_agreement
from smolvla_reflow.smolvla.words import check_words
from smolvla_reflow.solver import SolverFlags
from smolvla_reflow.training.config import ReflowConfig, ReflowTrainPipelineConfig


def check_options(reflow: ReflowConfig) -> None:
    """Raise ReflowError if an option is unknown, out of range, or has no effect beside the others."""
    try:
        strategy = get_loss_strategy(reflow.strategy)
        reflow.recipe()
    except ReflowError as error:
        begins_with_an_option = re.split(r"\W", str(error))[0] in ReflowConfig.__dataclass_fields__
        raise ReflowError(f"--reflow.{error}" if begins_with_an_option else str(error)) from error
    reflow.to_solver()
    of_couplings = () if strategy.couples else ("pairs_path", *SolverFlags.__dataclass_fields__)
    for name in (*strategy.unused, *of_couplings):
        if getattr(reflow, name) != getattr(ReflowConfig, name):
            raise ReflowError(
                f"--reflow.{name}={getattr(reflow, name)} has no effect with --reflow.strategy={reflow.strategy}; "
                "leave it out."
            )
    if reflow.augment_pairs and not reflow.pairs_path:
        raise ReflowError("--reflow.augment_pairs=true has no effect without --reflow.pairs_path; leave it out.")


def check_run(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    pairs: Pairs | None = None,
    typed: Collection[str] = (),
) -> Statistics:
    """Raise ReflowError if this dataset cannot be trained on with this teacher, or with these pairs.

    Args:
        cfg: validated.
        teacher: of the run.
        pairs: that it made, if they are used.
        typed: names of the flags on the command line, which hold also where they say what is the default.

    Returns:
        The statistics by which LeRobot will normalise the batches.
    """
    check_numbers(cfg)
    check_writable(Path(cfg.output_dir or "."))
    check_student(cfg, teacher)
    metadata = open_metadata(cfg.dataset)
    fitted(teacher, dataset_to_policy_features(metadata.features), cfg.rename_map)
    check_frames(cfg.dataset, metadata, teacher.config.chunk_size)
    stats = training_statistics(cfg, metadata)
    check_finite(stats)
    space_maps(teacher, stats)
    if pairs is not None:
        check_pairs(cfg, teacher, pairs, metadata, stats)
        check_solver(cfg.reflow, pairs, typed)
    return stats


def training_statistics(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata) -> Statistics:
    """The statistics by which LeRobot will normalise the batches."""
    assert isinstance(cfg.policy, SmolVLAConfig)
    if cfg.resume and resuming_keeps_statistics():
        folder = Path(str(cfg.policy.pretrained_path))
        return saved_statistics(Checkpoint(source=str(folder), folder=folder, config=cfg.policy))
    return renamed_statistics(dataset_statistics(metadata, cfg.dataset), cfg.rename_map)


def check_numbers(cfg: ReflowTrainPipelineConfig) -> None:
    """Raise ReflowError for numbers that LeRobot would stumble over half-way."""
    for name, least in (("steps", 1), ("batch_size", 1), ("save_freq", 1), ("num_workers", 0)):
        if getattr(cfg, name) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")


def check_writable(folder: Path) -> None:
    """Raise ReflowError if no such folder can be made, without making it."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ReflowError(f"--output_dir={folder}: nothing can be written in {there}; name a folder elsewhere.")


def check_student(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint) -> None:
    """Raise ReflowError if the student is of another shape than the teacher, or has no backbone to start from."""
    assert isinstance(cfg.policy, SmolVLAConfig)
    check_agreement(cfg.policy, teacher.config)
    check_words(locate(str(cfg.policy.pretrained_path)).folder, teacher)
    backbone = cfg.policy.vlm_model_name
    try:
        AutoConfig.from_pretrained(backbone, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ReflowError(
            f"--policy.vlm_model_name={backbone}: the backbone's configuration is not there, nor could it be "
            f"downloaded ({first_line(error)}). If it has moved, say where it is now."
        ) from None


def check_frames(dataset: DatasetConfig, metadata: LeRobotDatasetMetadata, chunk_size: int) -> None:
    """Raise ReflowError unless there are these episodes, and at least one chunk of actions in them."""
    total = sum(map(len, frame_ranges(metadata, dataset.episodes)))
    if total < chunk_size:
        raise ReflowError(
            f"The episodes of {dataset.repo_id} to train on hold {total} frames, fewer than one chunk of "
            f"{chunk_size} actions; record more, or choose other --dataset.episodes."
        )


def check_finite(stats: Statistics) -> None:
    """Raise ReflowError if recorded states or actions hold NaN or infinity, as their statistics then do."""
    for name in (ACTION, OBS_STATE):
        for kind, values in (stats.get(name) or {}).items():
            if not torch.isfinite(torch.as_tensor(values, dtype=torch.float64)).all():
                raise ReflowError(
                    f"The dataset's '{name}' holds NaN or infinity (so says '{kind}' in meta/stats.json); leave the "
                    "episodes out in which it does (lerobot-edit-dataset) or record them again."
                )


def check_pairs(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    pairs: Pairs,
    metadata: LeRobotDatasetMetadata,
    stats: Statistics,
) -> None:
    """Raise ReflowError unless the pairs are this teacher's on this dataset, and cover every frame."""
    made, policy = pairs.manifest.provenance, cfg.policy
    assert isinstance(policy, SmolVLAConfig)
    here = replace(
        made,
        teacher=teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        chunk_size=policy.chunk_size,
        max_action_dim=policy.max_action_dim,
    )
    unlike = differences(here, made)
    if unlike:
        raise ReflowError(
            f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}. Name what they were made of, or "
            "make other pairs."
        )
    wanted = frame_ranges(metadata, cfg.dataset.episodes)
    missing, total = pairs.missing(wanted), sum(map(len, wanted))
    if missing:
        raise ReflowError(
            f"{missing} of the {total} frames to train on have no pairs in {pairs.folder}, which covers "
            f"{pairs.manifest.num_frames}. Make pairs for them, or choose --dataset.episodes that have some."
        )
    if cfg.dataset.image_transforms.enable and not cfg.reflow.augment_pairs:
        raise ReflowError(
            "--dataset.image_transforms.enable=true changes the images the student sees, but not the pairs, which "
            "the teacher made from the images as recorded. If that is what you want, say "
            "--reflow.augment_pairs=true."
        )


def check_solver(flags: SolverFlags, pairs: Pairs, typed: Collection[str]) -> None:
    """Raise ReflowError if the flags contradict how the teacher's ODE was solved for the pairs."""
    solver = pairs.manifest.provenance.solver
    made = {**vars(solver), "solver": solver.method}
    asked = {name: getattr(flags, name) for name in SolverFlags.__dataclass_fields__}
    unlike = [
        f"{name} is {made[name]} in the pairs and {value} here"
        for name, value in asked.items()
        if value != made[name] and (value != getattr(SolverFlags, name) or f"reflow.{name}" in typed)
    ]
    if unlike:
        raise ReflowError(
            f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}. Leave those flags out, or make "
            "other pairs."
        )
