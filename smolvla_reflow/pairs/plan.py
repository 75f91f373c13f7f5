"""What a run of `smolvla-reflow-pairs` is to make, before anything is made."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lerobot.configs.default import DatasetConfig

from smolvla_reflow.compat import LeRobotDatasetMetadata, dataset_to_policy_features
from smolvla_reflow.dataset import dataset_statistics, frame_ranges, open_metadata
from smolvla_reflow.pairs.config import PairsConfig
from smolvla_reflow.pairs.manifest import DTYPES, Manifest, Provenance
from smolvla_reflow.smolvla.checkpoint import Checkpoint
from smolvla_reflow.smolvla.features import fitted
from smolvla_reflow.smolvla.normalization import SpaceMaps, Statistics, fingerprint, space_maps


@dataclass(frozen=True)
class Plan:
    """A set of pairs in the dataset's normalised space, none of which is made yet.

    Attributes:
        teacher: with the features in its config that it has on this dataset.
        manifest: what the pairs depend on, and which frames they cover.
        space: the maps between the dataset's normalised space and the teacher's, None if they are the same.
    """

    teacher: Checkpoint
    manifest: Manifest
    space: SpaceMaps | None


def plan_pairs(cfg: PairsConfig, teacher: Checkpoint) -> Plan:
    """Plan the pairs of this teacher on the configured dataset.

    Raises:
        ReflowError: there is no such dataset, or it does not fit the teacher.
    """
    metadata = open_metadata(cfg.dataset)
    teacher = fitted(teacher, dataset_to_policy_features(metadata.features), cfg.rename_map)
    stats = dataset_statistics(metadata, cfg.dataset)
    space = space_maps(teacher, stats)
    manifest = Manifest(
        provenance=_provenance(cfg, teacher, metadata, stats),
        made_from=_made_from(cfg.dataset, teacher, cfg.rename_map),
        package_version=version("smolvla-reflow"),
        frames=[[frames.start, frames.stop] for frames in frame_ranges(metadata, cfg.dataset.episodes)],
        frames_per_shard=cfg.frames_per_shard,
        bytes_per_pair=teacher.config.chunk_size * teacher.config.max_action_dim * DTYPES[cfg.dtype].itemsize,
    )
    return Plan(teacher, manifest, space)


def _provenance(
    cfg: PairsConfig, teacher: Checkpoint, metadata: LeRobotDatasetMetadata, stats: Statistics
) -> Provenance:
    return Provenance(
        teacher=teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        solver=cfg.reflow.to_solver().resolved(teacher.config.num_steps),
        chunk_size=teacher.config.chunk_size,
        max_action_dim=teacher.config.max_action_dim,
        seed=cfg.seed,
        couplings_per_frame=cfg.couplings_per_frame,
        dtype=cfg.dtype,
    )


def _made_from(dataset: DatasetConfig, teacher: Checkpoint, rename_map: dict[str, str]) -> dict[str, Any]:
    return {
        "teacher_path": teacher.source,
        "dataset_root": dataset.root and str(Path(dataset.root).expanduser().resolve()),
        "dataset_revision": dataset.revision,
        "rename_map": rename_map,
    }
