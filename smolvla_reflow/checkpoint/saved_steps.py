"""The steps of a checkpoint's saved processors, read as data: nothing that they name is imported or run.

LeRobot imports whatever module a step's `class` names, and calls what it finds there with the arguments that are
written beside it. Here a step is one of LeRobot's, or of a package that the user has loaded, or it is refused.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import lerobot
from lerobot.policies.smolvla import processor_smolvla  # noqa: F401 - registers SmolVLA's own step
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.import_utils import register_third_party_plugins

from smolvla_reflow.errors import ReflowError

# Where SmolVLA's steps are defined, none of which runs code that a checkpoint names unless it is told to.
OWN_MODULES = ("lerobot.processor.", "lerobot.policies.smolvla.")
TRUST = "trust_remote_code"
NEWER = (
    f"It was saved by another LeRobot than the installed {lerobot.__version__}, most likely a newer one; install the "
    "one that saved it."
)


@dataclass(frozen=True)
class SavedStep:
    """One step of a saved processor.

    Attributes:
        file: the JSON file it stands in.
        name: by which LeRobot's overrides name it.
        type: its class.
        config: the arguments it is made with.
        state_file: the file beside the JSON that its tensors are in, if it has any.
        artifacts: folders beside the JSON, such as a tokenizer, by the argument that names each (LeRobot 0.6.2).
    """

    file: Path
    name: str
    type: type[ProcessorStep]
    config: dict[str, Any]
    state_file: str | None
    artifacts: dict[str, str]

    @property
    def state_path(self) -> Path | None:
        return self.file.parent / self.state_file if self.state_file else None

    def artifact_paths(self) -> dict[str, str]:
        """Absolute paths of the artifacts, by argument."""
        return {name: str((self.file.parent / path).absolute()) for name, path in self.artifacts.items()}


def saved_steps(file: Path, content: Mapping[str, Any]) -> list[SavedStep]:
    """The steps of a saved processor.

    Args:
        file: the JSON file.
        content: of it.

    Raises:
        ReflowError: it is no saved processor, or a step in it is unknown, would run code, or names files that are not
            there.
    """
    steps = content.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ReflowError(f"{file} is no saved processor: it holds no list of steps; copy the checkpoint again.")
    return [_read(file, step) for step in steps]


def named_files(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The files and the folders beside a saved processor that its steps need, whatever the steps are."""
    steps = content.get("steps")
    entries = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    files = [step["state_file"] for step in entries if isinstance(step.get("state_file"), str)]
    artifacts = [step["artifacts"] for step in entries if isinstance(step.get("artifacts"), dict)]
    folders = [path for by_name in artifacts for path in by_name.values() if isinstance(path, str)]
    return [name for name in files if _lies_within(name)], [name for name in folders if _lies_within(name)]


def _read(file: Path, entry: Mapping[str, Any]) -> SavedStep:
    name, registered = str(entry.get("registry_name") or entry.get("class")), "registry_name" in entry
    kind = _registered(name) if registered else _loaded(name)
    if kind is None:
        raise ReflowError(
            f"{file} names '{name}', which is no processor step of the installed LeRobot {lerobot.__version__}, nor of "
            "a package that is loaded. If a newer LeRobot saved it, install that; if a package of yours has this step, "
            "load it with --env.discover_packages_path=PACKAGE."
        )
    step = SavedStep(
        file=file,
        name=name if registered else kind.__name__,
        type=kind,
        config=_mapping(file, entry, "config"),
        state_file=entry.get("state_file"),
        artifacts=_mapping(file, entry, "artifacts"),
    )
    _check_arguments(step)
    _check_files(step)
    return step


def _registered(name: str) -> type[ProcessorStep] | None:
    if name not in ProcessorStepRegistry.list():
        register_third_party_plugins()  # the installed packages that LeRobot's own commands import at their start
    return ProcessorStepRegistry.get(name) if name in ProcessorStepRegistry.list() else None


def _loaded(path: str) -> type[ProcessorStep] | None:
    """The step of this name in a module that is loaded already, or is one of LeRobot's own for SmolVLA."""
    module, _, name = path.rpartition(".")
    if module.startswith(OWN_MODULES):
        try:
            importlib.import_module(module)
        except (ImportError, ValueError):
            return None
    # Not `getattr`, for which a module may run code of its own.
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, ProcessorStep) else None


def _mapping(file: Path, entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = entry.get(name) or {}
    if not isinstance(value, dict):
        raise ReflowError(f"{file}: the {name} of a step is no mapping; copy the checkpoint again.")
    return value


def _check_arguments(step: SavedStep) -> None:
    """Raise ReflowError for arguments that the step does not take, or that let it run code from elsewhere."""
    parameters = inspect.signature(step.type).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [name for name in step.config if name not in parameters]
    if unknown:
        raise ReflowError(f"{step.file}: the step '{step.name}' has the unknown setting '{unknown[0]}'. {NEWER}")
    module = step.type.__module__
    if TRUST in parameters:
        trusts = bool(step.config.get(TRUST, parameters[TRUST].default))
    else:  # a step of another policy's
        foreign = module.startswith("lerobot.") and not f"{module}.".startswith(OWN_MODULES)
        trusts = foreign and TRUST in inspect.getsource(sys.modules[module])
    if trusts:
        raise ReflowError(
            f"{step.file}: the step '{step.name}' runs code that it downloads or finds in the checkpoint "
            f"({TRUST}=true), and SmolVLA needs no such step; take it out."
        )


def _check_files(step: SavedStep) -> None:
    """Raise ReflowError unless the files and folders that the step names are beside it."""
    for name in [*([step.state_file] if step.state_file else []), *step.artifacts.values()]:
        if not isinstance(name, str) or not _lies_within(name):
            raise ReflowError(f"{step.file}: the step '{step.name}' names '{name}', which is not in the checkpoint.")
        if not (step.file.parent / name).exists():
            raise ReflowError(
                f"{step.file.parent} lacks {name}, which {step.file.name} names; copy the whole checkpoint again."
            )


def _lies_within(name: str) -> bool:
    """Whether a path leads nowhere but into the folder that it starts from."""
    return not any(path.is_absolute() or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name)))
