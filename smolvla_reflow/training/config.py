"""The configuration of a reflow run: LeRobot's own, plus one section."""

from dataclasses import dataclass, field

from lerobot.configs.train import TrainPipelineConfig

from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import JITTERED, SolverFlags

# Liu et al. fine-tune at a fraction of the original learning rate; SmolVLA's own preset is 1e-4 over 30 000
# steps, of which 1 000 are warm-up, down to 2.5e-6. The ratios are kept.
LEARNING_RATE = 2e-5
DECAY_LR_RATIO = 2.5e-6 / 1e-4
WARMUP_RATIO = 1_000 / 30_000
# Of the command alone: a `Recipe` that says nothing is the papers' own loss, on the whole width.
RECIPE = Recipe(weighting="t", padding_weight=0.1)


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class ReflowConfig(SolverFlags):
    solver: str = JITTERED
    """Solver of the teacher's ODE, either 'jittered' (the midpoint rule on a grid that is shifted at random in each
    batch), 'midpoint', 'euler' (its stock sampler), 'heun3', 'rk4' or 'dopri5'."""
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id. The student starts from it unless --policy.path is given."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub. A run that is resumed keeps the commit it began with."""
    teacher_commit: str | None = None
    """Filled in by the run, the teacher's commit on the hub."""
    teacher_fingerprint: str | None = None
    """Filled in by the run, a checksum of the teacher, which has to be the same when the run is resumed."""
    strategy: str = "reflow"
    """The loss, either 'reflow', 'distill' (for one step only), 'standard', one that an installed package offers, or
    one in a Python file, which is run, written as the file's path, a colon and the loss's name."""
    time_sampling: str = Recipe.time_sampling
    """Distribution of t, 'beta' (SmolVLA's own), 'grid' with a colon and K (the K times that K Euler steps visit), or
    several joined by '+'."""
    couplings_per_frame: int = Recipe.couplings_per_frame
    """Noises for each frame of a batch, each carried to its own actions. The frame is loaded, and its prefix encoded,
    once for all of them."""
    weighting: str | None = None
    """How each coupling is weighed, by 't' (what is filled in, unless recorded rows are mixed in), by 'huber', a
    pseudo-Huber loss, or 'none', not at all. The first two weigh less near t = 0, where errors are large and matter
    little; 't' is better at one step, 'huber' at five and more."""
    padding_weight: float | None = None
    """What errors in the padded action dimensions weigh, 0 to 1, where those in the robot's own weigh 1. What is filled
    in is 0.1."""
    real_data_ratio: float = Recipe.real_data_ratio
    """Share of each batch, 0 to 1, that trains on the recorded actions with the standard loss instead."""
    train_state_proj: bool = False
    """Train state_proj, too. A step costs more then, since teacher and student no longer share the prefix (images,
    language, state), which otherwise is encoded once for both."""
    pairs_path: str | None = None
    """Folder of smolvla-reflow-pairs to train from. No teacher is loaded then; --reflow.teacher_path still says where
    the student starts."""
    augment_pairs: bool = False
    """Allow image transforms together with pairs, whose actions the teacher chose for the images as recorded."""
    measure_freq: int = 0
    """Every how many steps to measure the student on frames of held-out episodes, its flow error and energy distance at
    1 and 2 steps. By default never."""
    measure_episodes: list[int] | None = None
    """Episodes to measure on, which are not trained on then. By default those that LeRobot holds out
    (--dataset.eval_split), where its version does."""

    def recipe(self) -> Recipe:
        """The section's choices of how the student learns. Raises ReflowError if one is unknown or out of range."""
        chosen = {name: getattr(self, name) for name in Recipe.__dataclass_fields__}
        return Recipe(**{name: value for name, value in chosen.items() if value is not None})


@dataclass
class ReflowTrainPipelineConfig(TrainPipelineConfig):
    reflow: ReflowConfig = field(default_factory=ReflowConfig)
    steps: int = 20_000
    batch_size: int = 32
