"""`smolvla-reflow-pairs`: make the teacher's couplings once, and train on them from disk.

    smolvla-reflow-pairs --reflow.teacher_path=... --dataset.repo_id=... --output_dir=DIR
    smolvla-reflow-train --reflow.teacher_path=... --dataset.repo_id=... --reflow.pairs_path=DIR

The same command goes on where it was interrupted. `--repair` makes damaged shards again;
`--verify=DIR --teacher_path=... --dataset_root=...` solves a sample of the pairs again and reports the
largest difference.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import draccus
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from lerobot.configs.default import DatasetConfig

from smolvla_reflow.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.commands.console import asks_for_help, names, own_log, parse_errors, reported_errors, with_values
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.generation import full_disk, generate, load_pair_solver
from smolvla_reflow.normalization import ChangeOfSpace, change_of_space
from smolvla_reflow.normalization import fingerprint as statistics_fingerprint
from smolvla_reflow.pairs import (
    DTYPES,
    MANIFEST_NAME,
    Manifest,
    Pairs,
    Provenance,
    check_shards,
    differences,
    read_manifest,
    shard_path,
)
from smolvla_reflow.preflight import (
    check_device,
    check_features,
    dataset_statistics,
    frame_ranges,
    open_dataset,
    open_metadata,
)
from smolvla_reflow.solver import Solver

PROGRAM = "smolvla-reflow-pairs"
VERIFIED_FRAMES = 32


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class TeacherConfig:
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id."""
    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'midpoint', 'euler', 'heun3', 'rk4' or 'dopri5'."""
    num_steps: int | None = None
    """Steps of the solver (not for dopri5), by default the num_steps of the teacher's own config."""
    rtol: float | None = None
    """Relative tolerance of dopri5, by default 1e-5."""
    atol: float | None = None
    """Absolute tolerance of dopri5 in normalised units, by default 1e-5."""


@dataclass
class DeviceConfig:
    device: str | None = None
    """Where the teacher runs, by default the best there is."""


@dataclass
class PairsConfig:
    dataset: DatasetConfig
    reflow: TeacherConfig = field(default_factory=TeacherConfig)
    policy: DeviceConfig = field(default_factory=DeviceConfig)
    output_dir: Path | None = None
    """Folder of the pairs. One that this command left unfinished is gone on with."""
    pairs_per_frame: int = 4
    """Couplings per frame, each with noise of its own."""
    seed: int = 0
    """Seed of the noise."""
    dtype: str = "float16"
    """Of the stored actions, either 'float16', 'bfloat16' or 'float32'."""
    batch_size: int = 8
    """Frames solved at once, each with all its pairs."""
    num_workers: int = 2
    """Loader processes."""
    frames_per_shard: int = 128
    """Frames per file, which is what an interrupted run loses at most, per process."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """From the dataset's names to the teacher's, as for lerobot-train."""
    repair: bool = False
    """Make those shards again that are missing or damaged."""


@dataclass
class VerifyConfig:
    verify: Path
    """Folder of the pairs to check."""
    teacher_path: str | None = None
    """Where the teacher is, a folder or hub id."""
    dataset_root: str | None = None
    """Where the dataset is, if not on the hub."""
    dataset_revision: str | None = None
    """Of a dataset on the hub."""
    policy: DeviceConfig = field(default_factory=DeviceConfig)
    seed: int = 0
    """Which sample is drawn."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        argv = with_values(argv, "repair")
        verifying = names(argv, "verify")
        if not asks_for_help(argv, __doc__) and not verifying and not names(argv, "dataset.repo_id"):
            raise ReflowError("Name the teacher's dataset: --dataset.repo_id=... (--dataset.root=...).")
        with parse_errors():
            cfg: Any = draccus.parse(VerifyConfig if verifying else PairsConfig, args=argv)
        (verify if verifying else make)(cfg)


def make(cfg: PairsConfig) -> None:
    """Make the pairs, or what is missing of them."""
    check_values(cfg)
    state = PartialState(cpu=cfg.policy.device == "cpu")
    device = own_device(cfg.policy.device, state)
    teacher = open_checkpoint(cfg.reflow.teacher_path or "")
    with own_log(state.is_main_process):
        wanted, space = plan(cfg, teacher)
    assert cfg.output_dir is not None
    folder = cfg.output_dir.expanduser()
    with exclusively(folder, state):
        manifest = begin(cfg, folder, wanted, state)
        if not manifest.unfinished:
            if state.is_main_process:
                print(f"Nothing to do: all {manifest.num_shards} shards in {folder} are there and whole.")
            return
        dataset = open_dataset(cfg.dataset)
        solver = load_pair_solver(teacher, manifest.provenance, space, device, cfg.rename_map)
        try:
            generate(
                folder,
                manifest,
                solver,
                dataset,
                batch_size=cfg.batch_size,
                num_workers=cfg.num_workers,
                state=state,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What is finished is kept; run the same command again to go on.") from None
    if state.is_main_process:
        made = manifest.provenance
        print(
            f"{manifest.num_frames} frames x {made.pairs_per_frame} pairs of {made.chunk_size} x "
            f"{made.max_action_dim} {made.dtype} in {folder}: {manifest.bytes_per_pair} bytes a pair.\n"
            f"Train on them: smolvla-reflow-train --reflow.teacher_path={teacher.source} "
            f"--dataset.repo_id={made.dataset} --reflow.pairs_path={folder} ..."
        )


def own_device(wanted: str | None, state: PartialState) -> str:
    """This process's device; one named by its kind alone ("cuda") is each process's own."""
    if wanted is not None:
        check_device(wanted)
    if wanted not in (None, state.device.type):
        return str(wanted)
    return "cpu" if state.device.type == "cpu" else str(state.device)


def check_values(cfg: PairsConfig) -> None:
    """Raise ReflowError for values that make no sense, before anything is opened."""
    if not cfg.reflow.teacher_path:
        raise ReflowError("Name the teacher, a SmolVLA checkpoint: --reflow.teacher_path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name the folder for the pairs: --output_dir=...")
    for name in ("pairs_per_frame", "batch_size", "frames_per_shard"):
        if getattr(cfg, name) < 1:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least 1 is needed.")
    for name in ("seed", "num_workers"):
        if getattr(cfg, name) < 0:
            raise ReflowError(f"--{name}={getattr(cfg, name)} is negative.")
    if cfg.dtype not in DTYPES:
        raise ReflowError(f"--dtype={cfg.dtype} is unknown; known are: {', '.join(DTYPES)}.")
    if cfg.dataset.image_transforms.enable:
        raise ReflowError(
            "--dataset.image_transforms.enable=true: pairs are made from the images as they were recorded."
        )
    if cfg.dataset.streaming:
        raise ReflowError("--dataset.streaming=true: pairs need a dataset whose frames can be read in order.")
    try:
        Solver(cfg.reflow.solver, cfg.reflow.num_steps, cfg.reflow.rtol, cfg.reflow.atol)
    except ReflowError as error:
        raise ReflowError(f"--reflow.{error}") from None


class Plan(NamedTuple):
    """What is to be made, in the dataset's normalised space."""

    manifest: Manifest
    space: ChangeOfSpace | None  # between it and the teacher's, if they differ


def plan(cfg: PairsConfig, teacher: Checkpoint) -> Plan:
    """Raise ReflowError if the dataset does not fit the teacher."""
    metadata = open_metadata(cfg.dataset)
    check_features(teacher, metadata.features, cfg.rename_map)
    stats = dataset_statistics(metadata, cfg.dataset)
    space = change_of_space(teacher, stats)
    policy, ode = teacher.config, cfg.reflow
    solver = Solver(ode.solver, ode.num_steps, ode.rtol, ode.atol).resolved(policy.num_steps)
    provenance = Provenance(
        teacher=teacher.fingerprint(),
        dataset=cfg.dataset.repo_id,
        total_frames=metadata.total_frames,
        statistics=statistics_fingerprint(policy, stats),
        solver=solver.method,
        num_steps=solver.num_steps,
        rtol=solver.rtol,
        atol=solver.atol,
        chunk_size=policy.chunk_size,
        max_action_dim=policy.max_action_dim,
        seed=cfg.seed,
        pairs_per_frame=cfg.pairs_per_frame,
        dtype=cfg.dtype,
    )
    manifest = Manifest(
        provenance=provenance,
        made_from={
            "teacher_path": teacher.source,
            "dataset_root": cfg.dataset.root and str(Path(cfg.dataset.root).expanduser().resolve()),
            "dataset_revision": cfg.dataset.revision,
            "rename_map": cfg.rename_map,
        },
        package_version=version("smolvla-reflow"),
        frames=[[frames.start, frames.stop] for frames in frame_ranges(metadata, cfg.dataset.episodes)],
        frames_per_shard=cfg.frames_per_shard,
        bytes_per_pair=policy.chunk_size * policy.max_action_dim * DTYPES[cfg.dtype].itemsize,
    )
    return Plan(manifest, space)


@contextmanager
def exclusively(folder: Path, state: PartialState) -> Iterator[None]:
    """Let no second run into this folder; the operating system takes the lock back from a killed one."""
    lock = None
    if state.is_main_process:
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _ours(folder))):
            raise ReflowError(f"--output_dir={folder} exists and holds no pairs; name a new folder.")
        with full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ReflowError(f"Another {PROGRAM} is at work in {folder}; wait for it to end.") from None
    try:
        state.wait_for_everyone()
        yield
    finally:
        if lock is not None:
            lock.release()


def _ours(folder: Path) -> bool:
    """Whether a run of this command has been here, however early it was killed."""
    begun = {".lock", MANIFEST_NAME + ".partial"}
    return (folder / MANIFEST_NAME).is_file() or {path.name for path in folder.iterdir()} <= begun


def begin(cfg: PairsConfig, folder: Path, wanted: Manifest, state: PartialState) -> Manifest:
    """The manifest to go on with: that of an earlier run of the same command, or a new one."""
    if not (folder / MANIFEST_NAME).is_file():
        if cfg.repair:
            raise ReflowError(f"--repair=true: there are no pairs in {folder} to repair.")
        state.wait_for_everyone()
        if state.is_main_process:
            with full_disk(folder):
                wanted.write(folder)
        state.wait_for_everyone()
        return wanted

    found = read_manifest(folder)
    unlike = differences(wanted.provenance, found.provenance)
    if found.frames != wanted.frames:
        unlike.append(f"frames are {found.frames} in the pairs and {wanted.frames} here")
    if unlike:
        raise ReflowError(
            f"--output_dir={folder} holds other pairs: {'; '.join(unlike)}. Name a new folder, or give the same flags."
        )
    damaged = check_shards(folder, found)
    if damaged and not cfg.repair:
        raise ReflowError(
            f"{', '.join(shard_path(folder, shard).name for shard in damaged[:3])} in {folder} "
            f"({len(damaged)} in all) is not the file that was written; add --repair to make it again."
        )
    return replace(found, checksums={k: v for k, v in found.checksums.items() if k not in damaged})


def verify(cfg: VerifyConfig) -> None:
    """Check every file, solve a random sample of the pairs again, and report the largest difference."""
    pairs = Pairs(cfg.verify)
    pairs.check()
    made, origin = pairs.manifest.provenance, pairs.manifest.made_from
    check_named(cfg, origin)
    teacher = open_checkpoint(cfg.teacher_path or "")
    if teacher.fingerprint() != made.teacher:
        raise ReflowError(
            f"{teacher.source} is not the teacher of these pairs: its fingerprint is {teacher.fingerprint()}, "
            f"theirs {made.teacher}. Name the teacher with --teacher_path."
        )
    where = DatasetConfig(
        repo_id=made.dataset,
        root=cfg.dataset_root,
        revision=cfg.dataset_revision,
    )
    metadata = open_metadata(where)
    dataset = open_dataset(where)
    device = own_device(cfg.policy.device, PartialState(cpu=cfg.policy.device == "cpu"))
    space = change_of_space(teacher, dataset_statistics(metadata, where))
    solver = load_pair_solver(teacher, made, space, device, origin.get("rename_map") or {})
    every = [frame for start, stop in pairs.manifest.frames for frame in range(start, stop)]
    frames = sorted(random.Random(cfg.seed).sample(every, min(VERIFIED_FRAMES, len(every))))
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_sampler=[frames])))
    again = solver(batch)
    stored = torch.stack(
        [torch.stack([pairs.lookup(frame, pair).actions for pair in range(made.pairs_per_frame)]) for frame in frames]
    )
    difference = (again - stored).abs().max().item()
    print(
        f"{len(pairs)} pairs in {cfg.verify}: every file is the one that was written. Of "
        f"{stored[:, :, 0, 0].numel()} pairs solved again, the largest difference is {difference:.2g} in "
        f"normalised units ({made.dtype} rounds by up to {rounding(stored, made.dtype):.2g})."
    )


def check_named(cfg: VerifyConfig, origin: dict[str, Any]) -> None:
    """Raise ReflowError if the user has not said what to open: a manifest is not followed out of its folder."""
    recorded = {name: origin.get(name) for name in ("teacher_path", "dataset_root", "dataset_revision")}
    missing = [f"--{name}={value}" for name, value in recorded.items() if value and not getattr(cfg, name)]
    if not cfg.teacher_path or missing:
        raise ReflowError(
            f"Say where what the pairs in {cfg.verify} were made from is; their manifest has it at "
            f"{' '.join(missing) or '--teacher_path=...'}"
        )


def rounding(actions: torch.Tensor, dtype: str) -> float:
    """The largest error of storing actions of this size in `dtype`."""
    return (actions.abs().max() * torch.finfo(DTYPES[dtype]).eps / 2).item()


if __name__ == "__main__":
    main()
