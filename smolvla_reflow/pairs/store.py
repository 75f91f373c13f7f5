"""Stored couplings, read from disk when they are needed: a source of couplings without a teacher."""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.utils.constants import INFO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.noise import pairs_noise
from smolvla_reflow.pairs.manifest import TENSOR_NAME, check_shards, not_as_written, read_manifest, shard_path
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.statistics import Statistics, fingerprint

BROUGHT = "smolvla_reflow.pairs"


class Pairs:
    """A finished set of pairs, read from disk when they are needed; nothing stays in memory.

    Attributes:
        folder: of the set, as an absolute path.
        manifest: the frames it covers, and everything that the pairs depend on.
    """

    def __init__(self, folder: str | Path):
        """Open a folder that `smolvla-reflow-pairs` wrote.

        Raises:
            ReflowError: it holds no pairs, or an unfinished set.
        """
        self.folder = Path(folder).expanduser().resolve()
        self.manifest = read_manifest(self.folder)
        if unfinished := len(self.manifest.unfinished):
            raise ReflowError(
                f"The pairs in {self.folder} are unfinished: {unfinished} of {self.manifest.num_shards} shards are "
                "missing. Run smolvla-reflow-pairs again with the same flags."
            )
        starts = [start for start, _ in self.manifest.frames]
        lengths = [stop - start for start, stop in self.manifest.frames]
        self._starts, self._offsets = starts, [0, *itertools.accumulate(lengths)]

    def __len__(self) -> int:
        """Number of pairs."""
        return self.manifest.num_frames * self.manifest.provenance.couplings_per_frame

    def check(self) -> None:
        """Raise ReflowError if a shard is missing, damaged or foreign.

        All processes of a launch make this call together. One on each node reads every byte.
        """
        damaged = check_shards(self.folder, self.manifest) if PartialState().is_local_main_process else []
        if damaged := sorted(set(gather_object(damaged))):
            raise ReflowError(
                f"The pairs in {self.folder} are damaged: {not_as_written(damaged)}. Run smolvla-reflow-pairs again "
                "with the same flags and --repair."
            )

    def missing(self, frames: Iterable[range]) -> int:
        """Number of these frames without pairs."""
        return sum(
            len(wanted)
            - sum(len(range(max(wanted.start, start), min(wanted.stop, stop))) for start, stop in self.manifest.frames)
            for wanted in frames
        )

    def lookup(self, frame: int, pair: int) -> Coupling:
        """One coupling, each tensor (chunk_size, max_action_dim) float32 on the CPU.

        Raises:
            ReflowError: the frame has no pairs, or its shard cannot be read.
        """
        coupling = self._read([(frame, pair)])
        return Coupling(coupling.noise[0], coupling.actions[0])

    def _read(self, wanted: Sequence[tuple[int, int]]) -> Coupling:
        """The couplings of these frames and pairs, (N, chunk_size, max_action_dim) float32 on the CPU."""
        made = self.manifest.provenance
        places = [divmod(self._position(frame), self.manifest.frames_per_shard) for frame, _ in wanted]
        actions: dict[int, Tensor] = {}
        in_order = sorted(range(len(wanted)), key=places.__getitem__)
        for shard, lines in itertools.groupby(in_order, key=lambda i: places[i][0]):
            path = shard_path(self.folder, shard)
            try:
                # Not kept open: the pages of a mapped file count as memory until it is closed.
                with safe_open(path, framework="pt") as file:
                    stored = file.get_slice(TENSOR_NAME)
                    if stored.get_shape()[2:] != [made.chunk_size, made.max_action_dim]:
                        raise IndexError(f"its chunks are {stored.get_shape()[2:]}")
                    actions |= {i: stored[places[i][1], wanted[i][1]].to(torch.float32) for i in lines}
            except (SafetensorError, OSError, IndexError) as error:
                raise ReflowError(f"The pairs in {path} cannot be read ({error}).") from None
        shape = (made.chunk_size, made.max_action_dim)
        return Coupling(
            noise=pairs_noise(made.seed, wanted, shape, made.scaled_noise),
            actions=torch.stack([actions[i] for i in range(len(wanted))]),
        )

    def in_batch(self, batch: Mapping[str, Any]) -> CouplingSource:
        """These pairs as the source of one step; pairs that the data loader has put into the batch come first."""
        return partial(self, brought=batch.get(INFO))

    def __call__(
        self,
        observation: Observation,
        *,
        frames: Tensor | None,
        noise: Tensor | None,
        per_frame: int,
        brought: Any = None,
    ) -> Coupling:
        """Couplings as of `CouplingSource`: `per_frame` stored ones of each frame, at random.

        Couplings that `bring` has put into `brought` are used and removed; the next call reads others.

        Raises:
            ReflowError: the batch does not name its frames, or the caller fixed the noise.
        """
        if noise is not None:
            raise ReflowError("Stored pairs have noise of their own; attach a teacher to couple a given noise.")
        if frames is None:
            raise ReflowError(
                "The batch has no 'index', and its frames' pairs are found by their index; take the batch from a "
                "LeRobotDataset and call policy.forward(batch)."
            )
        found = brought.pop(BROUGHT, None) if isinstance(brought, dict) else None
        if found and found["noise"].shape[1] == per_frame:
            return _of_frames(frames.to(observation.state.device), **found)
        return self.draw(frames.tolist(), observation.state.device, per_frame)

    def bring(self, batch: dict[str, Any], per_frame: int, generator: torch.Generator) -> None:
        """Put `per_frame` of each frame's pairs into a batch of the dataset, under a name that preprocessors keep."""
        frames = batch["index"]
        coupling = self.draw(frames.tolist(), torch.device("cpu"), per_frame, generator)
        by_frame = {
            name: getattr(coupling, name).unflatten(0, (len(frames), per_frame)) for name in ("noise", "actions")
        }
        batch[INFO] = {BROUGHT: {"frames": frames, **by_frame}}

    def check_fits(self, config: SmolVLAConfig, stats: Statistics | None = None) -> None:
        """Raise ReflowError if the pairs have another shape than this policy's, or other statistics than `stats`."""
        made = self.manifest.provenance
        for name in ("chunk_size", "max_action_dim"):
            of_policy, of_pairs = getattr(config, name), getattr(made, name)
            if of_policy != of_pairs:
                raise ReflowError(
                    f"The pairs do not fit the policy: {name} is {of_pairs} in them and {of_policy} in it."
                )
        if stats is not None and fingerprint(config, stats) != made.statistics:
            raise ReflowError(
                f"The pairs in {self.folder} are in the normalised space of other statistics than dataset_stats; make "
                "them again from this dataset."
            )

    def draw(
        self,
        frames: Sequence[int],
        device: torch.device,
        per_frame: int = 1,
        generator: torch.Generator | None = None,
    ) -> Coupling:
        """`per_frame` = K of each frame's pairs at random, (B * K, chunk_size, max_action_dim) float32 on `device`.

        All pairs of a frame come once before any comes twice.
        """
        stored = self.manifest.provenance.couplings_per_frame
        rounds = -(-per_frame // stored)
        wanted = [
            (frame, pair)
            for frame in frames
            for pair in torch.randperm(stored, generator=generator).repeat(rounds)[:per_frame].tolist()
        ]
        coupling = self._read(wanted)
        return Coupling(coupling.noise.to(device), coupling.actions.to(device))

    def _position(self, frame: int) -> int:
        i = bisect.bisect_right(self._starts, frame) - 1
        if i < 0 or frame >= self.manifest.frames[i][1]:
            raise ReflowError(f"Frame {frame} has no pairs in {self.folder}.")
        return self._offsets[i] + frame - self._starts[i]


def _of_frames(wanted: Tensor, frames: Tensor, noise: Tensor, actions: Tensor) -> Coupling:
    """The couplings of the wanted frames, (B,), among the couplings of these frames, (C,), K for each.

    Reading the indices here would wait for the GPU. A frame without couplings gets NaN, which stops the run and names
    the frame.
    """
    frames, noise, actions = (tensor.to(wanted.device, non_blocking=True) for tensor in (frames, noise, actions))
    holds = (frames == wanted[:, None]).int()
    # A frame that is there twice has its own row: the caller may ask for the last frames of the batch.
    offset = len(frames) - len(wanted)
    rows = (holds + holds.tril(offset).triu(offset)).argmax(dim=1)
    missing = (holds.sum(dim=1) == 0)[:, None, None, None]
    return Coupling(noise[rows].flatten(0, 1), actions[rows].masked_fill(missing, torch.nan).flatten(0, 1))


def open_source(pairs: str | Path | CouplingSource, config: SmolVLAConfig, stats: Statistics | None) -> CouplingSource:
    """The couplings that stand in for a teacher: a folder of pairs, or a function."""
    source = Pairs(pairs) if isinstance(pairs, str | Path) else pairs
    if not callable(source):
        raise ReflowError(f"pairs is a {type(pairs).__name__}; give a folder of pairs, or a function that couples.")
    if isinstance(source, Pairs):
        source.check_fits(config, stats)
    elif stats is not None:
        raise ReflowError("dataset_stats has no effect on a function that couples; leave it out.")
    return source
