"""The configuration of a reflow run: LeRobot's own, plus one section."""

from dataclasses import dataclass, field

from lerobot.configs.train import TrainPipelineConfig

from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import Solver

# Liu et al. fine-tune at a fraction of the original learning rate; SmolVLA's own preset is 1e-4 over 30 000
# steps, of which 1 000 are warm-up, down to 2.5e-6. The ratios are kept.
LEARNING_RATE = 2e-5
DECAY_LR_RATIO = 2.5e-6 / 1e-4
WARMUP_RATIO = 1_000 / 30_000


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class ReflowConfig:
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id. The student starts from it unless --policy.path is given."""
    strategy: str = "reflow"
    """Loss strategy, either 'reflow', 'distill' (one step), 'standard' or one that an installed package offers."""
    time_sampling: str = Recipe.time_sampling
    """Distribution of t, 'beta' (SmolVLA's own), 'grid' (with its number of steps, see the README), or several
    joined by '+'."""
    couplings_per_frame: int = Recipe.couplings_per_frame
    """Noises for each frame of a batch, each carried to its own actions. The frame is loaded and seen once for all."""
    real_data_ratio: float = Recipe.real_data_ratio
    """Share of each batch, 0 to 1, that trains on the recorded actions with the standard loss instead."""
    pairs_path: str | None = None
    """Folder of smolvla-reflow-pairs to train from. No teacher is loaded then, its path says where to start."""
    augment_pairs: bool = False
    """Allow image transforms together with pairs, whose actions the teacher chose for the images as recorded."""
    solver: str = Solver.method
    """Solver of the teacher's ODE, either 'midpoint', 'euler' (its stock sampler), 'heun3', 'rk4' or 'dopri5'."""
    num_steps: int | None = None
    """Steps of the solver (not for dopri5), by default the num_steps of the teacher's own config."""
    rtol: float | None = None
    """Relative tolerance of dopri5, by default 1e-5."""
    atol: float | None = None
    """Absolute tolerance of dopri5 in normalised units, by default 1e-5."""


@dataclass
class ReflowTrainPipelineConfig(TrainPipelineConfig):
    reflow: ReflowConfig = field(default_factory=ReflowConfig)
    steps: int = 20_000
    batch_size: int = 32
