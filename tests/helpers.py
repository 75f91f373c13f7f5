"""Functions that many tests call: a batch and its losses, the commands in this process, flags of short runs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import utils as dataset_utils
from lerobot.scripts import lerobot_train
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from smolvla_reflow import Attachment, Recipe, attach
from smolvla_reflow.commands import eval as reflow_eval
from smolvla_reflow.commands import train as reflow_train
from smolvla_reflow.commands.console import command_line
from smolvla_reflow.dataset.frames import load_batches
from smolvla_reflow.dataset.opening import open_dataset
from smolvla_reflow.demo.environment import DrivePast
from smolvla_reflow.demo.flags import LAST, one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.task import CAMERA, REPO_ID, TASK
from smolvla_reflow.smolvla import sharing

# Sizes of the tests' small policy and its batches.
STATE_DIM, ACTION_DIM, CHUNK, WIDTH = 3, 2, 5, 6
# The smallest policy that the real SmolVLA code can be.
TINY = {"device": "cpu", "load_vlm_weights": False, "num_vlm_layers": 2, "resize_imgs_with_padding": (32, 32)}
# Periods of the time embedding for which even random weights make a velocity that is smooth in time.
SMOOTH = {"min_period": 1.0, "max_period": 4.0}
# Student and teacher compute one thing in two ways: float32, in another order.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)

# From 0.6.2 on LeRobot leaves out episodes that are not there, and so does this package.
EPISODES_HAVE_TO_EXIST = pytest.mark.skipif(
    hasattr(dataset_utils, "resolve_episode_indices"), reason="LeRobot takes episodes that are not there"
)


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


def plain(**changes: Any) -> Recipe:
    """The papers' own loss, without weights."""
    return Recipe(**{"weighting": "none", "padding_weight": 1.0, "scaled_noise": 0.0, **changes})


def attach_plain(policy: nn.Module, *source: Any, recipe: Recipe | None = None, **options: Any) -> Attachment:
    """`attach` without weights (which recorded actions never have), unless a recipe is given."""
    if recipe is None and options.get("strategy") != "standard":
        recipe = plain()
    return attach(policy, *source, recipe=recipe, **options)


def loss_of(policy: nn.Module, batch: dict[str, Any], *noise_and_time: torch.Tensor, **given: Any) -> torch.Tensor:
    """The loss of one forward pass in train mode."""
    return policy.train().forward(dict(batch), *noise_and_time, **given)[0]


def losses_of(policy: nn.Module, batch: dict[str, Any], *noise_and_time: torch.Tensor, **given: Any) -> torch.Tensor:
    """The losses of one forward pass in train mode, one for each frame."""
    return loss_of(policy, batch, *noise_and_time, reduction="none", **given)


def gradients(policy: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a loss to each parameter that has one."""
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def let_each_encode_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `attach` lets teacher and student encode each image for themselves."""
    monkeypatch.setattr(sharing, "_same_frozen_parameters", lambda first, second: False)


def prefixes_encoded(model: nn.Module) -> list[int]:
    """A list that grows, with each prefix that this model encodes from now on, by the number of its frames."""
    counts, embed = [], model.embed_prefix
    vars(model)["embed_prefix"] = lambda images, *rest, **named: (
        counts.append(len(images[0])) or embed(images, *rest, **named)
    )
    return counts


def lerobot_train_main(flags: Sequence[str]) -> None:
    """`lerobot-train` in this process."""
    with command_line("lerobot-train", flags):
        lerobot_train.train()


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


def load_frames(
    dataset: DatasetConfig, positions: Sequence[int], *, chunk_size: int, batch_size: int, tolerance_s: float = 1e-4
) -> Iterator[dict[str, Any]]:
    """Raw batches of a dataset's frames with their recorded chunks, as `smolvla-reflow-eval` loads them."""
    frames = open_dataset(dataset, chunk_size=chunk_size, tolerance_s=tolerance_s, held_out=True)
    return load_batches(frames, [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)])


def reflow_run(workshop: Path, output_dir: Path, **changes: Any) -> list[str]:
    """Flags of a short `smolvla-reflow-train` in the workshop."""
    return short(reflow_flags(workshop, steps=4), output_dir=output_dir, **changes)


def reflow_train_main(flags: Sequence[str]) -> None:
    """`smolvla-reflow-train` in this process."""
    reflow_train.main(list(flags))


def stock_flags(workshop: Path, flags: Sequence[str], run: Path, stock_run: Path) -> list[str]:
    """Flags of a `lerobot-train` into `stock_run` that is configured like the run of this package's command, `run`."""
    saved = saved_config(run)["policy"]
    fields = ("optimizer_lr", "scheduler_decay_lr", "scheduler_warmup_steps", "scheduler_decay_steps")
    stock = [f for f in flags if not f.startswith("--reflow.")]
    stock += [f"--policy.{name}={saved[name]}" for name in fields]
    stock += [f"--policy.path={workshop / '1rf' / LAST}", "--policy.push_to_hub=false"]
    return [*stock, f"--output_dir={stock_run}"]


def torchrun(*command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Two CPU processes over gloo; `accelerate launch --cpu --num_processes 2` would quietly start one."""
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **(env or {}),
    }
    script = str(Path(__file__).with_name("one_of_two.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, *command]
    with subprocess.Popen(launch, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends the processes that it started
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(launch, process.returncode, out, err)


def refused(capsys, main, flags) -> str:
    """A command that must fail with exit code 2 and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(flag) for flag in flags])
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    # A progress bar that an earlier test left open erases itself once it is collected: spaces, then one line up.
    return line.rpartition("\x1b[A")[2]


def write_smooth_workshop(workshop: Path, folder: Path) -> Path:
    """The workshop with a 1-RF whose velocity is smooth in time, so that fine solutions by two methods agree."""
    for name in ("dataset", "backbone"):
        (folder / name).symlink_to(workshop / name)
    periods = {f"policy__{name}": value for name, value in SMOOTH.items()}
    lerobot_train_main(short(one_rectified_flow_flags(folder, steps=30), **periods))
    return folder


def seen_by_the_policy(envs: Sequence[DrivePast], positions: np.ndarray) -> dict[str, Any]:
    """The demo's environments as a batch for a preprocessor."""
    images = np.stack([env.render() for env in envs])
    return {
        "observation.state": torch.tensor(positions).float(),
        CAMERA: torch.tensor(images).permute(0, 3, 1, 2) / 255,
        "task": [TASK] * len(envs),
    }


def driven_flags(workshop: Path, output_dir: Path, **changes: Any) -> list[str]:
    """Flags of a short `smolvla-reflow-eval` in three batches of frames that drives the demo's environment, too."""
    driven = {"env__type": "drive_past", "eval__n_episodes": 4, "eval__batch_size": 4, "eval__use_async_envs": "false"}
    small = {"num_frames": 5, "batch_size": 2, "num_noises": 2, "reference_steps": 4}
    plugin = "--env.discover_packages_path=smolvla_reflow.demo"
    return [plugin, *eval_flags(workshop, output_dir, **{**driven, **small, **changes})]


def eval_main(flags: Sequence[str]) -> dict[str, Any]:
    """`smolvla-reflow-eval` in this process; returns its report."""
    reflow_eval.main(list(flags))
    (folder,) = (flag.removeprefix("--output_dir=") for flag in flags if flag.startswith("--output_dir="))
    return json.loads((Path(folder) / "report.json").read_text())


def change_config(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Change fields of a checkpoint's config.json; returns all its fields."""
    path = checkpoint / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(fields))
    return fields


def assert_can_be_run(command: str) -> None:
    """A command in a message, `python -m MODULE --FLAG...`: the module is installed, and takes these flags."""
    module, *words = command.partition("python -m ")[2].split()
    tool = importlib.util.find_spec(module)
    assert tool is not None
    for flag in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert f'"{flag}"' in Path(tool.origin).read_text()


def saved_weights(run: Path, step: str = "last") -> dict[str, torch.Tensor]:
    """The weights that a training run saved at a step."""
    return load_file(run / "checkpoints" / step / "pretrained_model" / "model.safetensors")


def saved_config(run: Path) -> dict[str, Any]:
    """The train_config.json of a run's last checkpoint."""
    return json.loads((run / LAST / "train_config.json").read_text())


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """True if the values are the same, bitwise. The names have to be."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class ListReads(TorchFunctionMode):
    """Counts how often the host reads all of a tensor's values, which reaches no dispatch on the CPU."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.tolist
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Counts how often the host reads a tensor's value. It would wait for a GPU each time."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "masked_select", "unique")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def reads(function):
    """How often a function reads a tensor's value."""
    with Reads() as mode, ListReads() as lists:
        function()
    return mode.count + lists.count
