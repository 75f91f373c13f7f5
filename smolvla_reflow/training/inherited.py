"""What a new run takes over from a config file.

A file that a user wrote holds as it stands. A file that a training run saved has every field, and some say only where
that run came from and where it went: its weights, its optimizer, its outputs. A new run decides those anew.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

from smolvla_reflow.checkpoint.fork.migration import rename_fork_flags
from smolvla_reflow.checkpoint.read import TRAIN_CONFIG_NAME, may_be_hub_id
from smolvla_reflow.errors import ReflowError, in_one_line
from smolvla_reflow.training.config import DECAY_LR_RATIO, LEARNING_RATE, WARMUP_RATIO
from smolvla_reflow.training.run_folder import find_config

# LeRobot writes every field of a run; what somebody writes by hand has the few that were wanted.
FIELDS_OF_EVERY_RUN = {"resume", "output_dir", "job_name", "use_policy_training_preset", "optimizer", "wandb"}
# How far a run was, what it wrote where and under which name, and where its weights came from.
OF_THAT_RUN = (
    "resume",
    "checkpoint_path",
    "output_dir",
    "job_name",
    "job",
    "save_checkpoint_to_hub",
    "wandb.run_id",
    "eval.recording_repo_id",
    "policy.push_to_hub",
    "policy.repo_id",
    "policy.pretrained_path",
    "policy.pretrained_revision",
    "policy.use_peft",
)
# Right for the training from recorded actions, and too much for a reflow run.
OF_STANDARD_TRAINING = (
    "use_policy_training_preset",
    "optimizer",
    "scheduler",
    "peft",
    "policy.optimizer_lr",
    "policy.scheduler_decay_lr",
    "policy.scheduler_warmup_steps",
    "policy.scheduler_decay_steps",
)
# Prefixes of the policy's fields that say how it is trained; the others are those of a checkpoint.
OF_TRAINING = ("device", "use_amp", "compile_", "optimizer_", "scheduler_", "freeze_", "train_", "private")
OF_ITS_DATASET = (
    *("dataset.root", "dataset.revision", "dataset.episodes", "dataset.exclude_episodes"),
    "reflow.measure_episodes",
)


@dataclass(frozen=True)
class Inherited:
    """A config file, as far as it holds for a new run.

    Attributes:
        flags: its `policy` and `reflow` sections, by flag name. LeRobot loads a pretrained policy's config from the
            policy's folder and overrides it from the command line alone.
        rest: its other fields, as they stand.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def inherit(path: str, given: Mapping[str, Any]) -> Inherited:
    """Read a config file for a new run.

    Args:
        path: of a YAML or JSON file, a folder of a run that saved one, or the id of a hub repository that holds one.
        given: the command line's flags, by name.

    Raises:
        ReflowError: it cannot be read, or says that a run is to be resumed.
    """
    rest = _read(path, _find(path))
    sections = {name: rest.pop(name, None) or {} for name in ("policy", "reflow")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ReflowError(f"--config_path={path}: '{name}' should be a section with fields.")
    flags = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.items()
        if value is not None
    }
    file = Inherited(rename_fork_flags(flags), rest)
    if rest.keys() >= FIELDS_OF_EVERY_RUN:
        return _of_a_saved_run(file, given)
    if str(rest.get("resume")).lower() == "true":
        raise ReflowError(
            f"{path} says resume: true, and a run is resumed from the command line: --resume=true --config_path=.../"
            f"pretrained_model/{TRAIN_CONFIG_NAME}. For a new run, take it out of the file."
        )
    return file


def schedule(steps: float, lr: float) -> dict[str, float]:
    """The schedule of a reflow run's learning rate, by flag name."""
    return {
        "policy.scheduler_decay_lr": lr * DECAY_LR_RATIO,
        "policy.scheduler_warmup_steps": round(steps * WARMUP_RATIO),
        "policy.scheduler_decay_steps": round(steps),
    }


def _find(path: str) -> Path:
    here = find_config(Path(path))
    if here is not None:
        return here
    if not Path(path).exists() and may_be_hub_id(path):
        try:
            return Path(hf_hub_download(path, TRAIN_CONFIG_NAME))
        except Exception as error:  # the hub client's errors share no base class
            raise ReflowError(
                f"--config_path={path} does not exist, and as a hub id it cannot be read ({in_one_line(error)})."
            ) from None
    return Path(path)


def _read(path: str, file: Path) -> dict[str, Any]:
    try:
        content = _parsed(file.read_text())
    except FileNotFoundError:
        raise ReflowError(f"--config_path={path} does not exist.") from None
    except IsADirectoryError:
        raise ReflowError(f"--config_path={path} is a folder, and holds no {TRAIN_CONFIG_NAME}.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ReflowError(f"--config_path={path} cannot be read as YAML or JSON: {error}") from None
    if not isinstance(content, dict):
        raise ReflowError(f"--config_path={path} holds no configuration.")
    return content


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)  # which would read JSON too, but takes 2e-05 for a word


def _of_a_saved_run(file: Inherited, given: Mapping[str, Any]) -> Inherited:
    """What of a saved run's configuration holds for a new one."""
    flags, rest = dict(file.flags), file.rest
    teacher = flags.get("reflow.teacher_path")
    dropped = [*OF_THAT_RUN, *(OF_STANDARD_TRAINING if teacher is None else _filled_in(file))]
    if teacher is None or _starts_elsewhere(str(teacher), given):
        policy = [name.removeprefix("policy.") for name in flags if name.startswith("policy.")]
        dropped += [f"policy.{name}" for name in policy if not name.startswith((*OF_TRAINING, "type"))]
    if given.get("dataset.repo_id", _at(rest, "dataset.repo_id")) != _at(rest, "dataset.repo_id"):
        dropped += OF_ITS_DATASET
    return Inherited({name: value for name, value in flags.items() if name not in dropped}, _without(rest, dropped))


def _filled_in(file: Inherited) -> list[str]:
    """The flags of a saved reflow run that say what a run of its length and learning rate is given anyway."""
    given = file.flags
    try:
        usual = schedule(float(file.rest["steps"]), float(given.get("policy.optimizer_lr", LEARNING_RATE)))
    except (KeyError, TypeError, ValueError):
        return []
    return [name for name, value in usual.items() if given.get(name) == value]


def _starts_elsewhere(teacher: str, given: Mapping[str, Any]) -> bool:
    """Whether the student starts from another checkpoint than that of the saved run did."""
    named = str(given.get("reflow.teacher_path", teacher))
    paths = [Path(name).expanduser().resolve() for name in (named, teacher)]
    return paths[0] != paths[1] or "policy.path" in given or "policy.pretrained_path" in given


def _at(config: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.rpartition(".")
    found = config.get(section) if section else config
    return found.get(key) if isinstance(found, Mapping) else None


def _without(config: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    """The configuration without these fields, each at the top or in a section."""
    left = {}
    for name, value in config.items():
        if name in dropped:
            continue
        inner = {f"{name}.{key}" for key in value} if isinstance(value, dict) else set()
        if inner.intersection(dropped):
            value = {key: item for key, item in value.items() if f"{name}.{key}" not in dropped}
        left[name] = value
    return left
