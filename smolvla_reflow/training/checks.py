"""The checks of a training run before anything is written: only of what would go wrong silently."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from smolvla_reflow.checkpoint.backbone import check_backbone
from smolvla_reflow.checkpoint.read import Checkpoint, read_checkpoint
from smolvla_reflow.checkpoint.words import check_words
from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    hub_destinations,
    renamed_statistics,
    resuming_keeps_statistics,
)
from smolvla_reflow.dataset.opening import (
    chosen_episodes,
    dataset_statistics,
    frame_ranges,
    open_metadata,
    policy_features,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import LossStrategy, get_loss_strategy
from smolvla_reflow.pairs.manifest import by_flag, differences
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.features import check_students_cameras, fitted, rename_map_in_use
from smolvla_reflow.smolvla.normalization import space_maps
from smolvla_reflow.smolvla.statistics import Statistics, fingerprint, saved_statistics
from smolvla_reflow.solver import ADAPTIVE, SolverFlags
from smolvla_reflow.teacher import check_agreement
from smolvla_reflow.training.config import ReflowConfig, ReflowTrainPipelineConfig
from smolvla_reflow.training.hold_out import hold_out

# The flags that decide how couplings are made. Stored pairs bring them.
COUPLING_FLAGS = (*SolverFlags.__dataclass_fields__, "scaled_noise")


def check_flags(reflow: ReflowConfig) -> LossStrategy:
    """Raise ReflowError if a flag is unknown, out of range, or without effect; returns the run's loss."""
    try:
        loss = get_loss_strategy(reflow.strategy)
    except ReflowError as error:
        raise ReflowError(f"--reflow.{error}" if str(error).startswith("strategy=") else str(error)) from error
    reflow.recipe()
    reflow.to_solver()
    if reflow.measure_freq < 0:  # Python's modulo would measure in each step
        raise ReflowError(f"--reflow.measure_freq={reflow.measure_freq}: give a number of steps, or 0 for never.")
    with_this_loss = f"with --reflow.strategy={reflow.strategy}"
    without_effect = {
        with_this_loss: (*loss.unused, *(() if loss.couples else ("pairs_path", "cuda_graph", *COUPLING_FLAGS))),
        f"{with_this_loss}, which trains state_proj anyway": ("train_state_proj",) if loss.joint_forward else (),
        "without --reflow.pairs_path": () if reflow.pairs_path else ("augment_pairs",),
        "with --reflow.pairs_path": ("cuda_graph",) if reflow.pairs_path else (),
        f"with --reflow.solver={reflow.solver}": ("cuda_graph",) if reflow.solver in ADAPTIVE else (),
    }
    for why, names in without_effect.items():
        for name in names:
            value = getattr(reflow, name)
            if value != getattr(ReflowConfig, name):
                shown = "true" if value is True else value
                raise ReflowError(f"--reflow.{name}={shown} has no effect {why}; leave it out.")
    return loss


def check_run(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    start: Checkpoint | None,
    pairs: Pairs | None,
    typed: Collection[str],
) -> Statistics:
    """Raise ReflowError if the run would train something else than the user expects. Arguments as in `Run`.

    Takes the held-out episodes out of those to train on (`hold_out.py`), and returns the batches' statistics.
    """
    policy = cfg.policy
    assert isinstance(policy, SmolVLAConfig)
    if cfg.reflow.train_state_proj and not policy.train_state_proj:
        raise ReflowError(
            "--reflow.train_state_proj=true has no effect where the policy's own config says train_state_proj=false; "
            "add --policy.train_state_proj=true, or leave it out."
        )
    check_destinations(cfg, teacher, typed)
    check_agreement(policy, teacher.config)
    check_backbone(policy)
    student = start or read_checkpoint(str(policy.pretrained_path))
    check_words(student, teacher)
    metadata = open_metadata(cfg.dataset, policy)
    features = policy_features(metadata)
    fitted(teacher, features, cfg.rename_map)
    check_students_cameras(policy, features, cfg.rename_map)
    hold_out(cfg, metadata)
    stats = training_statistics(cfg, student, metadata)
    space_maps(teacher, stats)
    if pairs is not None:
        check_pairs(cfg, teacher, pairs, metadata, stats, typed)
    return stats


def check_destinations(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint, typed: Collection[str]) -> None:
    """Raise ReflowError if the run could not write its folder, or would push into the teacher's repository.

    The output folder is first written into after many steps. The user may type the teacher's repository.
    """
    folder = Path(cfg.output_dir or ".").absolute()
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ReflowError(f"--output_dir={cfg.output_dir}: {parent} is not writable; name another folder.")
    teachers = {teacher.config.repo_id, teacher.source if teacher.commit else None}
    for repo_id in hub_destinations(cfg):
        if repo_id in teachers and not (repo_id == cfg.policy.repo_id and "policy.repo_id" in typed):
            raise ReflowError(
                f"This run would push into {repo_id}, the teacher's own repository. Name another one, "
                f"--policy.repo_id=..., or the teacher's yourself: --policy.repo_id={repo_id}"
            )


def training_statistics(
    cfg: ReflowTrainPipelineConfig, student: Checkpoint, metadata: LeRobotDatasetMetadata
) -> Statistics:
    """The statistics that LeRobot will use to normalise the batches."""
    if cfg.resume and resuming_keeps_statistics():
        return saved_statistics(student)
    return renamed_statistics(dataset_statistics(metadata, cfg.dataset), cfg.rename_map)


def check_pairs(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    pairs: Pairs,
    metadata: LeRobotDatasetMetadata,
    stats: Statistics,
    typed: Collection[str],
) -> None:
    """Raise ReflowError unless the pairs are this teacher's on this dataset, made by its flags, for every frame."""
    made, policy, flags = pairs.manifest.provenance, cfg.policy, cfg.reflow
    assert isinstance(policy, SmolVLAConfig)
    of_this_run = replace(
        made,
        teacher=flags.teacher_fingerprint or teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        chunk_size=policy.chunk_size,
        max_action_dim=policy.max_action_dim,
        rename_map=rename_map_in_use(teacher, cfg.rename_map, metadata.features),
    )
    unlike = differences(of_this_run, made)
    solved = by_flag(made)
    for name in COUPLING_FLAGS:
        value = getattr(flags, name)
        asked = value != getattr(ReflowConfig, name) or f"reflow.{name}" in typed
        if asked and value != solved[name]:
            unlike.append(f"{name} is {solved[name]} in the pairs and {value} here")
    if unlike:
        raise ReflowError(
            f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}. Leave those flags out, name the "
            "pairs' own teacher and dataset, or make other pairs."
        )
    wanted = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset))
    missing, total = pairs.missing(wanted), sum(map(len, wanted))
    if missing:
        raise ReflowError(
            f"{missing} of the {total} frames to train on have no pairs in {pairs.folder}, which covers "
            f"{pairs.manifest.num_frames}. Make pairs for them, or choose --dataset.episodes that have some."
        )
    if cfg.dataset.image_transforms.enable and not flags.augment_pairs:
        raise ReflowError(
            "--dataset.image_transforms.enable=true changes the student's images. The teacher made the pairs from the "
            "images as recorded. To train on both all the same, say --reflow.augment_pairs=true."
        )
