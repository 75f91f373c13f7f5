"""Shared pieces: a small SmolVLA, a batch for it, and a 1-rectified flow that `lerobot-train` trained."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.scripts import lerobot_train

from smolvla_reflow import losses
from smolvla_reflow.commands import train as reflow_train
from smolvla_reflow.commands.console import command_line
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import LAST, one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.task import REPO_ID, write_dataset

torch.set_num_threads(1)  # models this small gain nothing from more, and lose much where the cores are busy
STATE_DIM, ACTION_DIM, CHUNK, WIDTH = 3, 2, 5, 6
# Periods of the time embedding for which even random weights make a velocity that is smooth in time.
SMOOTH = {"min_period": 1.0, "max_period": 4.0}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), hidden_size=32, vision_hidden_size=32)


@pytest.fixture(scope="session")
def make_config(backbone: Path) -> Callable[..., SmolVLAConfig]:
    def make(**overrides: Any) -> SmolVLAConfig:
        fields = {
            "device": "cpu",
            "vlm_model_name": str(backbone),
            "load_vlm_weights": False,
            "num_vlm_layers": 2,
            "chunk_size": CHUNK,
            "n_action_steps": CHUNK,
            "max_action_dim": WIDTH,
            "max_state_dim": WIDTH,
            "resize_imgs_with_padding": (32, 32),
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
def teacher(make_policy: Callable[..., SmolVLAPolicy], policy: SmolVLAPolicy) -> SmolVLAPolicy:
    """A policy like `policy` whose trainable weights differ."""
    other = make_policy(seed=1)
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch(4)


def make_batch(size: int, seed: int = 2) -> dict[str, torch.Tensor]:
    """A preprocessed batch whose second half has padded steps at the end of the chunk."""
    generator = torch.Generator().manual_seed(seed)
    is_pad = torch.zeros(size, CHUNK, dtype=torch.bool)
    is_pad[size // 2 :, -2:] = True
    return {
        "observation.state": torch.randn(size, STATE_DIM, generator=generator),
        "observation.images.top": torch.rand(size, 3, 32, 32, generator=generator),
        "observation.language.tokens": torch.randint(0, 200, (size, 6), generator=generator),
        "observation.language.attention_mask": torch.ones(size, 6, dtype=torch.bool),
        "action": torch.randn(size, CHUNK, ACTION_DIM, generator=generator),
        "action_is_pad": is_pad,
    }


@pytest.fixture
def noise_and_time() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, CHUNK, WIDTH, generator=generator), torch.rand(4, generator=generator) * 0.9 + 0.05


def lerobot_train_main(flags: Sequence[str]) -> None:
    """`lerobot-train` in this process."""
    with command_line("lerobot-train", flags):
        lerobot_train.train()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's dataset and backbone, and a 1-RF from 30 steps of `lerobot-train` in `1rf/`."""
    folder = tmp_path_factory.mktemp("workshop")
    write_dataset(folder / "dataset", episodes=8)
    write_backbone(folder / "backbone", hidden_size=32, vision_hidden_size=32)
    lerobot_train_main(short(one_rectified_flow_flags(folder, steps=30)))
    return folder


def short(flags: Sequence[str], **changes: Any) -> list[str]:
    """Flags of a small, single-process run, with some changed: `short(flags, steps=3)`."""
    changes = {"batch_size": 8, "num_workers": 0, **changes}
    names = {name.replace("__", "."): value for name, value in changes.items()}
    kept = [flag for flag in flags if flag[2:].partition("=")[0] not in names]
    return [*kept, *(f"--{name}={value}" for name, value in names.items() if value is not None)]


def as_flags(defaults: dict[str, Any], **changes: Any) -> list[str]:
    """`--name=value` for each of `defaults`, with some changed (`a__b` means `a.b`) or, by None, left out."""
    flags = {**defaults, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def eval_flags(workshop: Path, output_dir: Path, **changes: Any) -> list[str]:
    """Flags of a short `smolvla-reflow-eval` of the workshop's policy."""
    flags = {
        "policy.path": workshop / "1rf" / LAST,
        "policy.device": "cpu",
        "dataset.repo_id": REPO_ID,
        "dataset.root": workshop / "dataset",
        "output_dir": output_dir,
        "num_steps": "[1,2]",
        "num_frames": 6,
        "num_noises": 3,
        "reference_steps": 20,
        "batch_size": 4,
    }
    return as_flags(flags, **changes)


def reflow_run(workshop: Path, output_dir: Path, **changes: Any) -> list[str]:
    """Flags of a short `smolvla-reflow-train` in the workshop."""
    return short(reflow_flags(workshop, steps=4), output_dir=output_dir, **changes)


def reflow_train_main(flags: Sequence[str]) -> None:
    """`smolvla-reflow-train` in this process."""
    reflow_train.main(list(flags))


def stock_flags(workshop: Path, flags: Sequence[str], ours: Path, theirs: Path) -> list[str]:
    """The flags with which `lerobot-train` does into `theirs` what our command, given `flags`, did into `ours`."""
    saved = json.loads((ours / LAST / "train_config.json").read_text())["policy"]
    fields = ("optimizer_lr", "scheduler_decay_lr", "scheduler_warmup_steps", "scheduler_decay_steps")
    stock = [f for f in flags if not f.startswith("--reflow.")]
    stock += [f"--policy.{name}={saved[name]}" for name in fields]
    stock += [f"--policy.path={workshop / '1rf' / LAST}", "--policy.push_to_hub=false"]
    return [*stock, f"--output_dir={theirs}"]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two CPU processes over gloo; `accelerate launch --cpu --num_processes 2` would quietly start one."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    result = subprocess.run([*launch, *command], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, losses.LossStrategy]:
    """The registered strategies; what a test adds is forgotten after it."""
    monkeypatch.setattr(losses, "_registry", dict(losses._registry))
    return losses._registry


@pytest.fixture
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A block in which `attach` lets teacher and student encode each image for themselves."""
    attach_module = sys.modules["smolvla_reflow.attach"]  # the package exports the function of that name

    @contextlib.contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(attach_module, "share_features", lambda *policies: None)
            yield

    return block


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
    from pairs_helpers import make_pairs  # which imports this module

    return make_pairs(workshop, tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    """A copy of `stored`."""
    return Path(shutil.copytree(stored, tmp_path / "copied"))
