"""Check a run before anything is written: does the dataset exist, and does the teacher fit it?"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import FeatureType
from lerobot.datasets.factory import IMAGENET_STATS
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import INFO_PATH
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from transformers import AutoConfig

from smolvla_reflow.checkpoint import Checkpoint, read_json
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.config import ReflowTrainPipelineConfig
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.normalization import Statistics, change_of_space, fingerprint
from smolvla_reflow.pairs import Pairs, differences
from smolvla_reflow.solver import Solver
from smolvla_reflow.teacher import check_agreement

ODE_FIELDS = ("solver", "num_steps", "rtol", "atol")


def check_run(cfg: ReflowTrainPipelineConfig, teacher: Checkpoint, pairs: Pairs | None = None) -> Statistics:
    """Raise ReflowError if this dataset cannot be trained on with this teacher, or with these pairs.

    Returns:
        The statistics by which LeRobot will normalise the batches.
    """
    check_numbers(cfg)
    check_writable(Path(cfg.output_dir or "."))
    check_student(cfg, teacher)
    metadata = open_metadata(cfg.dataset)
    check_features(teacher, metadata.features, cfg.rename_map)
    check_frames(cfg.dataset, metadata, teacher.config.chunk_size)
    stats = dataset_statistics(metadata, cfg.dataset)
    check_finite(stats)
    change_of_space(teacher, stats)
    if pairs is not None:
        check_pairs(cfg, teacher, pairs, metadata, stats)
    return stats


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
    backbone = cfg.policy.vlm_model_name
    try:
        AutoConfig.from_pretrained(backbone, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReflowError(
            f"--policy.vlm_model_name={backbone}: the backbone's configuration is not there, nor could it be "
            f"downloaded ({reason}). If it has moved, say where it is now."
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


def open_metadata(dataset: DatasetConfig) -> LeRobotDatasetMetadata:
    """Raise ReflowError if there is no such dataset."""
    try:
        return LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision)
    except Exception as error:  # the hub client's and LeRobot's errors share no base class
        where = f"--dataset.root={dataset.root}" if dataset.root else f"--dataset.repo_id={dataset.repo_id}"
        if dataset.root and _is_empty(Path(dataset.root)):
            raise ReflowError(f"The episodes at {where} hold 0 frames; record some.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReflowError(f"There is no LeRobotDataset at {where}, nor could it be downloaded ({reason}).") from None


def _is_empty(root: Path) -> bool:
    """Whether this is a dataset in which nothing was recorded, which LeRobot 0.4 takes for one that is missing."""
    try:
        return read_json(root / INFO_PATH).get("total_frames") == 0
    except ReflowError:
        return False


def open_dataset(dataset: DatasetConfig, **options: Any) -> LeRobotDataset:
    """The frames themselves, as they were recorded; `options` are LeRobotDataset's own."""
    return LeRobotDataset(
        dataset.repo_id,
        root=dataset.root,
        episodes=dataset.episodes,
        revision=dataset.revision,
        video_backend=dataset.video_backend,
        **options,
    )


def check_device(device: str) -> None:
    """Raise ReflowError if nothing can be put on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ReflowError(f"--policy.device={device} cannot be used ({reason}); leave the flag out.") from None


def dataset_statistics(metadata: LeRobotDatasetMetadata, dataset: DatasetConfig) -> Statistics:
    """The statistics by which LeRobot normalises this dataset's batches."""
    stats = dict(metadata.stats)
    if dataset.use_imagenet_stats:
        stats |= {camera: {**stats.get(camera, {}), **IMAGENET_STATS} for camera in metadata.camera_keys}
    return stats


def frame_ranges(metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None) -> list[range]:
    """The indices of all frames of these episodes (None for all), as ascending ranges without gaps between them.

    Raises:
        ReflowError: there is no such episode.
    """
    chosen = range(metadata.total_episodes) if episodes is None else sorted(set(episodes))
    unknown = [episode for episode in chosen if not 0 <= episode < metadata.total_episodes]
    if unknown:
        raise ReflowError(
            f"--dataset.episodes: the dataset has {metadata.total_episodes}, and no episode {unknown[0]}."
        )
    ranges: list[range] = []
    for episode in chosen:
        row = metadata.episodes[episode]
        start, stop = int(row["dataset_from_index"]), int(row["dataset_to_index"])
        if ranges and ranges[-1].stop == start:
            start = ranges.pop().start
        ranges.append(range(start, stop))
    return ranges


def check_pairs(
    cfg: ReflowTrainPipelineConfig,
    teacher: Checkpoint,
    pairs: Pairs,
    metadata: LeRobotDatasetMetadata,
    stats: Statistics,
) -> None:
    """Raise ReflowError unless the pairs are this teacher's on this dataset, whole, and cover every frame."""
    made, ode, policy = pairs.manifest.provenance, cfg.reflow, cfg.policy
    default = (None, Solver.method)
    assert isinstance(policy, SmolVLAConfig)
    here = replace(
        made,
        teacher=teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        chunk_size=policy.chunk_size,
        max_action_dim=policy.max_action_dim,
        # The teacher's ODE was solved when the pairs were made; what is said of it here has to agree.
        **{name: value for name, value in vars(ode).items() if name in ODE_FIELDS and value not in default},
    )
    unlike = differences(here, made)
    if unlike:
        raise ReflowError(f"The pairs in {pairs.folder} are not this run's: {'; '.join(unlike)}.")
    wanted = frame_ranges(metadata, cfg.dataset.episodes)
    missing, total = pairs.missing(wanted), sum(map(len, wanted))
    if missing:
        raise ReflowError(
            f"{missing} of the {total} frames to train on have no pairs in {pairs.folder}, which covers "
            f"{pairs.manifest.num_frames}. Make pairs for them, or choose --dataset.episodes that have some."
        )
    if cfg.dataset.image_transforms.enable and not ode.augment_pairs:
        raise ReflowError(
            "--dataset.image_transforms.enable=true changes the images the student sees, but not the pairs, which "
            "the teacher made from the images as recorded. If that is what you want, say "
            "--reflow.augment_pairs=true."
        )
    pairs.check()


def check_features(
    checkpoint: Checkpoint, features: dict[str, Any], rename_map: dict[str, str], where: str = "the dataset"
) -> None:
    """The dataset (or what `where` names) must have the policy's state and action in their widths, and its cameras."""
    names = {rename_map.get(name, name): feature for name, feature in features.items()}
    expected = {**(checkpoint.config.input_features or {}), **(checkpoint.config.output_features or {})}
    for name, feature in expected.items():
        if name not in names:
            if feature.type is FeatureType.VISUAL and ".empty_camera_" in name:
                continue
            raise ReflowError(
                f"{checkpoint.source} needs '{name}', which {where} lacks (it has {', '.join(sorted(names))}); "
                "if it is there under another name, map it with --rename_map."
            )
        shape = tuple(names[name]["shape"])
        if feature.type in (FeatureType.STATE, FeatureType.ACTION) and shape != tuple(feature.shape):
            raise ReflowError(
                f"'{name}' has shape {shape} in {where} and {tuple(feature.shape)} in {checkpoint.source}."
            )
