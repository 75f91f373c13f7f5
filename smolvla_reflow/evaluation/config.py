"""The flags of `smolvla-reflow-eval`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.default import EvalConfig as ClosedLoopConfig
from lerobot.envs.configs import EnvConfig

from smolvla_reflow.dataset.opening import TOLERANCE_S, in_home
from smolvla_reflow.distance import FINE_STEPS
from smolvla_reflow.evaluation.late import LATEST
from smolvla_reflow.evaluation.start import NORMAL


# The strings below the fields are their --help texts; draccus drops a text with a colon, and adds the default's value.
@dataclass
class PolicyConfig:
    path: str | None = None
    """Checkpoint to evaluate, a folder or hub id (required)."""
    pretrained_revision: str | None = None
    """Branch, tag or commit of a checkpoint on the hub (None is main)."""
    vlm_model_name: str | None = None
    """Folder or hub id of the vision-language backbone of all policies (None is the backbone in their config.json)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of all policies."""


@dataclass
class EvalConfig:
    dataset: DatasetConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id (None compares the policy with its own fine solution)."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub (None is main)."""
    earlier_rounds: list[str] = field(default_factory=list)
    """Checkpoints of the rounds between the teacher and the policy, oldest first."""
    output_dir: Path | None = None
    """Folder for report.json, report.md and report.png (required). It is new, empty, or of the same command, which
    then goes on."""
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10])
    """Numbers of Euler steps to measure, besides the policies' own."""
    num_frames: int = 256
    """Number of frames to measure on, at least 2. They are evenly spaced over the episodes that the policy was not
    trained on, or over all episodes if there are no others. --dataset.episodes names other episodes."""
    num_noises: int = 4
    """Noises for each frame, at least 2."""
    bar_num_steps: int | None = None
    """Number of steps of the bar, the teacher or the policy alone (None is num_steps in its config.json)."""
    reference_steps: int = FINE_STEPS
    """Steps of rk4 for the fine solutions that errors are measured against, at least 2. The report says how accurate
    they are."""
    success_margin: float = 0.05
    """A policy that succeeds less often than the teacher by less than this share is as good."""
    reward_margin: float = 0.03
    """A policy whose best reward is below the teacher's by at most this is as good, with --decide_by=best_reward."""
    energy_margin: float = 0.003
    """A policy whose energy distance is above the teacher's by at most this many standard deviations is as good. This
    decides without an environment."""
    decide_by: str | None = None
    """Evidence that decides, 'success', 'best_reward' (for an environment that rewards progress) or 'energy_distance'
    (None is success in an environment and energy distance without)."""
    noise: str = NORMAL
    """Noise that the robot's client starts each chunk from, 'normal', 'zeros', or the seed of one draw for all chunks.
    If it is not 'normal', the policy is measured from it, too, and has to be as good as the teacher from normal
    noise."""
    batch_size: int = 16
    """Frames at once, each with all its noises."""
    seed: int = 0
    """Seed of the noise, and of the first episode in the simulator."""
    env: EnvConfig | None = None
    """Simulated environment to count successes in, as for lerobot-eval (None is no environment)."""
    latency_ms: str | None = None
    """Time from an observation to its chunk in the simulator. Give 'measured' (on this device, at each number of
    steps), the milliseconds of every chunk, or those of the prefix and of each ODE step, such as '120+35'. Meanwhile
    the robot goes on with the chunk before (None is a simulator that waits for the policy)."""
    aggregate_fn_name: str = LATEST
    """Function of LeRobot's robot client that makes one action of two, where two chunks have an action for the same
    control step. 'latest_only' takes the newer action. 'weighted_average' (the client's default) takes 0.7 of the newer
    and 0.3 of the older action. Needs --latency_ms."""
    env_task: str | None = None
    """Sentence for the policies (None is the environment's own)."""
    eval: ClosedLoopConfig = field(default_factory=ClosedLoopConfig)
    """Number of episodes of each task, and how many run at once, as for lerobot-eval."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """Map from the dataset's names to the policy's, as for lerobot-train (an empty map is the checkpoint's own)."""
    tolerance_s: float = TOLERANCE_S
    """Largest error of a video frame's time in seconds, as for lerobot-train."""
    write_num_steps: bool = False
    """Store the recommended number in the policy's config.json, so that plain LeRobot runs at that speed."""

    def __post_init__(self) -> None:
        self.dataset.root = in_home(self.dataset.root)
        self.output_dir = self.output_dir and self.output_dir.expanduser()
