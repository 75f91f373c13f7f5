"""A PyTorch training loop of your own, with a teacher attached to the policy.

    python examples/own_loop.py --teacher=outputs/train/my_smolvla/checkpoints/last/pretrained_model \
        --repo_id=me/my_dataset --output_dir=outputs/my_student

`smolvla-reflow-train` does the same in LeRobot's loop, with a learning-rate schedule, logging, checkpoints and several
GPUs. If you need another loop, start from this file. It saves the student with its processors, as a LeRobot checkpoint.
"""

from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import draccus
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tqdm import tqdm

from smolvla_reflow import attach
from smolvla_reflow.training.config import LEARNING_RATE, ReflowTrainPipelineConfig


@dataclass
class LoopConfig:
    teacher: str
    repo_id: str
    output_dir: Path
    root: Path | None = None
    steps: int = ReflowTrainPipelineConfig.steps
    batch_size: int = ReflowTrainPipelineConfig.batch_size
    lr: float = LEARNING_RATE


def train(cfg: LoopConfig) -> None:
    """Train a student of `cfg.teacher` and save it."""
    policy = SmolVLAPolicy.from_pretrained(cfg.teacher)  # the student starts as the teacher
    preprocessor, postprocessor = make_pre_post_processors(policy.config, cfg.teacher)

    fps = LeRobotDatasetMetadata(cfg.repo_id, root=cfg.root).fps
    chunk = {"action": [i / fps for i in range(policy.config.chunk_size)]}
    dataset = LeRobotDataset(cfg.repo_id, root=cfg.root, delta_timestamps=chunk)
    loader = torch.utils.data.DataLoader(dataset, batch_size=cfg.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=cfg.lr)

    policy.train()
    with attach(policy, teacher=cfg.teacher):
        batches = islice(chain.from_iterable(repeat(loader)), cfg.steps)  # shuffled anew in each epoch
        for batch in (bar := tqdm(batches, total=cfg.steps)):
            loss, _ = policy.forward(preprocessor(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=loss.item())

    # The end of the block detached the teacher, so the policy is a stock policy again.
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(cfg.output_dir)


if __name__ == "__main__":
    train(draccus.parse(LoopConfig))
