"""What `smolvla-reflow-pairs` can be asked for: the flags of making pairs, and those of verifying some."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from lerobot.configs.default import DatasetConfig

from smolvla_reflow.dataset import TOLERANCE_S, check_as_recorded, in_home
from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.pairs.manifest import DTYPES
from smolvla_reflow.solver import JITTERED, Solver, SolverFlags


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class TeacherConfig(SolverFlags):
    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'midpoint', 'euler' (its stock sampler), 'heun3', 'rk4' or 'dopri5'."""
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""


@dataclass
class DeviceConfig:
    device: str | None = None
    """Where the teacher runs, by default the best there is."""
    vlm_model_name: str | None = None
    """Folder or hub id of the teacher's vision-language backbone, if it is not where its checkpoint says."""

    def this_process(self) -> PartialState:
        """Which of the processes that were launched together this one is; connects them at the first call."""
        return PartialState(cpu=self.device == "cpu")

    def on(self, process: PartialState) -> str:
        """The device of this process. One that is named by its kind alone, "cuda", is each process's own of that kind.

        Raises:
            ReflowError: there is no such device.
        """
        if self.device not in (None, process.device.type):
            return str(self.device)
        return "cpu" if process.device.type == "cpu" else str(process.device)


@dataclass
class PairsConfig:
    dataset: DatasetConfig
    reflow: TeacherConfig = field(default_factory=TeacherConfig)
    policy: DeviceConfig = field(default_factory=DeviceConfig)
    output_dir: Path | None = None
    """Folder of the pairs. If a run into it was interrupted, the same command finishes it."""
    couplings_per_frame: int = 4
    """Couplings to store for each frame, each with noise of its own."""
    seed: int = 0
    """Seed of the noise."""
    dtype: str = "float16"
    """Number format of the stored actions, either 'float16', 'bfloat16' or 'float32'."""
    batch_size: int = 8
    """Frames solved at once, each with all its couplings."""
    num_workers: int = 2
    """Processes that load frames."""
    frames_per_shard: int = 128
    """Frames in each file. An interrupted run loses the work on one file at most, per process."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """From the dataset's names to the teacher's, as for lerobot-train."""
    tolerance_s: float = TOLERANCE_S
    """Seconds by which a video's frame may be off its time, as for lerobot-train."""
    repair: bool = False
    """Make missing or damaged files again."""

    def __post_init__(self) -> None:
        self.dataset.root = in_home(self.dataset.root)


@dataclass
class VerifyConfig:
    verify: Path
    """Folder of the pairs to check."""
    teacher_path: str | None = None
    """Checkpoint of the teacher that made them, a folder or hub id."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""
    dataset_root: str | None = None
    """Folder of the dataset, if it is not to come from the hub."""
    dataset_revision: str | None = None
    """Revision of a dataset on the hub."""
    video_backend: str | None = None
    """What decodes the dataset's videos, as --dataset.video_backend of lerobot-train."""
    tolerance_s: float | None = None
    """Seconds by which a video's frame may be off its time, by default what the pairs were made with."""
    policy: DeviceConfig = field(default_factory=DeviceConfig)
    seed: int = 0
    """Seed of the choice of frames to solve again."""

    def __post_init__(self) -> None:
        self.verify = self.verify.expanduser()
        self.dataset_root = in_home(self.dataset_root)


def check_values(cfg: PairsConfig) -> None:
    """Raise ReflowError for values that make no sense, before anything is opened."""
    if not cfg.reflow.teacher_path:
        raise ReflowError("Name the teacher, a SmolVLA checkpoint: --reflow.teacher_path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name the folder for the pairs: --output_dir=...")
    for name in ("couplings_per_frame", "batch_size", "frames_per_shard"):
        if getattr(cfg, name) < 1:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least 1 is needed.")
    for name in ("seed", "num_workers"):
        if getattr(cfg, name) < 0:
            raise ReflowError(f"--{name}={getattr(cfg, name)} is negative.")
    if cfg.dtype not in DTYPES:
        raise ReflowError(f"--dtype={cfg.dtype} is unknown; {known_are(DTYPES, cfg.dtype)}")
    check_as_recorded(cfg.dataset, "pairs are made from")
    if cfg.reflow.to_solver().method == JITTERED:
        raise ReflowError(
            f"--reflow.solver={JITTERED} draws a random number for each batch, and pairs have to come out the same "
            "whichever frames are solved together; leave it out."
        )
