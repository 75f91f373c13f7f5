"""A training run's output folder: which of its checkpoints are whole, and how to go on from one.

LeRobot writes a checkpoint file by file and then points `checkpoints/last` at it. A run that was killed meanwhile
leaves a checkpoint that is not whole, or a moment without `last`.
"""

import json
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.utils.constants import (
    CHECKPOINTS_DIR,
    LAST_CHECKPOINT_LINK,
    OPTIMIZER_PARAM_GROUPS,
    OPTIMIZER_STATE,
    PRETRAINED_MODEL_DIR,
    RNG_STATE,
    SCHEDULER_STATE,
    TRAINING_STATE_DIR,
    TRAINING_STEP,
)
from safetensors import SafetensorError

from smolvla_reflow.checkpoint.adapter import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from smolvla_reflow.checkpoint.read import (
    POSTPROCESSOR_NAME,
    PREPROCESSOR_NAME,
    TRAIN_CONFIG_NAME,
    StoredTensors,
)
from smolvla_reflow.checkpoint.saved_steps import named_files
from smolvla_reflow.errors import ReflowError

CONFIG = Path(PRETRAINED_MODEL_DIR) / TRAIN_CONFIG_NAME
# LeRobot 0.6.2 averages weights, and saves what each process of a sharded run holds, as torch's distributed
# checkpoints, which are complete once they have their metadata.
AVERAGED_WEIGHTS = "ema_state.pt"
SHARDED_WEIGHTS = f"{FSDP_MODEL_NAME}_0"
SHARDED_OPTIMIZER = f"{OPTIMIZER_NAME}_0"
SHARDS_METADATA = ".metadata"


def whole_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The checkpoints of a run that can be resumed, newest first."""
    folders = [f for f in (output_dir / CHECKPOINTS_DIR).glob("*") if f.name.isdecimal() and f.is_dir()]
    return (folder for folder in sorted(folders, key=lambda f: int(f.name), reverse=True) if is_whole(folder))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that resuming reads is there and none was cut off."""
    return flaw(checkpoint) is None


def flaw(checkpoint: Path, policy: str = PRETRAINED_MODEL_DIR) -> str | None:
    """What a checkpoint lacks to be resumed, None if nothing.

    Args:
        checkpoint: its folder.
        policy: the folder in it to resume from.
    """
    for path in _read_by_resuming(checkpoint / policy, checkpoint / TRAINING_STATE_DIR):
        if not path.exists():
            return f"{path.relative_to(checkpoint)} is missing"
        if not _is_complete(path):
            return f"{path.relative_to(checkpoint)} is not complete"
    return None


def last_good(output_dir: Path) -> Path | None:
    """The newest whole checkpoint whose weights and optimizer state are all finite; None if there is none.

    The shards of a distributed checkpoint are not looked into.
    """
    for checkpoint in whole_checkpoints(output_dir):
        policy, state = checkpoint / PRETRAINED_MODEL_DIR, checkpoint / TRAINING_STATE_DIR
        paths = (policy / SAFETENSORS_SINGLE_FILE, policy / ADAPTER_WEIGHTS_NAME, state / OPTIMIZER_STATE)
        files = [StoredTensors(path) for path in paths if path.is_file()]
        if all(torch.isfinite(file[name]).all() for file in files for name in file):
            return checkpoint
    return None


def find_config(path: Path) -> Path | None:
    """The `train_config.json` that a path means, if it is there.

    Args:
        path: of the file, or of a policy's, a checkpoint's or a run's folder, of which it is the newest whole one's.
    """
    config = _newest(path) if _is_run(path) else _config_meant(path)
    return config if config is not None and config.is_file() else None


def resumable_config(path: Path) -> Path:
    """The `train_config.json` of the checkpoint that a path means, as in `find_config`, to resume it from.

    `last` means the run's newest whole checkpoint where it is missing or broke off.

    Raises:
        ReflowError: there is no such checkpoint, or it is not whole.
    """
    config = None if _is_run(path) else _config_meant(path)
    lacks = None if config is None else flaw(config.parent.parent, config.parent.name)
    if config is not None and lacks is None:
        return config
    newest = _newest(path)
    if newest is not None and (
        _is_run(path) or (config is not None and config.parent.parent.name == LAST_CHECKPOINT_LINK)
    ):
        return newest
    if _is_run(path):
        raise ReflowError(f"--config_path={path} holds no whole checkpoint, with training_state and all.")
    if not path.exists():
        problem = "does not exist"
    elif lacks is not None:
        problem = f"does not belong to a whole checkpoint: {lacks}"
    else:
        problem = "holds no checkpoint of a training run"
    hint = " That run has none." if (_run_of(path) / CHECKPOINTS_DIR).is_dir() else ""
    if newest is not None:
        hint = f" The newest whole one of that run is --config_path={newest}"
    raise ReflowError(f"--config_path={path} {problem}.{hint}")


def training_step(checkpoint: Path) -> int:
    """The step at which a whole checkpoint was saved."""
    return int(json.loads((checkpoint / TRAINING_STATE_DIR / TRAINING_STEP).read_text())["step"])


def how_to_go_on(output_dir: Path, typed: Sequence[str] = ()) -> str:
    """What to do about a run that was cut short; `typed` are flags that have to be given again."""
    checkpoint = last_good(output_dir)
    if checkpoint is None:
        return f"No checkpoint was saved yet; start again with another --output_dir than {output_dir}."
    flags = shlex.join([f"--config_path={checkpoint / CONFIG}", "--resume=true", *typed])
    return f"Go on from the last good checkpoint with {flags}"


def _is_run(path: Path) -> bool:
    """Whether a path is a run's output folder, or that of its checkpoints."""
    return (path / CHECKPOINTS_DIR).is_dir() or (path.absolute().name == CHECKPOINTS_DIR and path.is_dir())


def _config_meant(path: Path) -> Path | None:
    """The `train_config.json` of the checkpoint that a path means, there or not; None if it means no certain one."""
    path = path.absolute()
    if path.name == PRETRAINED_MODEL_DIR or (path / TRAIN_CONFIG_NAME).is_file():
        return path / TRAIN_CONFIG_NAME
    if path.name == CONFIG_NAME and path.with_name(TRAIN_CONFIG_NAME).is_file():  # the policy's, and no user's own
        return path.with_name(TRAIN_CONFIG_NAME)
    if path.is_file() or path.name == TRAIN_CONFIG_NAME:
        return path
    is_step = path.name.isdecimal() or path.name == LAST_CHECKPOINT_LINK
    if (path / PRETRAINED_MODEL_DIR).is_dir() or (is_step and path.parent.name == CHECKPOINTS_DIR):
        return path / CONFIG
    return None


def _run_of(path: Path) -> Path:
    """The output folder that a path is, or lies in."""
    path = path.absolute()
    if (path / CHECKPOINTS_DIR).is_dir():
        return path
    return next((folder.parent for folder in (path, *path.parents) if folder.name == CHECKPOINTS_DIR), path)


def _newest(path: Path) -> Path | None:
    """The `train_config.json` of the newest whole checkpoint of the run that a path is, or lies in."""
    newest = next(whole_checkpoints(_run_of(path)), None)
    return newest and newest / CONFIG


def _read_by_resuming(policy: Path, state: Path) -> Iterator[Path]:
    """Every file and folder that resuming reads, each after those that say that there is to be one.

    Args:
        policy: folder of the weights, the configuration and the processors.
        state: folder of the training's state.
    """
    yield policy / CONFIG_NAME
    yield policy / TRAIN_CONFIG_NAME
    config = json.loads((policy / TRAIN_CONFIG_NAME).read_text())
    yield from _weights(policy, config)
    for name in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME):
        yield policy / name
        files, folders = named_files(json.loads((policy / name).read_text()))
        yield from (policy / file for file in files)
        for folder in folders:
            yield policy / folder
            yield from (path for path in sorted((policy / folder).rglob("*")) if path.is_file())
    yield state / TRAINING_STEP
    yield state / RNG_STATE
    if (state / SHARDED_OPTIMIZER).is_dir():
        yield state / SHARDED_OPTIMIZER / SHARDS_METADATA
    else:
        yield state / OPTIMIZER_STATE
        yield state / OPTIMIZER_PARAM_GROUPS
    if config.get("scheduler"):
        yield state / SCHEDULER_STATE
    if _section(config, "ema").get("enable"):
        yield state / AVERAGED_WEIGHTS


def _weights(policy: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    if "dcp" in str(config.get("checkpoint_format")).lower():
        yield policy / SHARDED_WEIGHTS / SHARDS_METADATA
    elif _section(config, "policy").get("use_peft"):
        yield policy / ADAPTER_CONFIG_NAME
        yield policy / ADAPTER_WEIGHTS_NAME
    else:
        yield policy / SAFETENSORS_SINGLE_FILE


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _is_complete(path: Path) -> bool:
    """Whether a file can be read to its end, as far as its kind tells."""
    try:
        if path.suffix == ".safetensors":
            StoredTensors(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            return isinstance(content, list if path.name == OPTIMIZER_PARAM_GROUPS else dict)
        elif path.suffix == ".pt":
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return path.name != SHARDS_METADATA or path.stat().st_size > 0
