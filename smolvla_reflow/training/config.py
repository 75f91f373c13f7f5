"""The configuration of a reflow run: LeRobot's own, plus one section."""

from dataclasses import dataclass, field

from lerobot.configs.train import TrainPipelineConfig

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import SolverFlags

# Liu et al. fine-tune at a fraction of the original learning rate. SmolVLA's own preset is 1e-4 over 30 000 steps, with
# 1 000 steps of warm-up, down to 2.5e-6. The ratios are kept.
LEARNING_RATE = 2e-5
DECAY_LR_RATIO = 2.5e-6 / 1e-4
WARMUP_RATIO = 1_000 / 30_000


# The strings below the fields are their --help texts. argparse adds each default; draccus drops a text with a colon.
@dataclass
class ReflowConfig(SolverFlags):
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id. The student starts from the teacher unless --policy.path is
    given."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub. A resumed run keeps the commit it began with."""
    teacher_commit: str | None = None
    """Filled in by the run, the teacher's commit on the hub."""
    teacher_fingerprint: str | None = None
    """Filled in by the run, a checksum of the teacher. A resumed run needs the same teacher."""
    strategy: str = "reflow"
    """The loss, either 'reflow', 'distill' (for one step only), 'standard' or a loss of an installed package. A loss in
    a Python file is written as the file's path, a colon and the loss's name, and the file is run."""
    time_sampling: str = Recipe.time_sampling
    """Distribution of t, 'beta' (SmolVLA's own), 'grid' with a colon and K (the K times that K Euler steps visit), or
    several joined by '+'."""
    couplings_per_frame: int = Recipe.couplings_per_frame
    """Noises for each frame of a batch, each carried to its own actions. The frame is loaded and its prefix encoded
    once."""
    weighting: str = Recipe.weighting
    """Weight of each coupling, 't' (best at one step), 'huber' (a pseudo-Huber loss, best at five steps and more) or
    'none'. 't' and 'huber' weigh less near t = 0, where errors are large and matter little."""
    padding_weight: float = Recipe.padding_weight
    """Loss weight of the padded action dimensions, 0 to 1. The robot's own dimensions have weight 1."""
    real_data_ratio: float = Recipe.real_data_ratio
    """Share of each batch, 0 to 1, that trains on the recorded actions with the standard loss instead."""
    scaled_noise: float = Recipe.scaled_noise
    """Share of the couplings, 0 to 1, that start from noise of a smaller scale, half of them from zeros, where some
    runtimes start every chunk."""
    train_state_proj: bool = False
    """Train state_proj, too. A step then costs more, since teacher and student no longer share the encoded prefix
    (images, language, state)."""
    cuda_graph: bool = False
    """On a GPU, solve the teacher's ODE as one CUDA graph instead of kernel by kernel, which gives the same couplings
    faster. Not for dopri5. A policy with compile_model keeps its compiled solve."""
    pairs_path: str | None = None
    """Folder of smolvla-reflow-pairs to train from. No teacher is loaded then, and --reflow.teacher_path still says
    where the student starts."""
    augment_pairs: bool = False
    """Allow image transforms together with pairs, although the teacher chose their actions for the images as
    recorded."""
    measure_freq: int = 0
    """Steps from one measurement to the next, 0 for never. A measurement gives the student's flow error and energy
    distance at 1 and 2 steps, on frames of the held-out episodes."""
    measure_episodes: list[int] | None = None
    """Episodes to hold out of training, to judge the student on; [] trains on all. Default is a tenth of the episodes,
    10 to 50 of them, of a dataset with at least 50, if neither --dataset.episodes nor --dataset.eval_split is given."""

    def recipe(self) -> Recipe:
        """The recipe that the flags name. Raises ReflowError, naming the flag, if a value is unknown."""
        try:
            return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})
        except ReflowError as error:
            raise ReflowError(f"--reflow.{error}") from None


@dataclass
class ReflowTrainPipelineConfig(TrainPipelineConfig):
    reflow: ReflowConfig = field(default_factory=ReflowConfig)
    steps: int = 20_000
    batch_size: int = 32
