"""Everything that the numbers of an evaluation depend on, by name: two evaluations of equal keys may share parts.

Fields are left out by name, so that a new flag is part of the key until somebody decides otherwise.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import draccus
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.errors import sha256
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.smolvla.statistics import TYPES

# The folder of the report, and the flag that stores the recommendation.
WITHOUT_EFFECT = ("output_dir", "write_num_steps")
DIGITS = 16  # of a checksum
PACKAGES = ("smolvla-reflow", "lerobot", "torch", "transformers")


def key_of(
    cfg: EvalConfig, checkpoints: Mapping[str, Checkpoint], dataset: LeRobotDataset, positions: Sequence[int]
) -> dict[str, Any]:
    """The key of an evaluation.

    Args:
        cfg: the flags.
        checkpoints: by the policies' names.
        dataset: opened, to measure on.
        positions: of the frames in the dataset.
    """
    flags = _flat(draccus.encode(cfg))
    policies = {name: _flat(_identity(checkpoint), f"{name}'s ") for name, checkpoint in checkpoints.items()}
    return {
        **{name: value for name, value in flags.items() if name not in WITHOUT_EFFECT},
        **{name: value for its in policies.values() for name, value in its.items()},
        "statistics of the dataset": _digest(dataset.meta.stats[name] for name in TYPES if name in dataset.meta.stats),
        "frames": _digest(_rows(dataset, positions)),
        **{f"version of {package}": version(package) for package in PACKAGES},
    }


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint: its weights and statistics, its processors, and its whole configuration."""
    files = [checkpoint.folder / name for name in checkpoint.processors]
    return {
        "path": checkpoint.cited(),
        "fingerprint": checkpoint.fingerprint(),
        "processors": {file.name: sha256(file).hexdigest()[:DIGITS] for file in files},
        **draccus.encode(checkpoint.config),
    }


def _rows(dataset: LeRobotDataset, positions: Sequence[int]) -> list[Any]:
    """The recorded numbers of these frames; their images are not read."""
    images = set(dataset.meta.camera_keys)
    table = dataset.hf_dataset.select_columns([name for name in dataset.hf_dataset.column_names if name not in images])
    return [table.with_format("numpy")[list(positions)]]


def _digest(values: Any) -> str:
    """A checksum of dictionaries of arrays."""
    digest = hashlib.sha256()
    for each in values:
        for name in sorted(each):
            digest.update(f"{name} {np.asarray(each[name]).tolist()}".encode())
    return digest.hexdigest()[:DIGITS]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by the names of their flags, such as "dataset.root"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= {f"{prefix}{name}.{inner}": each for inner, each in _flat(value).items()}
        else:
            flat[f"{prefix}{name}"] = value
    return flat
