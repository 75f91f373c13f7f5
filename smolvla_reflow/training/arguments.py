"""Complete the command line before LeRobot reads it.

LeRobot reads `--policy.*` from the command line itself, when it loads a pretrained policy. So that is where the
conventions of a reflow run have to be written down: the student starts from the teacher, reflow's learning
rate holds where the user gave none, and the flags of the earlier fork mean what they meant there. Everything
here is a plain function from flags to flags.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.migration import rename_fork_flags
from smolvla_reflow.training.config import (
    DECAY_LR_RATIO,
    LEARNING_RATE,
    WARMUP_RATIO,
    ReflowConfig,
    ReflowTrainPipelineConfig,
)
from smolvla_reflow.training.run_folder import CONFIG, resumable_config, whole_checkpoints


@dataclass(frozen=True)
class Arguments:
    """A completed command line.

    Attributes:
        flags: for LeRobot's parser, each `--name=value`.
        chosen: what was filled in because the user gave none, by flag name.
        typed: names of the flags that stood on the command line itself.
        resume: whether the run continues an earlier one, whose configuration then holds.
        config_file: the temporary copy of the user's config file that `flags` name; for the caller to delete.
    """

    flags: list[str]
    chosen: dict[str, Any]
    typed: frozenset[str]
    resume: bool = False
    config_file: Path | None = None


def complete(argv: Sequence[str]) -> Arguments:
    """Complete the user's command line (without the program's name).

    Raises:
        ReflowError: no teacher or no dataset is named, or flags contradict each other.
    """
    given = _parse(argv)
    typed = frozenset(given)
    if _is_true(given.get("resume")):
        if "config_path" not in given:
            raise ReflowError("--resume=true needs --config_path=.../pretrained_model/train_config.json.")
        given["config_path"] = _resume_from(Path(given["config_path"]))
        return Arguments(_flags(given), {}, typed, resume=True)

    file, rest = _read_config_file(given.pop("config_path", None))
    given = rename_fork_flags({**file, **given})
    _check_reflow_names(given)

    teacher = given.get("reflow.teacher_path")
    if not teacher:
        raise ReflowError(
            "Name the teacher, the SmolVLA checkpoint to reflow: --reflow.teacher_path=.../pretrained_model."
        )
    if "dataset.repo_id" not in given and not (rest.get("dataset") or {}).get("repo_id"):
        raise ReflowError("Name the dataset the teacher was trained on: --dataset.repo_id=... (--dataset.root=...).")
    kind = given.pop("policy.type", "smolvla")
    if kind != "smolvla":
        raise ReflowError(f"--policy.type={kind} cannot be reflowed, only smolvla can.")
    if "policy.pretrained_path" in given:  # another way of saying the same, which LeRobot would let lose
        given.setdefault("policy.path", given.pop("policy.pretrained_path"))
    chosen = _choose(given, rest)
    flags = _flags({**given, **chosen})
    if not rest:
        return Arguments(flags, chosen, typed)
    config_file = _write_config(rest)
    return Arguments([f"--config_path={config_file}", *flags], chosen, typed, config_file=config_file)


def _resume_from(config_path: Path) -> str:
    """The config of a checkpoint that is whole."""
    found = resumable_config(config_path)
    if found is not None:
        return str(found)
    if not config_path.exists():
        raise ReflowError(f"--config_path={config_path} does not exist.")
    newest = next(whole_checkpoints(config_path.parent.parent.parent.parent), None)
    raise ReflowError(
        f"--config_path={config_path} does not belong to a whole checkpoint, with training_state and all. "
        + (f"The newest whole one of that run is --config_path={newest / CONFIG}." if newest else "That run has none.")
    )


def _check_reflow_names(given: dict[str, Any]) -> None:
    known = [f"--reflow.{field}" for field in ReflowConfig.__dataclass_fields__]
    for flag in (f"--{name}" for name in given if name.startswith("reflow.")):
        if flag not in known:
            raise ReflowError(f"{flag} is unknown; {known_are(known, flag)} See --help.")


def _choose(given: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """What a reflow run uses where the user gave nothing."""
    fields = ReflowTrainPipelineConfig.__dataclass_fields__
    steps = _number("steps", given.get("steps", rest.get("steps", fields["steps"].default)))
    lr = _number("policy.optimizer_lr", given.get("policy.optimizer_lr", LEARNING_RATE))
    defaults = {
        "policy.path": given["reflow.teacher_path"],
        "policy.optimizer_lr": LEARNING_RATE,
        "policy.scheduler_decay_lr": lr * DECAY_LR_RATIO,
        "policy.scheduler_warmup_steps": round(steps * WARMUP_RATIO),
        "policy.scheduler_decay_steps": round(steps),
    }
    if "policy.repo_id" not in given:
        if _is_true(given.get("policy.push_to_hub")):
            raise ReflowError("--policy.push_to_hub=true needs --policy.repo_id, the student's own repository.")
        # The teacher's config may name the teacher's repository; the student must not overwrite it.
        defaults["policy.push_to_hub"] = "false"
    return {name: value for name, value in defaults.items() if name not in given}


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


def _flags(given: dict[str, Any]) -> list[str]:
    return [f"--{name}={_text(value)}" for name, value in given.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ReflowError(f"--{name}={value} is not a number.") from None


def _read_config_file(path: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a YAML or JSON config into policy and reflow fields, as flags by name, and the rest as it is.

    LeRobot loads a pretrained policy's config from the policy's folder and overrides it from the command
    line alone, so the file's `policy:` section has to become flags to have any effect.
    """
    if path is None:
        return {}, {}
    try:
        rest = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ReflowError(f"--config_path={path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReflowError(f"--config_path={path} cannot be read as YAML or JSON: {error}") from None
    if not isinstance(rest, dict):
        raise ReflowError(f"--config_path={path} holds no configuration.")
    sections = {name: rest.pop(name, None) or {} for name in ("policy", "reflow")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ReflowError(f"--config_path={path}: '{name}' should be a section with fields.")
    # In a train_config.json this is where the *teacher's* training started from.
    sections["policy"].pop("pretrained_path", None)
    flags = {
        f"{name}.{field}": value
        for name, section in sections.items()
        for field, value in section.items()
        if value is not None
    }
    return flags, rest


def _write_config(rest: dict[str, Any]) -> Path:
    # LeRobot 0.4 reads every config file as JSON.
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="reflow_config_", delete=False) as file:
        json.dump(rest, file)
    return Path(file.name)
