"""Make pairs: walk a dataset, encode each frame's prefix once, solve for all its noises together, write shards.

A shard is solved in the same batches whenever and by whichever process, and appears under its name only when it is
whole; the manifest is rewritten after every round of shards. So a run can be killed at any moment, and the files
of the resumed run are those of an uninterrupted one, to the byte.
"""

import contextlib
import copy
import dataclasses
import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from smolvla_reflow.checkpoint import Checkpoint
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.files import write_whole
from smolvla_reflow.flow import encode, observe
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.normalization import ChangeOfSpace
from smolvla_reflow.pairs import DTYPES, TENSOR_NAME, Manifest, Provenance, shard_path
from smolvla_reflow.solver import Solver


@dataclass(frozen=True)
class PairSolver:
    """A teacher that solves for all pairs of a batch of frames.

    Attributes:
        policy: the teacher.
        preprocessor: of its checkpoint, from a dataset's batch to its input.
        space: the way out of its normalised space, if that is not the dataset's.
        provenance: what to solve for.
    """

    policy: SmolVLAPolicy
    preprocessor: Callable[[dict[str, Any]], dict[str, Any]]
    space: ChangeOfSpace | None
    provenance: Provenance

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Actions (B, pairs_per_frame, chunk_size, max_action_dim), float32 on the CPU.

        Raises:
            ReflowError: they are not finite.
        """
        made = self.provenance
        frames = batch["index"].tolist()
        shape = (made.chunk_size, made.max_action_dim)
        noise = frames_noise(made.seed, frames, made.pairs_per_frame, shape)
        batch = self.preprocessor(dict(batch))
        observation = observe(self.policy, batch)
        solver = Solver(made.solver, made.num_steps, made.rtol, made.atol)
        device = observation.state.device
        with torch.autocast(device.type) if self.policy.config.use_amp else contextlib.nullcontext():
            velocity = encode(self.policy, observation).repeated(made.pairs_per_frame)
            actions = solver.integrate(velocity, noise.to(device))
        if self.space is not None:
            actions = self.space.actions(actions)
        limit = torch.finfo(DTYPES[made.dtype]).max
        if not (actions.abs() < limit).all():
            raise ReflowError(
                f"The teacher's actions for frames {frames[0]} to {frames[-1]} are not finite, or beyond "
                f"{made.dtype}; check its checkpoint and the dataset's frames."
            )
        return actions.unflatten(0, (len(frames), made.pairs_per_frame)).float().cpu()


def load_policy(checkpoint: Checkpoint, device: str) -> SmolVLAPolicy:
    """A checkpoint's policy for inference on `device`, neither compiled nor guided by an earlier chunk."""
    config = copy.deepcopy(checkpoint.config)
    config.device, config.compile_model, config.rtc_config = device, False, None
    policy = SmolVLAPolicy.from_pretrained(checkpoint.folder, config=config)
    return policy.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Processors:
    """A checkpoint's own: from a batch to its policy's input, and from normalised actions to the robot's units."""

    before: Callable[[dict[str, Any]], dict[str, Any]]
    after: Callable[[Tensor], Tensor]


def load_processors(checkpoint: Checkpoint, device: str, rename_map: dict[str, str]) -> Processors:
    """A checkpoint's processors, for a policy on `device`."""
    overrides: dict[str, Any] = {"device_processor": {"device": device}}
    if rename_map:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    return Processors(
        *make_pre_post_processors(checkpoint.config, str(checkpoint.folder), preprocessor_overrides=overrides)
    )


def load_pair_solver(
    checkpoint: Checkpoint,
    provenance: Provenance,
    space: ChangeOfSpace | None,
    device: str,
    rename_map: dict[str, str],
) -> PairSolver:
    """Load the teacher as plain LeRobot would, on `device`."""
    preprocessor = load_processors(checkpoint, device, rename_map).before
    return PairSolver(load_policy(checkpoint, device), preprocessor, space, provenance)


def generate(
    folder: Path,
    manifest: Manifest,
    solver: PairSolver,
    dataset: LeRobotDataset,
    *,
    batch_size: int,
    num_workers: int,
    state: PartialState,
) -> Manifest:
    """Make the unfinished shards of `manifest`, this process its share; returns the finished manifest.

    Args:
        folder: holds the manifest and takes the shards.
        manifest: what to make.
        solver: the teacher.
        dataset: whose frames, in order, are those of the manifest.
        batch_size: frames solved at once; each has `pairs_per_frame` couplings.
        num_workers: loader processes.
        state: which of how many processes this is.

    Raises:
        ReflowError: the disk is full, a frame is not where it should be, or actions are not finite. What was
            finished stays.
    """
    todo = manifest.unfinished
    mine = todo[state.process_index :: state.num_processes]
    batches = {shard: _batches(manifest.frames_of(shard), batch_size) for shard in mine}
    loader = iter(_load(manifest, dataset, [batch for shard in mine for batch in batches[shard]], num_workers))
    pairs_per_frame = manifest.provenance.pairs_per_frame
    name = f"process 1 of {state.num_processes}" if state.num_processes > 1 else "pairs"
    with tqdm(
        total=sum(len(manifest.frames_of(shard)) for shard in mine) * pairs_per_frame,
        desc=name,
        unit="pair",
        disable=not state.is_main_process,
    ) as bar:
        for turn in range(-(-len(todo) // state.num_processes)):
            finished: list[tuple[int, str]] = []
            for shard in mine[turn : turn + 1]:
                solved = []
                for frames in batches[shard]:
                    batch = next(loader)
                    if batch["index"].tolist() != frames:
                        raise ReflowError(f"The dataset's frames {frames[0]} to {frames[-1]} are not in their place.")
                    solved.append(solver(batch))
                    bar.update(len(frames) * pairs_per_frame)
                finished.append((shard, _write_shard(folder, shard, torch.cat(solved), manifest)))
            checksums = {**manifest.checksums, **dict(gather_object(finished))}
            manifest = dataclasses.replace(manifest, checksums=checksums)
            if state.is_main_process:
                with full_disk(folder):
                    manifest.write(folder)
    return manifest


def _batches(frames: Sequence[int], size: int) -> list[list[int]]:
    return [list(frames[i : i + size]) for i in range(0, len(frames), size)]


def _load(manifest: Manifest, dataset: LeRobotDataset, batches: list[list[int]], num_workers: int) -> DataLoader:
    """The frames by their index in the whole dataset, of which `dataset` may hold some episodes only."""
    position: dict[int, int] = {}
    for start, stop in manifest.frames:
        position.update(zip(range(start, stop), range(len(position), len(position) + stop - start), strict=True))
    return DataLoader(
        dataset,
        batch_sampler=[[position[frame] for frame in batch] for batch in batches],
        num_workers=num_workers,
    )


def _write_shard(folder: Path, shard: int, actions: Tensor, manifest: Manifest) -> str:
    """Write one shard, whole or not at all; returns its checksum."""
    content = save({TENSOR_NAME: actions.to(DTYPES[manifest.provenance.dtype]).contiguous()})
    with full_disk(folder):
        write_whole(shard_path(folder, shard), content)
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Say in one sentence that nothing more can be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ReflowError(
            f"{folder} cannot be written ({reason}). What is finished is kept; make room and run the same command "
            "again to go on."
        ) from None
