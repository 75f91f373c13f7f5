"""The fields that a new run takes over from a config file.

A file that a user wrote holds as it stands. A file that a training run saved has every field. Some would do harm in a
new run: the old run's weights, outputs, repository and learning rate. A new run decides them anew.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

from smolvla_reflow.checkpoint.fork.migration import rename_fork_flags
from smolvla_reflow.checkpoint.read import may_be_hub_id
from smolvla_reflow.checkpoint.run_folder import TRAIN_CONFIG_NAME, find_config
from smolvla_reflow.errors import doing
from smolvla_reflow.training.config import DECAY_LR_RATIO, LEARNING_RATE, WARMUP_RATIO

# LeRobot writes every field of a run. A user writes few of these by hand.
FIELDS_OF_EVERY_RUN = {"resume", "output_dir", "job_name", "use_policy_training_preset", "optimizer", "wandb"}
# The policy's fields that say how it is trained. Its other fields describe a checkpoint.
OF_TRAINING = re.compile(r"policy\.(type|device|use_amp|compile_|optimizer_|scheduler_|freeze_|train_|private)")
SCHEDULE = ("policy.scheduler_decay_lr", "policy.scheduler_warmup_steps", "policy.scheduler_decay_steps")
# A run fills in the number of steps that its teacher is solved with. It does not hold beside any of these flags.
OTHER_SOLVES = frozenset({"reflow.solver", "reflow.strategy", "reflow.pairs_path"})
# The fields of a saved file that a new run decides anew, by the reason.
DECIDED_ANEW = {
    "progress": ("resume", "checkpoint_path"),
    "outputs": ("output_dir", "job_name", "job", "wandb.run_id", "eval.recording_repo_id"),
    "repository": ("save_checkpoint_to_hub", "policy.push_to_hub", "policy.repo_id"),
    "weights": ("policy.pretrained_path", "policy.pretrained_revision", "policy.use_peft"),
    # A file of standard training: its learning rate is too high for reflow.
    "learning rate": ("use_policy_training_preset", "optimizer", "scheduler", "peft", "policy.optimizer_lr", *SCHEDULE),
    # A run on another dataset.
    "dataset": (
        "reflow.measure_episodes",
        *(f"dataset.{x}" for x in ("root", "revision", "episodes", "exclude_episodes")),
    ),
}


@dataclass(frozen=True)
class Inherited:
    """The part of a config file that holds for a new run."""

    # its `policy` and `reflow` sections, by flag name. LeRobot loads a pretrained policy's config from the policy's
    # folder and overrides it from the command line alone
    flags: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)  # its other fields, as they stand


def inherit(path: str, given: Mapping[str, Any]) -> Inherited:
    """Read a config file for a new run with these flags.

    `path` is a YAML or JSON file, a folder of a run that saved one, or a hub repository. Raises ReflowError if the file
    cannot be read.
    """
    with doing(f"reading --config_path={path}"):
        on_hub = not Path(path).exists() and may_be_hub_id(path)
        content = _parsed(Path(hf_hub_download(path, TRAIN_CONFIG_NAME)) if on_hub else find_config(Path(path)))
        sections = {name: dict(content.pop(name, None) or {}) for name in ("policy", "reflow")}
    flags = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    flags = rename_fork_flags({name: value for name, value in flags.items() if value is not None})
    if not content.keys() >= FIELDS_OF_EVERY_RUN:
        return Inherited(flags, content)
    dropped = {*_decided_anew(flags, content, given)}
    return Inherited({name: value for name, value in flags.items() if name not in dropped}, _without(content, dropped))


def schedule(steps: float, lr: float) -> dict[str, float]:
    """The schedule of a reflow run's learning rate, by flag name."""
    return dict(zip(SCHEDULE, (lr * DECAY_LR_RATIO, round(steps * WARMUP_RATIO), round(steps)), strict=True))


def solves_otherwise(saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """True if one of these flags changes how a saved run, with its values by flag name, solves its teacher."""

    def named(value: Any) -> Path:  # a saved run names files by their absolute paths
        return Path(str(value)).expanduser().resolve()

    return any(named(given[name]) != named(saved.get(name)) for name in OTHER_SOLVES.intersection(given))


def _parsed(file: Path) -> dict[str, Any]:
    text = file.read_text()
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)  # which would read JSON too, but takes 2e-05 for a word


def _decided_anew(flags: Mapping[str, Any], rest: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a saved file that do not hold for a new run with these flags."""
    for reason in ("progress", "outputs", "repository", "weights"):
        yield from DECIDED_ANEW[reason]
    teacher = flags.get("reflow.teacher_path")
    if teacher is None:
        yield from DECIDED_ANEW["learning rate"]
    else:  # the schedule of a reflow run follows its number of steps unless the user chose another
        usual = schedule(float(rest.get("steps") or 0), float(flags.get("policy.optimizer_lr", LEARNING_RATE)))
        yield from (name for name, value in usual.items() if flags.get(name) == value)
    if solves_otherwise(flags, given) or given.get("reflow.teacher_path", teacher) != teacher:
        yield "reflow.num_steps"
    start = {"policy.path", "policy.pretrained_path"}.intersection(given)
    if start or teacher is None or given.get("reflow.teacher_path", teacher) != teacher:
        # The student starts from another checkpoint, which brings its own architecture.
        yield from (name for name in flags if name.startswith("policy.") and not OF_TRAINING.match(name))
    dataset = (rest.get("dataset") or {}).get("repo_id")
    if given.get("dataset.repo_id", dataset) != dataset:
        yield from DECIDED_ANEW["dataset"]
    held = flags.get("reflow.measure_episodes")
    if held and "reflow.measure_episodes" in given:
        both = sorted([*held, *((rest.get("dataset") or {}).get("episodes") or ())])
        if both == [*range(len(both))]:  # the episodes that the earlier run did not hold out
            yield "dataset.episodes"


def _without(config: dict[str, Any], dropped: set[str], prefix: str = "") -> dict[str, Any]:
    """The configuration without these fields, each at the top or in a section."""
    return {
        name: _without(value, dropped, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in config.items()
        if prefix + name not in dropped
    }
