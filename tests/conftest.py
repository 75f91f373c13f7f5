"""Fixtures: a small SmolVLA, a batch for it, and a 1-rectified flow that `lerobot-train` trained."""

import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from helpers import ACTION_DIM, CHUNK, STATE_DIM, TINY, WIDTH, lerobot_train_main, make_batch, short
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from pairs_helpers import make_pairs
from people import People, fine_tune, write_base, write_robot_dataset

from smolvla_reflow import Coupling, Step, losses
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import one_rectified_flow_flags
from smolvla_reflow.demo.task import write_dataset

# draccus looks for the help of each field in the source of its class, and reads the source anew for each field of each
# command line. Without this cache a short command spends most of its time there.
inspect.getsource = functools.cache(inspect.getsource)
torch.set_num_threads(1)  # models this small gain nothing from more threads, and lose much on busy cores


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=32, vision_hidden_size=32)


@pytest.fixture(scope="session")
def make_config(backbone: Path) -> Callable[..., SmolVLAConfig]:
    def make(**overrides: Any) -> SmolVLAConfig:
        fields = {
            **TINY,
            "vlm_model_name": str(backbone),
            "chunk_size": CHUNK,
            "n_action_steps": CHUNK,
            "max_action_dim": WIDTH,
            "max_state_dim": WIDTH,
            "push_to_hub": False,
            "input_features": {
                "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        }
        return SmolVLAConfig(**{**fields, **overrides})

    return make


@pytest.fixture(scope="session")
def make_policy(make_config: Callable[..., SmolVLAConfig]) -> Callable[..., SmolVLAPolicy]:
    """A policy with random weights; the same seed gives the same weights."""

    def make(seed: int = 0, **overrides: Any) -> SmolVLAPolicy:
        torch.manual_seed(seed)
        return SmolVLAPolicy(make_config(**overrides)).eval()

    return make


@pytest.fixture
def policy(make_policy: Callable[..., SmolVLAPolicy]) -> SmolVLAPolicy:
    return make_policy(seed=0)


@pytest.fixture
def own_prefix() -> bool:
    """True if `teacher` encodes the prefix otherwise than `policy`. Files that need both override this fixture."""
    return False


@pytest.fixture
def teacher(make_policy: Callable[..., SmolVLAPolicy], policy: SmolVLAPolicy, own_prefix: bool) -> SmolVLAPolicy:
    """A policy like `policy` with other trainable weights. `state_proj` (of the prefix) differs only if `own_prefix`."""
    other = make_policy(seed=1)
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad and (own_prefix or "state_proj" not in name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch(4)


@pytest.fixture
def noise_and_time() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, CHUNK, WIDTH, generator=generator), torch.rand(4, generator=generator) * 0.9 + 0.05


@pytest.fixture
def noise(noise_and_time: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return noise_and_time[0]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's dataset and backbone, and a 1-RF from 30 steps of `lerobot-train` in `1rf/`."""
    folder = tmp_path_factory.mktemp("workshop")
    write_dataset(folder / "dataset", episodes=8)
    write_backbone(folder / "backbone", hidden_size=32, vision_hidden_size=32)
    lerobot_train_main(short(one_rectified_flow_flags(folder, steps=30)))
    return folder


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, losses.LossStrategy]:
    """The registered strategies; what a test adds is forgotten after it."""
    monkeypatch.setattr(losses, "_registry", dict(losses._registry))
    return losses._registry


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Actions, noise and times of the lines that the student is asked about, call by call."""
    seen, squared_errors = [], Step.squared_errors

    def note(step: Step, coupling: Coupling, times: torch.Tensor) -> torch.Tensor:
        seen.append((coupling.actions, coupling.noise, times))
        return squared_errors(step, coupling, times)

    monkeypatch.setattr(Step, "squared_errors", note)
    return seen


@pytest.fixture(autouse=True)
def _quiet_root_logger():
    """LeRobot's `init_logging` takes over the root logger; give it back after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def stored(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of the workshop's pairs, three for each frame. Not to be changed; `copied` is for that."""
    return make_pairs(workshop, tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored`."""
    return Path(shutil.copytree(stored, tmp_path / "copied"))


@pytest.fixture(scope="session")
def people(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> People:
    """A base like `lerobot/smolvla_base`, a robot's dataset, and the base fine-tuned on it by `lerobot-train`."""
    folder = tmp_path_factory.mktemp("people")
    base = write_base(folder / "base", backbone)
    dataset = write_robot_dataset(folder / "dataset")
    return People(base, dataset, fine_tune(base, dataset, folder / "1rf"))
