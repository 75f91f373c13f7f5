"""The checks of a training run, before anything is written: its options, dataset, teacher and pairs."""

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from smolvla_reflow.checkpoint.backbone import check_backbone
from smolvla_reflow.checkpoint.read import Checkpoint, read_checkpoint
from smolvla_reflow.checkpoint.words import check_words
from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    dataset_to_policy_features,
    hub_destinations,
    renamed_statistics,
    resuming_keeps_statistics,
    saves_final_checkpoint_alone,
)
from smolvla_reflow.dataset import (
    chosen_episodes,
    dataset_statistics,
    frame_ranges,
    is_downloaded,
    load_batches,
    open_configured,
    open_metadata,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import get_loss_strategy
from smolvla_reflow.pairs.manifest import differences
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.features import check_students_cameras, fitted, rename_map_in_use
from smolvla_reflow.smolvla.normalization import space_maps
from smolvla_reflow.smolvla.statistics import Statistics, fingerprint, saved_statistics
from smolvla_reflow.solver import SolverFlags
from smolvla_reflow.teacher import check_agreement
from smolvla_reflow.training.config import ReflowConfig, ReflowTrainPipelineConfig
from smolvla_reflow.training.measuring import hold_out


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
    if reflow.train_state_proj and strategy.joint_forward:
        raise ReflowError(
            f"--reflow.train_state_proj=true has no effect with --reflow.strategy={reflow.strategy}, which trains it "
            "anyway; leave it out."
        )
    if reflow.measure_freq < 0:
        raise ReflowError(f"--reflow.measure_freq={reflow.measure_freq}: give a number of steps, or 0 for never.")
    if reflow.augment_pairs and not reflow.pairs_path:
        raise ReflowError("--reflow.augment_pairs=true has no effect without --reflow.pairs_path; leave it out.")


def check_run(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    pairs: Pairs | None = None,
    typed: Collection[str] = (),
    start: Checkpoint | None = None,
) -> Statistics:
    """Raise ReflowError if this dataset cannot be trained on with this teacher, or with these pairs.

    Args:
        cfg: validated. Episodes to measure on are taken out of those to train on (`measuring.py`).
        teacher: of the run.
        pairs: that it made, if they are used.
        typed: names of the flags on the command line, which hold also where they say what is the default.
        start: where the student starts, if that is not the folder in its configuration alone.

    Returns:
        The statistics by which LeRobot will normalise the batches.
    """
    check_numbers(cfg)
    check_state_proj(cfg)
    check_writable(Path(cfg.output_dir or "."))
    check_student(cfg, teacher, start)
    metadata = open_metadata(cfg.dataset, cfg.policy)
    features = dataset_to_policy_features(metadata.features)
    fitted(teacher, features, cfg.rename_map)
    check_students_cameras(cfg.policy, features, cfg.rename_map)
    hold_out(cfg, metadata, typed)
    check_frames(cfg, metadata)
    stats = training_statistics(cfg, metadata)
    space_maps(teacher, stats)
    if pairs is not None:
        check_pairs(cfg, teacher, pairs, metadata, stats)
        check_solver(cfg.reflow, pairs, typed)
    return stats


def training_statistics(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata) -> Statistics:
    """The statistics by which LeRobot will normalise the batches."""
    assert isinstance(cfg.policy, SmolVLAConfig)
    if cfg.resume and resuming_keeps_statistics():
        return saved_statistics(read_checkpoint(str(cfg.policy.pretrained_path)))
    return renamed_statistics(dataset_statistics(metadata, cfg.dataset), cfg.rename_map)


def check_numbers(cfg: ReflowTrainPipelineConfig) -> None:
    """Raise ReflowError for numbers that LeRobot would stumble over half-way."""
    for name, least in (("steps", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(cfg, name) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")
    if cfg.save_freq < 1 and not saves_final_checkpoint_alone():
        raise ReflowError(
            f"--save_freq={cfg.save_freq}: this LeRobot needs at least 1. --save_freq={cfg.steps}, the number of "
            "steps, saves the final checkpoint alone."
        )


def check_state_proj(cfg: ReflowTrainPipelineConfig) -> None:
    """Raise ReflowError if `state_proj` is to be trained by the one flag and not by the other."""
    assert isinstance(cfg.policy, SmolVLAConfig)
    if cfg.reflow.train_state_proj and not cfg.policy.train_state_proj:
        raise ReflowError(
            "--reflow.train_state_proj=true has no effect where the policy's own config says train_state_proj=false; "
            "add --policy.train_state_proj=true, or leave it out."
        )


def check_writable(folder: Path) -> None:
    """Raise ReflowError if no such folder can be made, without making it."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ReflowError(f"--output_dir={folder}: nothing can be written in {there}; name a folder elsewhere.")


def check_destination(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint, typed: Collection[str]) -> None:
    """Raise ReflowError if the run would push into the teacher's repository on the hub and nobody typed its name.

    Args:
        cfg: validated.
        teacher: of the run.
        typed: names of the flags on the command line.
    """
    teachers = {teacher.config.repo_id, teacher.source if teacher.commit else None}
    for repo_id in hub_destinations(cfg):
        if repo_id in teachers and not (repo_id == cfg.policy.repo_id and "policy.repo_id" in typed):
            raise ReflowError(
                f"This run would push into {repo_id}, the teacher's own repository. Name another one, "
                f"--policy.repo_id=..., or that one yourself: --policy.repo_id={repo_id}"
            )


def check_student(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint, start: Checkpoint | None) -> None:
    """Raise ReflowError if the student is of another shape than the teacher, or lacks its backbone or processors."""
    assert isinstance(cfg.policy, SmolVLAConfig)
    check_agreement(cfg.policy, teacher.config)
    check_backbone(cfg.policy)
    check_words(start or read_checkpoint(str(cfg.policy.pretrained_path)), teacher)


def check_frames(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata) -> None:
    """Raise ReflowError unless a frame can be read as training will read it, if it need not be downloaded first."""
    if cfg.dataset.streaming or not is_downloaded(metadata, cfg.dataset):
        return
    # Decoders that this process had opened would not survive in the processes that LeRobot then forks off it.
    next(load_batches(open_configured(cfg), [[0]], num_workers=min(1, cfg.num_workers)))


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
        teacher=cfg.reflow.teacher_fingerprint or teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        chunk_size=policy.chunk_size,
        max_action_dim=policy.max_action_dim,
        rename_map=rename_map_in_use(teacher, cfg.rename_map, metadata.features),
    )
    unlike = differences(here, made)
    if unlike:
        raise ReflowError(
            f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}. Name what they were made of, or "
            "make other pairs."
        )
    wanted = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset))
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
        if value != made[name] and (value != getattr(type(flags), name) or f"reflow.{name}" in typed)
    ]
    if unlike:
        raise ReflowError(
            f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}. Leave those flags out, or make "
            "other pairs."
        )
