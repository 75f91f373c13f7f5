"""Make pairs: walk through a dataset, have the teacher solve for each frame's couplings, and write them in shards.

A shard is solved in the same batches whichever process does it and when. So the files of an interrupted and resumed run
are those of an uninterrupted one, to the byte.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import Tensor
from tqdm import tqdm

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.dataset import load_batches, open_dataset
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.pairs.config import PairsConfig
from smolvla_reflow.pairs.folder import begin, record, reserved, write_shard
from smolvla_reflow.pairs.maker import PairMaker, load_pair_maker
from smolvla_reflow.pairs.manifest import Manifest
from smolvla_reflow.pairs.plan import plan_pairs
from smolvla_reflow.pairs.processes import agree, together


@dataclass(frozen=True)
class Made:
    """What a run leaves behind.

    Attributes:
        folder: of the pairs.
        manifest: what it holds.
        teacher: where the teacher is.
        by_this_run: False if everything had been made before.
    """

    folder: Path
    manifest: Manifest
    teacher: str
    by_this_run: bool

    def in_words(self) -> str:
        """What was made and how to train on it, or that there was nothing to do."""
        if not self.by_this_run:
            return f"Nothing to do: all {self.manifest.num_shards} shards in {self.folder} are complete and undamaged."
        made = self.manifest.provenance
        return (
            f"{self.manifest.num_frames} frames x {made.couplings_per_frame} pairs of {made.chunk_size} x "
            f"{made.max_action_dim} {made.dtype} in {self.folder}: {self.manifest.bytes_per_pair} bytes a pair.\n"
            f"Train on them: smolvla-reflow-train --reflow.teacher_path={self.teacher} "
            f"--dataset.repo_id={made.dataset} --reflow.pairs_path={self.folder} ..."
        )


def make_pairs(cfg: PairsConfig, process: PartialState) -> Made:
    """Make the configured pairs, or those of them that are missing.

    Args:
        cfg: its values checked.
        process: this one; several share the work.

    Raises:
        ReflowError: the teacher or the dataset cannot be used, the folder holds something else or damaged pairs, the
            disk is full, not all processes see the folder, or actions are not finite. What was finished stays;
            nothing stays where nothing was.
        KeyboardInterrupt: with how to go on.
    """
    assert cfg.output_dir is not None
    folder = cfg.output_dir.expanduser()
    device = together(lambda: cfg.policy.on(process))
    teacher = together(
        lambda: open_checkpoint(cfg.reflow.teacher_path or "", cfg.reflow.teacher_revision, cfg.policy.vlm_model_name)
    )
    plan = together(lambda: plan_pairs(cfg, teacher))
    with reserved(folder, process):
        manifest = begin(folder, plan.manifest, process, repair=cfg.repair)
        if not manifest.unfinished:
            return Made(folder, manifest, teacher.source, by_this_run=False)
        logging.getLogger(__name__).info(
            "Pairs of the teacher %s, solved by %s.", teacher.cited(), manifest.provenance.solver.in_words()
        )
        dataset = together(lambda: open_dataset(cfg.dataset, tolerance_s=cfg.tolerance_s))
        maker = together(lambda: load_pair_maker(plan.teacher, manifest.provenance, plan.space, device, cfg.rename_map))
        try:
            manifest = generate(
                folder,
                manifest,
                maker,
                dataset,
                batch_size=cfg.batch_size,
                num_workers=cfg.num_workers,
                process=process,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What is finished is kept; run the same command again to go on.") from None
    return Made(folder, manifest, teacher.source, by_this_run=True)


def generate(
    folder: Path,
    manifest: Manifest,
    maker: PairMaker,
    dataset: LeRobotDataset,
    *,
    batch_size: int,
    num_workers: int,
    process: PartialState,
) -> Manifest:
    """Make the unfinished shards of `manifest`, this process its share of them; returns the finished manifest.

    Args:
        folder: holds the manifest and takes the shards.
        manifest: what to make. It is rewritten whenever each process has finished a shard.
        maker: the teacher.
        dataset: whose frames, in order, are those of the manifest.
        batch_size: frames solved at once, each with all its couplings.
        num_workers: processes that load frames.
        process: this one.

    Raises:
        ReflowError: the disk is full, a frame is not where it should be, or actions are not finite. What was
            finished stays.
    """
    todo = manifest.unfinished
    mine = todo[process.process_index :: process.num_processes]
    rounds = -(-len(todo) // process.num_processes)
    batches = {shard: _batches(manifest.frames_of(shard), batch_size) for shard in mine}
    loaded = _load(manifest, dataset, [batch for shard in mine for batch in batches[shard]], num_workers)
    with _progress_bar(manifest, mine, process) as bar:
        shards = _solved(batches, loaded, maker, bar)
        for _ in range(rounds):
            # In the last round some processes have no shard left, but all of them have to take part in the exchange.
            finished, failure = [], None
            try:
                for shard in itertools.islice(shards, 1):
                    checksum = write_shard(folder, shard.number, shard.actions, manifest.provenance.dtype)
                    finished.append((shard.number, checksum))
            except Exception as error:  # what the others have finished is recorded first
                failure = error
            manifest = record(folder, manifest, dict(gather_object(finished)), process)
            agree(failure)
    return manifest


class _Shard(NamedTuple):
    number: int
    actions: Tensor  # (frames, couplings_per_frame, chunk_size, max_action_dim) float32


def _solved(
    batches: dict[int, list[list[int]]], loaded: Iterator[dict[str, Any]], maker: PairMaker, bar: tqdm
) -> Iterator[_Shard]:
    """Make the pairs of one shard after the other.

    Args:
        batches: of each shard, as lists of frames.
        loaded: all these batches, in this order.
        maker: the teacher.
        bar: shows how many pairs have been made.
    """
    for shard in batches:
        actions = []
        for frames in batches[shard]:
            batch = next(loaded)
            if batch["index"].tolist() != frames:
                raise ReflowError(
                    f"The dataset has other frames where frames {frames[0]} to {frames[-1]} should be; its files "
                    "do not fit its metadata, so download or convert it again."
                )
            actions.append(maker(batch))
            bar.update(len(frames) * maker.provenance.couplings_per_frame)
        yield _Shard(shard, torch.cat(actions))


def _batches(frames: Sequence[int], size: int) -> list[list[int]]:
    return [list(frames[i : i + size]) for i in range(0, len(frames), size)]


def _load(
    manifest: Manifest, dataset: LeRobotDataset, batches: list[list[int]], num_workers: int
) -> Iterator[dict[str, Any]]:
    """Load these frames, which are named by their index in the whole dataset.

    `dataset` holds the manifest's frames and no others, so that a frame's position in it may be another one.
    """
    every_frame = itertools.chain.from_iterable(range(start, stop) for start, stop in manifest.frames)
    position = {frame: i for i, frame in enumerate(every_frame)}
    return load_batches(dataset, [[position[frame] for frame in batch] for batch in batches], num_workers)


def _progress_bar(manifest: Manifest, shards: Sequence[int], process: PartialState) -> tqdm:
    frames = sum(len(manifest.frames_of(shard)) for shard in shards)
    return tqdm(
        total=frames * manifest.provenance.couplings_per_frame,
        desc=f"process 1 of {process.num_processes}" if process.num_processes > 1 else "pairs",
        unit="pair",
        disable=not process.is_main_process,
    )
