"""A study's tasks: frames in memory, the policy's configuration, and a simulator if the task has one.

- demo_task: the demo's task of driving past an obstacle, measured on unseen scenes and in its simulator
- recorded_task: any LeRobotDataset with a single task, measured on every fifth episode, which is held out
- pusht_task: PushT with the block's pose in the state, measured on every twentieth episode and in its simulator
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs.default import EvalConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import EnvConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from tqdm import tqdm

from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.demo import flags as demo
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.environment import DrivePastConfig
from smolvla_reflow.demo.task import DEMONSTRATIONS, IMAGE_SIZE, write_dataset
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.start import NORMAL
from smolvla_reflow.evaluation.success import Episodes
from smolvla_reflow.smolvla.normalization import Affine

UNSEEN_EPISODES, UNSEEN_SEED = 40, 1

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """Frames as SmolVLA's preprocessor leaves them, so that actions are in standard deviations.

    Attributes:
        seen: frames to train on, each tensor (N, ...).
        unseen: frames to measure on.
        config: keyword arguments of the policy's SmolVLAConfig.
        num_steps: numbers of steps to measure.
        stats: the dataset's statistics, for running the policy in the simulator.
        env: the simulator, or None.
    """

    seen: Batch
    unseen: Batch
    config: dict
    num_steps: Sequence[int]
    stats: dict = field(repr=False)
    env: EnvConfig | None = None

    def policy(self, train_expert_only: bool = False) -> SmolVLAPolicy:
        """A new SmolVLA for these frames, with random weights."""
        frozen = {"train_expert_only": train_expert_only, "freeze_vision_encoder": train_expert_only}
        return SmolVLAPolicy(SmolVLAConfig(**self.config, **frozen))

    def save(self, policy: SmolVLAPolicy, folder: Path) -> None:
        """Write a checkpoint as LeRobot does."""
        for processor in make_smolvla_pre_post_processors(policy.config, self.stats):
            processor.save_pretrained(folder)
        policy.save_pretrained(folder)

    def on_frames(self, name: str, policy: SmolVLAPolicy) -> MeasuredPolicy:
        """A policy to measure on these frames, which are already normalised."""
        width = self.unseen["action"].shape[-1]
        units = Affine(torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        return MeasuredPolicy(name, policy, lambda batch: batch, lambda action: action, units, policy.config.num_steps)

    def drive(
        self, policy: SmolVLAPolicy, num_steps: int, episodes: int, seed: int, start: str = NORMAL
    ) -> Episodes | None:
        """Run the policy in the simulator, in the scenes `seed`, `seed` + 1, .... None without a simulator.

        `start` is the noise of its chunks, as of `smolvla-reflow-eval --noise`.
        """
        if self.env is None:
            return None
        before, after = make_smolvla_pre_post_processors(policy.config, self.stats)
        measured = MeasuredPolicy(
            "policy", policy, before, after, self.on_frames("", policy).robot_units, num_steps, start
        )
        settings = EvalConfig(n_episodes=episodes, batch_size=episodes, use_async_envs=False)
        (driven,) = drive(measured, self.env, settings, num_steps, seed).values()
        return driven


def demo_task(folder: Path) -> Task:
    """The demo's task and policy. The recordings in `folder` are made if missing."""
    for name, episodes, seed in (("seen", DEMONSTRATIONS, 0), ("unseen", UNSEEN_EPISODES, UNSEEN_SEED)):
        if not (folder / name).exists():
            write_dataset(folder / name, episodes, seed)
    stats = LeRobotDatasetMetadata("study/demo", root=folder / "seen").stats
    config = _config(folder / "seen", write_backbone(folder / "backbone"), demo.CHUNK_SIZE, IMAGE_SIZE)
    config |= {"n_action_steps": demo.N_ACTION_STEPS, "max_action_dim": 4, "max_state_dim": 4}
    seen, unseen = (_load(folder / name, config, stats) for name in ("seen", "unseen"))
    return Task(seen, unseen, config, (1, 2, 5, 10), stats, DrivePastConfig())


def recorded_task(root: Path, folder: Path, width: int, action_dims: Sequence[int] | None = None) -> Task:
    """A recorded dataset, for a small SmolVLA that pads its actions to the stock 32 dimensions.

    Args:
        root: of the dataset.
        folder: for the backbone.
        width: of the backbone.
        action_dims: indices of the action dimensions to learn; None for all.
    """
    chunk, image = 16, 64
    stats = LeRobotDatasetMetadata("study/recorded", root=root).stats
    config = _config(root, write_backbone(folder / "backbone", hidden_size=width, image_size=image), chunk, image)
    frames = _load(root, config, stats)
    if action_dims:
        frames["action"] = frames["action"][..., list(action_dims)]
        config["output_features"] = {"action": PolicyFeature(FeatureType.ACTION, (len(action_dims),))}
    seen, unseen = _held_out(frames, every=5)
    return Task(seen, unseen, config, (1, 2, 4, 5, 6, 10), stats)


def pusht_task(root: Path, folder: Path) -> Task:
    """PushT with the block's pose in the state, as `examples/pusht/run.sh` trains it.

    Args:
        root: of the dataset `pusht_pose`.
        folder: for the backbone.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    from pusht.environment import PushTPoseConfig  # needs gym-pusht

    stats = LeRobotDatasetMetadata("study/pusht", root=root).stats
    backbone = write_backbone(folder / "backbone", hidden_size=128, num_layers=3)
    config = _config(root, backbone, chunk=16, image=32) | {"num_vlm_layers": 3, "n_action_steps": 8}
    seen, unseen = _held_out(_load(root, config, stats), every=20)
    return Task(seen, unseen, config, (1, 2, 10), stats, PushTPoseConfig(image_every=config["n_action_steps"]))


def _held_out(frames: Batch, every: int) -> tuple[Batch, Batch]:
    """Split off the last of every `every` episodes: the other frames, and its frames."""
    out = frames["episode_index"] % every == every - 1
    return {name: value[~out] for name, value in frames.items()}, {name: value[out] for name, value in frames.items()}


def _config(root: Path, backbone: Path, chunk: int, image: int) -> dict:
    features = LeRobotDatasetMetadata("study/task", root=root).features
    kinds = {"observation.state": FeatureType.STATE, "action": FeatureType.ACTION}
    known = {
        name: PolicyFeature(kinds.get(name, FeatureType.VISUAL), _channels_first(feature))
        for name, feature in features.items()
        if name in kinds or "image" in name
    }
    return {
        "device": "cpu",
        "vlm_model_name": str(backbone),
        "load_vlm_weights": False,
        "num_vlm_layers": 2,
        "chunk_size": chunk,
        "n_action_steps": chunk,
        "resize_imgs_with_padding": (image, image),
        "input_features": {name: feature for name, feature in known.items() if name != "action"},
        "output_features": {"action": known["action"]},
    }


def _channels_first(feature: dict) -> tuple[int, ...]:
    shape = tuple(feature["shape"])
    return (shape[2], *shape[:2]) if feature["names"][-1:] in (["channel"], ["channels"]) else shape


def _load(root: Path, config: dict, stats: dict) -> Batch:
    """Load all frames with their chunks, normalised and tokenised as LeRobot does it."""
    fps = LeRobotDatasetMetadata("study/task", root=root).fps
    deltas = {"action": [i / fps for i in range(config["chunk_size"])]}
    dataset = LeRobotDataset("study/task", root=root, delta_timestamps=deltas)
    prepare, _ = make_smolvla_pre_post_processors(SmolVLAConfig(**config), stats)
    loader = tqdm(torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=2), desc=f"loading {root.name}")
    prepared = [{k: v for k, v in prepare(batch).items() if isinstance(v, torch.Tensor)} for batch in loader]
    return {name: torch.cat([batch[name] for batch in prepared]) for name in prepared[0]}
