"""What a run of `smolvla-reflow-pairs` is to make, before anything is made."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata, dataset_to_policy_features, renamed_statistics
from smolvla_reflow.dataset import chosen_episodes, dataset_statistics, frame_ranges, open_metadata
from smolvla_reflow.pairs.config import PairsConfig
from smolvla_reflow.pairs.manifest import DTYPES, MANIFEST_NAME, Manifest, Provenance, read_manifest
from smolvla_reflow.smolvla.features import fitted, rename_map_in_use
from smolvla_reflow.smolvla.normalization import SpaceMaps, space_maps
from smolvla_reflow.smolvla.statistics import Statistics, fingerprint
from smolvla_reflow.solver import Solver

# What of `--dataset.*`, besides the place, decides what the teacher sees of a frame.
SEEN_THROUGH = ("use_imagenet_stats", "depth_output_unit")


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
    metadata = open_metadata(cfg.dataset, teacher.config)
    rename_map = rename_map_in_use(teacher, cfg.rename_map, metadata.features)
    teacher = fitted(teacher, dataset_to_policy_features(metadata.features), rename_map)
    stats = renamed_statistics(dataset_statistics(metadata, cfg.dataset), rename_map)
    space = space_maps(teacher, stats)
    frames = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset))
    manifest = Manifest(
        provenance=replace(_provenance(cfg, teacher, metadata, stats), rename_map=rename_map),
        made_from=_made_from(cfg, teacher),
        package_version=version("smolvla-reflow"),
        frames=[[each.start, each.stop] for each in frames],
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
        solver=_solver(cfg, teacher),
        chunk_size=teacher.config.chunk_size,
        max_action_dim=teacher.config.max_action_dim,
        seed=cfg.seed,
        couplings_per_frame=cfg.couplings_per_frame,
        dtype=cfg.dtype,
    )


def _solver(cfg: PairsConfig, teacher: Checkpoint) -> Solver:
    """How to solve the teacher's ODE.

    A set that was begun when open steps were the teacher's own, however few, is finished with those.
    """
    asked, steps = cfg.reflow.to_solver(), teacher.config.num_steps
    folder = (cfg.output_dir or Path()).expanduser()
    if (folder / MANIFEST_NAME).is_file():
        begun = read_manifest(folder)
        if begun.checksums and begun.provenance.solver == asked.resolved(steps):
            return begun.provenance.solver
    return asked.of_couplings(steps)


def _made_from(cfg: PairsConfig, teacher: Checkpoint) -> dict[str, Any]:
    root = cfg.dataset.root
    return {
        "teacher_path": teacher.source,
        "teacher_commit": teacher.commit,
        "dataset_root": root and str(Path(root).resolve()),
        "dataset_revision": cfg.dataset.revision,
        "tolerance_s": cfg.tolerance_s,
        "dataset": {name: getattr(cfg.dataset, name) for name in SEEN_THROUGH if hasattr(cfg.dataset, name)},
    }
