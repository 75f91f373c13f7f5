"""Make pairs: walk through a dataset, have the teacher solve for each frame's couplings, and write them in shards.

A shard is solved in the same batches by whichever process and at whatever time. So an interrupted and resumed run ends
with the same bytes as an uninterrupted one. Several processes share the shards, and the main one writes the manifest.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor
from tqdm import tqdm

from smolvla_reflow.checkpoint.load import load_policy, load_processors, stock_autocast
from smolvla_reflow.checkpoint.read import Checkpoint, open_checkpoint
from smolvla_reflow.compat import renamed_statistics
from smolvla_reflow.dataset.frames import check_finite, load_batches, trained_columns
from smolvla_reflow.dataset.opening import (
    chosen_episodes,
    dataset_statistics,
    frame_ranges,
    open_dataset,
    open_metadata,
    policy_features,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.noise import pairs_noise
from smolvla_reflow.pairs.config import PairsConfig
from smolvla_reflow.pairs.folder import begin, reserved, write_manifest, write_shard
from smolvla_reflow.pairs.manifest import DTYPES, MANIFEST_NAME, Manifest, Provenance, read_manifest
from smolvla_reflow.smolvla.features import fitted, rename_map_in_use
from smolvla_reflow.smolvla.graph import SolveGraphs, solved
from smolvla_reflow.smolvla.normalization import SpaceMaps, space_maps
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.statistics import fingerprint
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.teacher import warn_of_distilled


def make_pairs(cfg: PairsConfig, process: PartialState) -> str:
    """Make the missing ones of the configured pairs, shared by all processes, and return a sentence about them.

    Finished files stay whatever happens; a KeyboardInterrupt says how to go on.
    """
    assert cfg.output_dir is not None
    folder = cfg.output_dir.expanduser()
    teacher = open_checkpoint(cfg.reflow.teacher_path or "", cfg.reflow.teacher_revision, cfg.policy.vlm_model_name)
    teacher, wanted, space = plan(cfg, teacher)
    process.wait_for_everyone()  # a process that cannot open teacher or dataset stops all before anything is written
    with reserved(folder) if process.is_main_process else contextlib.nullcontext():
        if process.is_main_process:
            begin(folder, wanted, repair=cfg.repair)
        process.wait_for_everyone()
        if not (folder / MANIFEST_NAME).is_file():
            raise ReflowError(
                f"--output_dir={folder} is not the same folder for all processes; name a folder on a file system that "
                "all nodes share, or run on one node."
            )
        manifest = read_manifest(folder)
        made = manifest.provenance
        if not manifest.unfinished:
            return f"Nothing to do: all {manifest.num_shards} shards in {folder} are complete and undamaged."
        logging.getLogger(__name__).info("Pairs of teacher %s, solved by %s.", teacher.cited(), made.solver.in_words())
        warn_of_distilled(teacher, made.solver)
        dataset = open_dataset(cfg.dataset, tolerance_s=cfg.tolerance_s, rename_map=made.rename_map)
        check_finite(dataset, trained_columns(dataset.meta.features, made.rename_map))
        maker = load_pair_maker(teacher, made, space, cfg, cfg.policy.on(process))
        process.wait_for_everyone()  # so does a process that sees another folder, or lacks memory
        try:
            generate(folder, manifest, maker, dataset, cfg, process)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Finished files are kept; the same command goes on from there.") from None
    return (
        f"{manifest.num_frames} frames x {made.couplings_per_frame} pairs of {made.chunk_size} x "
        f"{made.max_action_dim} {made.dtype} in {folder}: {manifest.bytes_per_pair} bytes a pair.\n"
        f"Train on them: smolvla-reflow-train --reflow.teacher_path={teacher.source} "
        f"--dataset.repo_id={made.dataset} --reflow.pairs_path={folder} ..."
    )


def plan(cfg: PairsConfig, teacher: Checkpoint) -> tuple[Checkpoint, Manifest, SpaceMaps | None]:
    """The teacher with its features on this dataset, the set to make, and the maps between their normalised spaces."""
    metadata = open_metadata(cfg.dataset, teacher.config)
    rename_map = rename_map_in_use(teacher, cfg.rename_map, metadata.features)
    teacher = fitted(teacher, policy_features(metadata), rename_map)
    stats = renamed_statistics(dataset_statistics(metadata, cfg.dataset), rename_map)
    chunk_size, width = teacher.config.chunk_size, teacher.config.max_action_dim
    made_by = teacher.fingerprint()
    provenance = Provenance(
        teacher=made_by,
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=fingerprint(teacher.config, stats),
        solver=cfg.reflow.to_solver().of_couplings(teacher.config.num_steps),
        chunk_size=chunk_size,
        max_action_dim=width,
        seed=int(made_by[:8], base=16) if cfg.seed is None else cfg.seed,
        couplings_per_frame=cfg.couplings_per_frame,
        dtype=cfg.dtype,
        scaled_noise=cfg.scaled_noise,
        rename_map=rename_map,
    )
    made_from = {
        "teacher_path": teacher.source,
        "teacher_commit": teacher.commit,
        "dataset_root": cfg.dataset.root and str(Path(cfg.dataset.root).resolve()),
        "dataset_revision": cfg.dataset.revision,
    }
    frames = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset))
    manifest = Manifest(
        provenance,
        made_from,
        package_version=version("smolvla-reflow"),
        frames=[[each.start, each.stop] for each in frames],
        frames_per_shard=cfg.frames_per_shard,
        bytes_per_pair=chunk_size * width * DTYPES[cfg.dtype].itemsize,
    )
    return teacher, manifest, space_maps(teacher, stats)


def generate(
    folder: Path,
    manifest: Manifest,
    maker: "PairMaker",
    dataset: LeRobotDataset,
    cfg: PairsConfig,
    process: PartialState,
) -> None:
    """Make the unfinished shards, each process its share; each round, the main process adds them to the manifest."""
    todo, made = manifest.unfinished, manifest.provenance
    mine = todo[process.process_index :: process.num_processes]
    batches = {shard: _batches(manifest.frames_of(shard), cfg.batch_size) for shard in mine}
    loaded = _load(manifest, dataset, [batch for shard in mine for batch in batches[shard]], cfg.num_workers)
    bar = tqdm(
        total=sum(len(manifest.frames_of(shard)) for shard in mine) * made.couplings_per_frame,
        desc=f"process 1 of {process.num_processes}" if process.num_processes > 1 else "pairs",
        unit="pair",
        disable=not process.is_main_process,
    )
    with bar:
        for turn in range(-(-len(todo) // process.num_processes)):
            # In the last turn some processes have no shard left, and all take part in the exchange.
            finished = []
            for shard in mine[turn : turn + 1]:
                actions = _solved(batches[shard], loaded, maker, bar)
                finished.append((shard, write_shard(folder, shard, actions, made.dtype)))
            manifest = replace(manifest, checksums={**manifest.checksums, **dict(gather_object(finished))})
            if process.is_main_process:
                write_manifest(folder, manifest)


def _solved(batches: list[list[int]], loaded: Iterator[dict[str, Any]], maker: "PairMaker", bar: tqdm) -> Tensor:
    """The actions of one shard, (frames, couplings_per_frame, chunk_size, max_action_dim) float32."""
    actions = []
    for frames in batches:
        batch = next(loaded)
        if batch["index"].tolist() != frames:
            raise ReflowError(
                f"The dataset has other frames where frames {frames[0]} to {frames[-1]} should be: its files do not "
                "fit its metadata. Download or convert the dataset again."
            )
        actions.append(maker(batch))
        bar.update(len(frames) * maker.provenance.couplings_per_frame)
    return torch.cat(actions)


def _batches(frames: Sequence[int], size: int) -> list[list[int]]:
    return [list(frames[i : i + size]) for i in range(0, len(frames), size)]


def _load(
    manifest: Manifest, dataset: LeRobotDataset, batches: list[list[int]], num_workers: int
) -> Iterator[dict[str, Any]]:
    """Load these frames of the manifest; a dataset of some episodes has them at other positions than their index."""
    every_frame = itertools.chain.from_iterable(range(start, stop) for start, stop in manifest.frames)
    position = {frame: i for i, frame in enumerate(every_frame)}
    positions = [[position[frame] for frame in batch] for batch in batches]
    return load_batches(dataset, positions, num_workers, manifest.provenance.rename_map)


@dataclass(frozen=True)
class PairMaker:
    """A teacher that encodes each frame's prefix once, and solves for all its couplings together."""

    policy: SmolVLAPolicy  # the teacher
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]  # of its checkpoint, from a dataset's batch to its input
    # the maps between the dataset's normalised space and the teacher's, None if they are the same
    space: SpaceMaps | None
    provenance: Provenance  # the pairs to make
    graphs: SolveGraphs | None = None  # the teacher's recorded solves, None to solve kernel by kernel

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Actions `(B, couplings_per_frame, chunk_size, max_action_dim)`, float32 on the CPU."""
        made = self.provenance
        frames = batch["index"].tolist()
        pairs = [(frame, pair) for frame in frames for pair in range(made.couplings_per_frame)]
        noise = pairs_noise(made.seed, pairs, (made.chunk_size, made.max_action_dim), made.scaled_noise)
        observation = observe(self.policy, self.preprocessor(dict(batch)))
        with stock_autocast(self.policy):
            velocity = velocity_of(self.policy.model, observation).repeated(made.couplings_per_frame)
            actions = solved(made.solver, velocity, noise.to(observation.state.device), self.graphs)
        if self.space is not None:
            actions = self.space.actions(actions)
        if not (actions.abs() < torch.finfo(DTYPES[made.dtype]).max).all():
            raise ReflowError(
                f"The teacher's actions for frames {frames[0]} to {frames[-1]} are not finite, or beyond "
                f"{made.dtype}; check its checkpoint and the dataset's frames."
            )
        return actions.unflatten(0, (len(frames), made.couplings_per_frame)).float().cpu()


def load_pair_maker(
    teacher: Checkpoint, provenance: Provenance, space: SpaceMaps | None, cfg: PairsConfig, device: str
) -> PairMaker:
    """Load the teacher as plain LeRobot would, on `device`."""
    policy = load_policy(teacher, device)
    before = load_processors(teacher, device, cfg.rename_map).before
    return PairMaker(policy, before, space, provenance, SolveGraphs() if cfg.reflow.cuda_graph else None)
