"""Seconds of a training step, and the machine that they were measured on."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

# As LeRobot's own commands set them.
torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True

Loss = Callable[[dict[str, Tensor]], Tensor]


def take_step(loss: Loss, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, autocast: bool = False) -> float:
    """Take one training step, in bfloat16 autocast if `autocast` is set, and return its seconds."""
    synchronise(batch)
    start = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast(batch["action"].device.type, torch.bfloat16, enabled=autocast):
        value = loss(batch)
    value.backward()
    optimizer.step()
    synchronise(batch)
    return time.perf_counter() - start


def synchronise(batch: dict[str, Tensor]) -> None:
    if batch["action"].is_cuda:
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """Device and versions, in a line."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {os.cpu_count()} cores"
    versions = " ".join(f"{package} {version(package)}" for package in ("lerobot", "torch", "transformers"))
    return f"{name} ({platform.machine()}), {versions}"
