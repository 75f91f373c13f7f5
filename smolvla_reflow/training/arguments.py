"""Complete the command line before LeRobot reads it.

LeRobot reads `--policy.*` from the command line itself when it loads a pretrained policy. So a reflow run's conventions
become flags: the student starts from the teacher, reflow's learning rate holds unless the user gave one, and the flags
of the earlier fork keep their meaning. Everything in this module is a plain function from flags to flags.
"""

import datetime as dt
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvla_reflow.checkpoint.fork.migration import rename_fork_flags
from smolvla_reflow.checkpoint.read import may_be_hub_id
from smolvla_reflow.checkpoint.run_folder import CONFIG, find_config
from smolvla_reflow.compat import download_last_checkpoint, resumes_from_hub
from smolvla_reflow.errors import ReflowError, doing
from smolvla_reflow.training.config import LEARNING_RATE, ReflowTrainPipelineConfig
from smolvla_reflow.training.inherited import Inherited, inherit, schedule

NOTHING = ("", "null", "none")


@dataclass(frozen=True)
class Arguments:
    """A completed command line."""

    flags: list[str]  # for LeRobot's parser, each `--name=value`
    chosen: dict[str, Any]  # values filled in because the user gave none, by flag name
    typed: frozenset[str]  # names of the flags that the user typed
    resume: bool = False  # True if the run continues an earlier one, whose configuration then holds
    # temporary copy of the user's config file that `flags` name; for the caller to delete
    config_file: Path | None = None

    @property
    def by_name(self) -> dict[str, str]:
        """The values of the flags, by their names."""
        return {name: value for name, _, value in (flag[2:].partition("=") for flag in self.flags)}


def complete(argv: Sequence[str]) -> Arguments:
    """Complete the user's command line (without the program's name)."""
    given: dict[str, Any] = _at_home(_parse(argv))
    typed = frozenset(given)
    if _is_true(given.get("resume")):
        return _resumed(given, typed)

    path = given.pop("config_path", None)
    inherited = inherit(path, given) if path else Inherited()
    rest = _at_home(inherited.rest)
    given = _at_home({**inherited.flags, **rename_fork_flags(given)})
    if not given.get("reflow.teacher_path"):
        raise ReflowError(
            "Name the teacher, the SmolVLA checkpoint to reflow: --reflow.teacher_path=.../pretrained_model."
        )
    if "dataset.repo_id" not in given and not (rest.get("dataset") or {}).get("repo_id"):
        raise ReflowError("Name the dataset the teacher was trained on: --dataset.repo_id=... (--dataset.root=...).")
    if given.get("policy.type") == "smolvla":  # LeRobot takes no type beside the path that is filled in
        del given["policy.type"]
    if "policy.pretrained_path" in given:  # another name for the student's start, which LeRobot would overwrite
        given.setdefault("policy.path", given.pop("policy.pretrained_path"))
    chosen = _choose(given, rest)
    flags = _flags({**given, **chosen})
    if not rest:
        return Arguments(flags, chosen, typed)
    # LeRobot 0.4 reads every config file as JSON.
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="reflow_config_", delete=False) as file:
        json.dump(rest, file)
    return Arguments([f"--config_path={file.name}", *flags], chosen, typed, config_file=Path(file.name))


def _resumed(given: dict[str, Any], typed: frozenset[str]) -> Arguments:
    """The command line that resumes a run, which goes on with its own configuration and weights."""
    path = given.get("config_path")
    if not path:
        raise ReflowError("--resume=true needs --config_path=..., the run's folder or one of its checkpoints.")
    for name in typed & {"policy.path", "policy.pretrained_path"}:
        raise ReflowError(f"--{name} is for a new run; a resumed one goes on with its own weights. Leave it out.")
    config = find_config(Path(path))
    if not config.parent.exists() and may_be_hub_id(path) and resumes_from_hub():
        folder = given.setdefault("output_dir", f"outputs/train/{dt.datetime.now():%Y-%m-%d/%H-%M-%S}_resume")
        with doing(f"downloading the last checkpoint of {path}"):
            config = download_last_checkpoint(path, Path(folder)) / CONFIG
    if not config.is_file():
        raise ReflowError(f"--config_path={path} holds no checkpoint of a training run: there is no {config}.")
    return Arguments(_flags({**given, "config_path": str(config)}), {}, typed, resume=True)


def _choose(given: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a reflow run uses where the user gave none."""
    steps = ReflowTrainPipelineConfig.__dataclass_fields__["steps"].default
    with doing("reading --steps and --policy.optimizer_lr"):
        usual = schedule(
            float(given.get("steps", rest.get("steps", steps))), float(given.get("policy.optimizer_lr", LEARNING_RATE))
        )
    defaults = {"policy.path": given["reflow.teacher_path"], "policy.optimizer_lr": LEARNING_RATE, **usual}
    return {name: value for name, value in defaults.items() if name not in given} | _published_nowhere(given, rest)


def _published_nowhere(given: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that keep a student without a named repository out of the teacher's, which the teacher's config names."""
    if str(given.get("policy.repo_id", "")).lower() not in NOTHING:
        return {}
    for name in ("policy.push_to_hub", "save_checkpoint_to_hub"):
        if _is_true(given.get(name, rest.get(name))):
            raise ReflowError(f"--{name}=true needs --policy.repo_id, the student's own repository.")
    return {"policy.repo_id": "null", "policy.push_to_hub": "false"}


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """Flags by name, from both `--name=value` and `--name value`; the last of a name wins."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ReflowError(f"'{word}' is not a flag; write --name=value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ReflowError(f"--{name} needs a value: --{name}=...")
            value = words.pop(0)
        given[name] = value
    return given


def _at_home(value: Any) -> Any:
    """The value, or each value of a mapping, with a leading `~/` expanded; the shell leaves it alone after a `=`."""
    if isinstance(value, Mapping):
        return {name: _at_home(inner) for name, inner in value.items()}
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _flags(given: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
