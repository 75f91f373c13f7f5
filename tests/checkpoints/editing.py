"""Changes to a checkpoint's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREPROCESSOR = "policy_preprocessor.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_step(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change one step of the saved preprocessor."""
    edit(folder / PREPROCESSOR, lambda s: [change(step) for step in s["steps"] if step["registry_name"] == name])


def tokenizer_at(name: str) -> Callable[[dict[str, Any]], None]:
    """A change of the step: its tokenizer is at `name`, and not inside the checkpoint as from LeRobot 0.6.2 on."""

    def change(step: dict[str, Any]) -> None:
        step["config"]["tokenizer_name"] = name
        step.pop("artifacts", None)

    return change


def add_step(file: Path, step: dict[str, Any]) -> None:
    """Put a step in front of those of a saved processor."""
    edit(file, lambda saved: saved["steps"].insert(0, step))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def doubled(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.mul_(2)


def state_file(folder: Path) -> Path:
    (file,) = folder.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    return file
