"""Complete the command line before LeRobot reads it.

LeRobot reads `--policy.*` from the command line itself, when it loads a pretrained policy. So that is where the
conventions of a reflow run have to be written down: the student starts from the teacher, reflow's learning
rate holds where the user gave none, and the flags of the earlier fork mean what they meant there. Everything
here is a plain function from flags to flags.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lerobot

from smolvla_reflow.checkpoint.fork.migration import rename_fork_flags
from smolvla_reflow.checkpoint.read import may_be_hub_id
from smolvla_reflow.compat import resumes_from_hub
from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.losses import get_loss_strategy, is_file_strategy
from smolvla_reflow.training.config import LEARNING_RATE, RECIPE, ReflowConfig, ReflowTrainPipelineConfig
from smolvla_reflow.training.inherited import Inherited, inherit, schedule
from smolvla_reflow.training.run_folder import resumable_config

NOTHING = ("", "null", "none")


@dataclass(frozen=True)
class Arguments:
    """A completed command line.

    Attributes:
        flags: for LeRobot's parser, each `--name=value`.
        chosen: what was filled in because the user gave none, by flag name.
        typed: names of the flags that stood on the command line itself.
        resume: whether the run continues an earlier one, whose configuration then holds.
        hub_id: the repository that LeRobot downloads the earlier run's last checkpoint from, if it is not here.
        config_file: the temporary copy of the user's config file that `flags` name; for the caller to delete.
    """

    flags: list[str]
    chosen: dict[str, Any]
    typed: frozenset[str]
    resume: bool = False
    hub_id: str | None = None
    config_file: Path | None = None


def complete(argv: Sequence[str]) -> Arguments:
    """Complete the user's command line (without the program's name).

    Raises:
        ReflowError: no teacher or no dataset is named, there is no such run to resume, or flags contradict each other.
    """
    given = _at_home(_parse(argv))
    typed = frozenset(given)
    _check_names(given)
    if _is_true(given.get("resume")):
        return _resumed(given, typed)

    path = given.pop("config_path", None)
    file = inherit(path, given) if path else Inherited()
    rest = _at_home(file.rest)
    given = _at_home({**file.flags, **rename_fork_flags(given)})
    if rest.get("reward_model"):
        raise ReflowError(f"--config_path={path} trains a reward model, and only a smolvla policy can be reflowed.")
    if not given.get("reflow.teacher_path"):
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
    chosen = _choose(given, rest, typed)
    flags = _flags({**given, **chosen})
    if not rest:
        return Arguments(flags, chosen, typed)
    config_file = _write_config(rest)
    return Arguments([f"--config_path={config_file}", *flags], chosen, typed, config_file=config_file)


def _resumed(given: Mapping[str, Any], typed: frozenset[str]) -> Arguments:
    """The command line that resumes a run, which goes on with its own configuration and weights."""
    if not given.get("config_path"):
        raise ReflowError("--resume=true needs --config_path=..., the run's folder or one of its checkpoints.")
    for name in ("policy.path", "policy.pretrained_path"):
        if name in given:
            raise ReflowError(f"--{name} is for a new run; a resumed one goes on with its own weights. Leave it out.")
    path, hub_id = given["config_path"], None
    if _is_on_hub(path):
        if not resumes_from_hub():
            raise ReflowError(
                f"--config_path={path} does not exist, and LeRobot {lerobot.__version__} says of a hub id that "
                "resuming from the hub is not supported; download the checkpoint with its training_state, and name "
                "its folder."
            )
        hub_id = path
    else:
        path = str(resumable_config(Path(path)))
    return Arguments(_flags({**given, "config_path": path}), {}, typed, resume=True, hub_id=hub_id)


def _is_on_hub(path: str) -> bool:
    """Whether a path is not here, and may be the id of a repository."""
    return not Path(path).exists() and not Path(path).parent.exists() and may_be_hub_id(path)


def _check_names(given: Mapping[str, Any]) -> None:
    """Raise ReflowError for flags of this package that do not exist, and of LeRobot that train something else."""
    known = [f"--reflow.{field}" for field in ReflowConfig.__dataclass_fields__]
    for flag in (f"--{name}" for name in given if name.startswith("reflow.")):
        if flag not in known:
            raise ReflowError(f"{flag} is unknown; {known_are(known, flag)} See --help.")
    if any(name.startswith("reward_model") for name in given):
        raise ReflowError("--reward_model trains a reward model, and only a smolvla policy can be reflowed.")


def _choose(given: Mapping[str, Any], rest: Mapping[str, Any], typed: frozenset[str]) -> dict[str, Any]:
    """What a reflow run uses where the user gave nothing."""
    fields = ReflowTrainPipelineConfig.__dataclass_fields__
    steps = _number("steps", given.get("steps", rest.get("steps", fields["steps"].default)))
    lr = _number("policy.optimizer_lr", given.get("policy.optimizer_lr", LEARNING_RATE))
    defaults = {
        "policy.path": given["reflow.teacher_path"],
        "policy.optimizer_lr": LEARNING_RATE,
        **schedule(steps, lr),
        **_recipe(given, typed),
    }
    return {name: value for name, value in defaults.items() if name not in given} | _published_nowhere(given, rest)


def _recipe(given: Mapping[str, Any], typed: frozenset[str]) -> dict[str, Any]:
    """The recipe of a reflow run, as far as it has an effect on its loss."""
    strategy = given.get("reflow.strategy", ReflowConfig.strategy)
    if is_file_strategy(strategy) and "reflow.strategy" not in typed:  # a file to run that a config file names, no user
        return {}
    try:
        unused = get_loss_strategy(strategy).unused
    except ReflowError:  # there is no such loss, which is said later
        return {}
    chosen: dict[str, Any] = {"padding_weight": RECIPE.padding_weight}
    if not _number("reflow.real_data_ratio", given.get("reflow.real_data_ratio", 0)):
        # Recorded rows have LeRobot's own loss, and would not have their share of the gradient beside a weighed one.
        chosen["weighting"] = RECIPE.weighting
    return {f"reflow.{name}": value for name, value in chosen.items() if name not in unused}


def _published_nowhere(given: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What keeps the student out of the repository that the teacher's config names, unless it has one of its own."""
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


def _at_home(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with `~/` at the start of a value as the home folder, which the shell leaves after a `=`."""

    def expanded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _at_home(value)
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    return {name: expanded(value) for name, value in given.items()}


def _flags(given: Mapping[str, Any]) -> list[str]:
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


def _write_config(rest: Mapping[str, Any]) -> Path:
    # LeRobot 0.4 reads every config file as JSON.
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="reflow_config_", delete=False) as file:
        json.dump(rest, file)
    return Path(file.name)
