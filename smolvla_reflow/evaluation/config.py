"""The flags of `smolvla-reflow-eval`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.default import EvalConfig as ClosedLoopConfig
from lerobot.envs.configs import EnvConfig

from smolvla_reflow.dataset import TOLERANCE_S, in_home


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class PolicyConfig:
    path: str | None = None
    """Checkpoint to evaluate, a folder or hub id."""
    pretrained_revision: str | None = None
    """Branch, tag or commit of a checkpoint on the hub."""
    vlm_model_name: str | None = None
    """Folder or hub id of the vision-language backbone of all policies, if it is not where they say."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which all policies run."""


@dataclass
class EvalConfig:
    dataset: DatasetConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id. Without it the policy is compared with its own fine solution."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""
    earlier_rounds: list[str] = field(default_factory=list)
    """Checkpoints of the rounds between the teacher and the policy, oldest first, to be measured as well."""
    output_dir: Path | None = None
    """Folder for report.json, report.md and report.png. Must not exist yet, unless the same command was broken off."""
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10])
    """Numbers of Euler steps to measure; the policies' own defaults are measured as well."""
    num_frames: int = 256
    """Number of frames to measure on, evenly spaced over the dataset."""
    num_noises: int = 4
    """Noises for each frame, at least 2."""
    bar_num_steps: int | None = None
    """Number of steps of the teacher, or of the policy that is measured alone, with which the others are compared. By
    default that of its config.json."""
    reference_steps: int | None = None
    """Steps of rk4 for the fine solutions that errors are measured against. By default as many as it takes."""
    success_margin: float = 0.05
    """By how much less often than the teacher a policy may succeed and still be recommended, as a share."""
    energy_margin: float = 0.003
    """By how much its energy distance may be above the teacher's, in standard deviations, where no environment is
    driven."""
    batch_size: int = 16
    """Frames at once, each with all its noises."""
    seed: int = 0
    """Seed of the noise, and of the first episode in the simulator."""
    env: EnvConfig | None = None
    """Simulated environment in which to count successes, as for lerobot-eval."""
    env_task: str | None = None
    """Sentence for the policies in place of the environment's own."""
    eval: ClosedLoopConfig = field(default_factory=ClosedLoopConfig)
    """How many episodes of each task, and how many at once, as for lerobot-eval."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """Map from the dataset's names to the policy's, as for lerobot-train."""
    tolerance_s: float = TOLERANCE_S
    """Seconds by which a video's frame may be off its time, as for lerobot-train."""
    write_num_steps: bool = False
    """Store the recommended number in the policy's config.json, so that plain LeRobot runs at that speed."""

    def __post_init__(self) -> None:
        self.dataset.root = in_home(self.dataset.root)
        self.output_dir = self.output_dir and self.output_dir.expanduser()
