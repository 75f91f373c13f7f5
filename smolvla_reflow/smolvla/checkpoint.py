"""Find and open a SmolVLA checkpoint, or say in one sentence why it cannot be used."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, ProcessorStep
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolvla_reflow.errors import ReflowError, first_line
from smolvla_reflow.files import sha256

PREPROCESSOR_NAME = "policy_preprocessor.json"
# Prefixes of config fields about training, publishing and running a policy; `num_steps` belongs to the solver.
IRRELEVANT_TO_ACTIONS = (
    "device",
    "optimizer_",
    "scheduler_",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
    "pretrained_path",
    "load_vlm_weights",
    "compile_",
    "rtc_config",
    "use_peft",
    "freeze_",
    "train_",
    "n_action_steps",
    "num_steps",
)
# What the earlier fork wrote into a checkpoint; `smolvla_reflow.migration` takes it out.
FORK_FIELDS = ("training_mode", "teacher_model_path", "use_reflow")
TEACHER_PREFIX = "model.teacher."


class Located(NamedTuple):
    """Where a checkpoint is: its folder, and how to name it (an absolute path, or a hub id)."""

    folder: Path
    name: str


@dataclass(frozen=True)
class Checkpoint:
    """A SmolVLA checkpoint on this machine.

    Attributes:
        source: how the user named it; an absolute path if it is a folder.
        folder: where its files are.
        config: its `config.json`.
    """

    source: str
    folder: Path
    config: SmolVLAConfig

    def weights(self) -> Mapping[str, Tensor]:
        """The tensors of `model.safetensors` by name, each read when it is asked for."""
        return stored_tensors(self.folder / SAFETENSORS_SINGLE_FILE)

    def fingerprint(self) -> str:
        """SHA-256 of what its actions depend on: weights, configuration and statistics, wherever it is stored."""
        digest = sha256(self.folder / SAFETENSORS_SINGLE_FILE)
        fields = read_json(self.folder / CONFIG_NAME)
        relevant = {k: v for k, v in fields.items() if not k.startswith(IRRELEVANT_TO_ACTIONS)}
        digest.update(json.dumps(relevant, sort_keys=True).encode())
        for name, tensor in sorted(self.statistics().items()):
            digest.update(name.encode() + tensor.double().numpy().tobytes())
        return digest.hexdigest()

    def statistics(self) -> dict[str, Tensor]:
        """The normalisation statistics saved with it, e.g. `{"action.mean": ..., "action.std": ...}`."""
        if not (self.folder / PREPROCESSOR_NAME).is_file():
            raise ReflowError(
                f"The checkpoint {self.source} has no {PREPROCESSOR_NAME}, so the statistics its actions are "
                "normalised by are unknown; use a checkpoint saved by lerobot-train."
            )
        try:
            pipeline = PolicyProcessorPipeline.from_pretrained(
                self.folder,
                config_filename=PREPROCESSOR_NAME,
                overrides={"device_processor": {"device": "cpu"}},
            )
        except Exception as error:  # LeRobot's loader lets through whatever a broken file leads it to
            raise ReflowError(
                f"{self.folder / PREPROCESSOR_NAME} cannot be loaded ({first_line(error)}); copy the checkpoint again."
            ) from None
        steps = [step for step in pipeline.steps if isinstance(step, NormalizerProcessorStep)]
        return {name: tensor for step in steps for name, tensor in step.state_dict().items()}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for and kept nowhere."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        # The pages of a mapped file count as memory until it is closed.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder or hub id that `SmolVLAPolicy.save_pretrained` or `lerobot-train` wrote.

    Raises:
        ReflowError: there is no such checkpoint, or it is not a SmolVLA policy plain LeRobot would load.
    """
    folder, name = locate(source)
    fields = read_json(folder / CONFIG_NAME)
    if fields.get("type") != "smolvla":
        raise ReflowError(f"{folder} holds a policy of type '{fields.get('type')}'; only smolvla can be reflowed.")
    if not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ReflowError(f"The checkpoint {name} holds no {SAFETENSORS_SINGLE_FILE}.{_instead_of_weights(folder)}")
    weights = stored_tensors(folder / SAFETENSORS_SINGLE_FILE)
    forked = [field for field in FORK_FIELDS if field in fields]
    forked += [f"tensors {TEACHER_PREFIX}*"] * any(tensor.startswith(TEACHER_PREFIX) for tensor in weights)
    if forked:
        raise ReflowError(
            f"{name} is a checkpoint of the earlier fork (it has {', '.join(forked)}), which LeRobot refuses. Make a "
            f"stock one of it with: smolvla-reflow-migrate {name} NEW_FOLDER --write"
        )
    check_processors(folder)
    return Checkpoint(name, folder, read_config(folder))


def check_processors(folder: Path) -> None:
    """Raise ReflowError if the saved processors name anything to call that is no processor step.

    LeRobot imports and calls whatever a step's `class` names, with the arguments that are written beside it.
    """
    for path in folder.glob("policy_*processor.json"):
        steps = read_json(path).get("steps")
        for step in steps if isinstance(steps, list) else []:
            named = step.get("class") if isinstance(step, dict) else None
            if named is None:
                continue
            module, _, name = str(named).rpartition(".")
            try:
                found = getattr(importlib.import_module(module), name, None)
            except (ImportError, ValueError):
                found = None
            if not (isinstance(found, type) and issubclass(found, ProcessorStep)):
                raise ReflowError(f"{path} names '{named}', which is no processor step that is installed here.")


def locate(source: str | Path) -> Located:
    """Find a checkpoint's folder, here or on the hub.

    Raises:
        ReflowError: there is none.
    """
    path = Path(source).expanduser()
    try:
        here = path.exists()
    except (OSError, ValueError):  # too long for a path, or with a character none may have
        here = False
    if here:
        folder, name = path, str(path.resolve())
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        folder, name = _download(str(source)), str(source)
    else:
        raise ReflowError(f"There is no checkpoint at {source}: the path does not exist.")
    if not folder.is_dir():
        raise ReflowError(f"{source} is a file; name the checkpoint's folder, here {folder.parent}.")
    if not (folder / CONFIG_NAME).is_file():
        raise ReflowError(f"{source} is no checkpoint: it holds no {CONFIG_NAME}.{_suggestion(folder)}")
    return Located(folder, name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ReflowError if the file holds anything else."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ReflowError(f"{path} is not readable JSON ({error}); copy the checkpoint again.") from None
    if not isinstance(fields, dict):
        raise ReflowError(f"{path} holds no JSON object; copy the checkpoint again.")
    return fields


def read_config(folder: Path) -> SmolVLAConfig:
    """The config as the installed LeRobot reads it. Raises ReflowError if it does not."""
    path = folder / CONFIG_NAME
    try:
        config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
    except SystemExit:  # draccus leaves a wrong type of policy to argparse
        raise ReflowError(f"The installed LeRobot cannot read {path}.") from None
    except Exception as error:  # LeRobot, draccus and their converters raise whatever a value leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReflowError(f"The installed LeRobot cannot read {path}: {reason}") from None
    if not isinstance(config, SmolVLAConfig):
        raise ReflowError(f"{folder} holds a {type(config).__name__}; only smolvla can be reflowed.")
    return config


def stored_tensors(path: Path) -> StoredTensors:
    """Open a safetensors file. Raises ReflowError if it is none, or cut off."""
    try:
        return StoredTensors(path)
    except (SafetensorError, OSError) as error:
        raise ReflowError(f"The weights {path} cannot be read ({error}); copy the checkpoint again.") from None


def _download(repo_id: str) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client's errors share no base class
        raise ReflowError(
            f"There is no folder {repo_id}, and as a hub id it cannot be downloaded ({first_line(error)})."
        ) from None


def _suggestion(folder: Path) -> str:
    """Point into a training run's output folder, if that is what was named."""
    for inner in ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model"):
        if (folder / inner / CONFIG_NAME).is_file():
            return f" Did you mean {folder / inner}?"
    return ""


def _instead_of_weights(folder: Path) -> str:
    """What the folder holds in place of weights, and what to do about it."""
    if list(folder.glob("adapter_*")):
        return " It is a PEFT adapter: merge it into its base first."
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        return " Pickled weights are never loaded: have the LeRobot that wrote them save them again."
    return ""
