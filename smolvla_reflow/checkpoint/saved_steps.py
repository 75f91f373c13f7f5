"""The steps of a checkpoint's saved processors, read as data.

LeRobot imports any module that a step's `class` names, and calls what it finds in it with the saved arguments. This
module accepts steps of LeRobot's for SmolVLA, and steps of packages that the user has loaded. It refuses all others.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard

from lerobot.policies.smolvla import processor_smolvla  # noqa: F401 - registers SmolVLA's own step
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.import_utils import register_third_party_plugins

from smolvla_reflow.compat import installed
from smolvla_reflow.errors import ReflowError, doing

# Modules of LeRobot with the steps of a SmolVLA. Other policies' steps may run code that a checkpoint names.
OWN_MODULES = ("lerobot.processor.", "lerobot.policies.smolvla.")
TRUST = "trust_remote_code"


@dataclass(frozen=True)
class SavedStep:
    """One step of a saved processor: its name in LeRobot's overrides, its class, and the arguments of the class.

    `state_file` is the safetensors file with its tensors. `artifacts` are folders in the checkpoint, such as a
    tokenizer, by argument (LeRobot 0.6.2).
    """

    name: str
    type: type[ProcessorStep]
    config: dict[str, Any]
    state_file: Path | None
    artifacts: dict[str, str]


def saved_steps(file: Path, content: Mapping[str, Any]) -> list[SavedStep]:
    """Read the steps of the processor saved in `file`; `content` is its JSON. Raises ReflowError for an unsafe step."""
    with doing(f"reading the steps of {file}"):
        return [_read(file, entry) for entry in content["steps"]]


def named_files(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The files and the folders in a checkpoint that the steps of a saved processor name."""
    steps = content.get("steps")
    entries = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    artifacts = [step["artifacts"] for step in entries if isinstance(step.get("artifacts"), dict)]
    files = [step.get("state_file") for step in entries]
    folders = [name for by_argument in artifacts for name in by_argument.values()]
    return [name for name in files if _lies_within(name)], [name for name in folders if _lies_within(name)]


def _read(file: Path, entry: Mapping[str, Any]) -> SavedStep:
    registered = "registry_name" in entry
    name = str(entry["registry_name"] if registered else entry["class"])
    kind = _registered(name) if registered else _loaded(name)
    if kind is None or (kind.__module__.startswith("lerobot.") and not kind.__module__.startswith(OWN_MODULES)):
        raise ReflowError(
            f"{file} names '{name}', which is no processor step of SmolVLA in {installed()}. If a "
            "package of yours has it, load the package with --env.discover_packages_path=PACKAGE."
        )
    config, artifacts, state_file = entry.get("config") or {}, entry.get("artifacts") or {}, entry.get("state_file")
    trusts = inspect.signature(kind).parameters.get(TRUST)
    if config.get(TRUST, trusts is not None and trusts.default):
        raise ReflowError(
            f"{file}: the step '{name}' runs code that it downloads or finds in the checkpoint ({TRUST}=true). SmolVLA "
            "needs no such step; take it out."
        )
    for path in (*([state_file] if state_file else []), *artifacts.values()):
        if not _lies_within(path) or not (file.parent / path).exists():
            raise ReflowError(f"{file}: the step '{name}' names '{path}', which is not in the checkpoint.")
    return SavedStep(
        name=name if registered else kind.__name__,
        type=kind,
        config=dict(config),
        state_file=file.parent / state_file if state_file else None,
        artifacts={argument: str((file.parent / path).absolute()) for argument, path in artifacts.items()},
    )


def _registered(name: str) -> type[ProcessorStep] | None:
    if name not in ProcessorStepRegistry.list():
        register_third_party_plugins()  # the installed packages that LeRobot's own commands import when they start
    return ProcessorStepRegistry.get(name) if name in ProcessorStepRegistry.list() else None


def _loaded(path: str) -> type[ProcessorStep] | None:
    """The step of this name in a loaded module, or in LeRobot's modules for SmolVLA."""
    module, _, name = path.rpartition(".")
    if module.startswith(OWN_MODULES):
        importlib.import_module(module)
    # Reading the attribute with getattr could run code of the module.
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, ProcessorStep) else None


def _lies_within(name: object) -> TypeGuard[str]:
    """True if this is a relative path that stays in the folder where it starts."""
    paths = (PurePosixPath(name), PureWindowsPath(name)) if isinstance(name, str) else ()
    return bool(paths) and not any(path.is_absolute() or ".." in path.parts for path in paths)
