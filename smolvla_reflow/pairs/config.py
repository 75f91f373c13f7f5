"""The flags of `smolvla-reflow-pairs`."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from lerobot.configs.default import DatasetConfig

from smolvla_reflow.dataset.opening import TOLERANCE_S, check_as_recorded, in_home
from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.pairs.manifest import DTYPES
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import ADAPTIVE, JITTERED, SolverFlags


# The strings below the fields are their --help texts. argparse adds each default; draccus drops a text with a colon.
@dataclass
class TeacherConfig(SolverFlags):
    # Training's default, 'jittered', draws a number in each batch, and stored pairs may not depend on a draw.
    solver: str = "midpoint"
    """Solver of the teacher's ODE, either 'midpoint', 'euler' (LeRobot's own sampler), 'rk4' or 'dopri5'."""
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""
    cuda_graph: bool = False
    """On a GPU, solve the teacher's ODE as one CUDA graph instead of kernel by kernel, which gives the same pairs
    faster. Not for dopri5."""


@dataclass
class DeviceConfig:
    device: str | None = None
    """Device of the teacher, such as 'cuda' or 'cpu' (default the fastest available)."""
    vlm_model_name: str | None = None
    """Folder or hub id of the teacher's vision-language backbone (default the one that its checkpoint names)."""

    def on(self, process: PartialState) -> str:
        """The device of this process; a kind alone, such as "cuda", means each process's own device of that kind."""
        if self.device not in (None, process.device.type):
            return str(self.device)
        return "cpu" if process.device.type == "cpu" else str(process.device)


@dataclass
class PairsConfig:
    dataset: DatasetConfig
    reflow: TeacherConfig = field(default_factory=TeacherConfig)
    policy: DeviceConfig = field(default_factory=DeviceConfig)
    output_dir: Path | None = None
    """Folder of the pairs. The same command finishes an interrupted run."""
    couplings_per_frame: int = 4
    """Couplings stored for each frame, each from another noise."""
    scaled_noise: float = Recipe.scaled_noise
    """Share of the pairs, 0 to 1, that start from noise of a smaller scale, half of them from zeros."""
    seed: int | None = None
    """Seed of the noise (default a number that follows from the teacher, so each round of reflow has its own noise)."""
    dtype: str = "float16"
    """Number format of the stored actions, either 'float16', 'bfloat16' or 'float32'."""
    batch_size: int = 8
    """Frames solved at once, each with all its couplings."""
    num_workers: int = 2
    """Processes that load frames."""
    frames_per_shard: int = 128
    """Frames in each file. An interrupted run repeats at most one file per process."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """Map from the dataset's names to the teacher's, as for lerobot-train (default the map saved with the teacher)."""
    tolerance_s: float = TOLERANCE_S
    """Seconds that a video's frame may be off its time, as for lerobot-train."""
    repair: bool = False
    """Make missing or damaged files again."""

    def __post_init__(self) -> None:
        self.dataset.root = in_home(self.dataset.root)


def check_values(cfg: PairsConfig) -> None:
    """Raise ReflowError for a flag that is missing or makes no sense, before anything is opened."""
    if not cfg.reflow.teacher_path:
        raise ReflowError("Name the teacher, a SmolVLA checkpoint: --reflow.teacher_path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name the folder for the pairs: --output_dir=...")
    for name, least in {"couplings_per_frame": 1, "batch_size": 1, "frames_per_shard": 1, "seed": 0}.items():
        if (getattr(cfg, name) or 0) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")
    try:
        Recipe(scaled_noise=cfg.scaled_noise)
    except ReflowError as error:
        raise ReflowError(f"--{error}") from None
    if cfg.dtype not in DTYPES:
        raise ReflowError(f"--dtype={cfg.dtype} is unknown; {known_are(DTYPES, cfg.dtype)}")
    check_as_recorded(cfg.dataset, "pairs are made from")
    solver = cfg.reflow.to_solver()
    if cfg.reflow.cuda_graph and solver.method in ADAPTIVE:
        raise ReflowError(f"--reflow.cuda_graph=true has no effect with --reflow.solver={solver.method}; leave it out.")
    if solver.method == JITTERED:
        raise ReflowError(
            f"--reflow.solver={JITTERED} draws a random number for each batch, and stored pairs have to be the same in "
            "whatever batches they are solved; leave it out."
        )
