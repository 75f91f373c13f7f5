"""What the tests of stored pairs share: a short `smolvla-reflow-pairs`, and looks at what it wrote."""

from pathlib import Path
from typing import Any

import torch
from helpers import as_flags
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file

from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.noise import pair_noise

FRAMES, CHUNK, WIDTH = 48, 6, 4  # of the workshop's dataset and teacher
FRAMES_SEEN = (0, 7, 20, 47)


def pairs_flags(workshop: Path, folder: Path, **changes: Any) -> list[str]:
    """Flags of a short `smolvla-reflow-pairs` of the workshop's teacher into `folder`."""
    flags = {
        "reflow.teacher_path": workshop / "1rf" / LAST,
        "reflow.solver": "euler",  # what stock LeRobot can be asked for, too
        "dataset.repo_id": REPO_ID,
        "dataset.root": workshop / "dataset",
        "output_dir": folder,
        "policy.device": "cpu",
        "couplings_per_frame": 3,
        "scaled_noise": 0,  # so that a pair's noise is `pair_noise`
        "seed": 0,
        "batch_size": 5,
        "num_workers": 0,
        "frames_per_shard": 16,
    }
    return as_flags(flags, **changes)


def make_pairs(workshop: Path, folder: Path, **changes: Any) -> Path:
    """Run the command in this process; returns `folder`."""
    pairs_command.main(pairs_flags(workshop, folder, **changes))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What is in each file of a set, but for the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def which_pairs(frame: int, noises: torch.Tensor) -> list[int]:
    """The numbers of a frame's three stored pairs whose noise this is. Raises ValueError for any other noise."""
    stored = [pair_noise(0, frame, pair, (CHUNK, WIDTH)) for pair in range(3)]
    return [[torch.equal(noise, other) for other in stored].index(True) for noise in noises]


def observed(workshop: Path, dataset: str | Path = "dataset", frames=FRAMES_SEEN):
    """The teacher, and some frames as plain LeRobot shows them to it; `dataset` lies in the workshop or is absolute."""
    checkpoint = workshop / "1rf" / LAST
    teacher = SmolVLAPolicy.from_pretrained(checkpoint).eval()
    preprocessor, _ = make_pre_post_processors(teacher.config, str(checkpoint))
    recorded = LeRobotDataset(REPO_ID, root=workshop / dataset)
    return teacher, preprocessor(torch.utils.data.default_collate([recorded[i] for i in frames]))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of a training run's last checkpoint."""
    return load_file(run / LAST / "model.safetensors")


def loss_and_gradient(policy: SmolVLAPolicy, batch: dict[str, Any], **fixed: Any):
    """Of a forward pass in training mode: the loss, and the gradient by parameter."""
    policy.zero_grad()
    loss, _ = policy.train().forward(dict(batch), **fixed)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_close(found, expected, *, loss: dict[str, float], gradient: dict[str, float]) -> None:
    """Compare two results of `loss_and_gradient`, each part within its own tolerances."""
    torch.testing.assert_close(found[0], expected[0], **loss)
    assert found[1].keys() == expected[1].keys()
    assert len(found[1]) > 10
    for name in expected[1]:
        torch.testing.assert_close(found[1][name], expected[1][name], **gradient)


def moved(workshop: Path):
    """A student that has moved away from its teacher, a batch whose recorded actions matter, and times."""
    policy, batch = observed(workshop)
    with torch.no_grad():
        policy.model.action_out_proj.weight.mul_(1.1)
    batch["action"] = torch.full((4, CHUNK, 2), 100.0)
    return policy, batch, torch.tensor([0.1, 0.4, 0.7, 0.99])
