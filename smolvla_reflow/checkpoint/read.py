"""Find a SmolVLA checkpoint in a folder or on the hub, and read its JSON files once."""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import NormalizerProcessorStep
from torch import Tensor

from smolvla_reflow.checkpoint.adapter import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    adapter_digest,
    check_adapter,
    merge_command,
)
from smolvla_reflow.checkpoint.backbone import tokenizer_or_none
from smolvla_reflow.checkpoint.fork.marks import refuse_forked
from smolvla_reflow.checkpoint.run_folder import TRAIN_CONFIG_NAME, find_config
from smolvla_reflow.checkpoint.saved_steps import SavedStep, named_files, saved_steps
from smolvla_reflow.checkpoint.tensors import StoredTensors
from smolvla_reflow.compat import installed
from smolvla_reflow.errors import ReflowError, doing, sha256

PREPROCESSOR_NAME = "policy_preprocessor.json"
POSTPROCESSOR_NAME = "policy_postprocessor.json"
PROCESSORS = (PREPROCESSOR_NAME, POSTPROCESSOR_NAME)
TOKENIZER_STEP = "tokenizer_processor"
# The files at the top of a repository that LeRobot reads. The repository may hold the checkpoints of a whole run.
POLICY_FILES = [CONFIG_NAME, TRAIN_CONFIG_NAME, SAFETENSORS_SINGLE_FILE, "policy_*processor*"]
FILES_ON_HUB = [*POLICY_FILES, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME]
# Prefixes of config fields that actions do not depend on; `num_steps` belongs to the solver.
OF_TRAINING = ("optimizer_", "scheduler_", "freeze_", "train_", "use_peft", "load_vlm_weights")
OF_PUBLISHING = ("push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path")
OF_RUNNING = ("device", "compile_", "rtc_config", "n_action_steps", "num_steps")
IRRELEVANT_TO_ACTIONS = (*OF_TRAINING, *OF_PUBLISHING, *OF_RUNNING)
# LeRobot 0.3 kept the statistics among the weights. Converted checkpoints may still have them there.
STATISTICS_AMONG_WEIGHTS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


class Location(NamedTuple):
    """A checkpoint's folder, its name for messages (an absolute path or a hub id), and its commit on the hub."""

    folder: Path
    source: str
    commit: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A SmolVLA checkpoint on this machine."""

    source: str  # an absolute path, or a hub id
    folder: Path
    config: SmolVLAConfig  # with this machine's backbone; `use_peft` is false, since adapters are merged
    commit: str | None = None  # on the hub
    tokenizer: str | None = None  # folder or hub id on this machine; None if the preprocessor has no tokenizer
    base: Location | None = None  # the checkpoint that an adapter was trained on
    processors: Mapping[str, Sequence[SavedStep]] = field(default_factory=dict)  # the steps, by file name

    @property
    def weights_file(self) -> Path:
        """Its `model.safetensors`; of an adapter, its base's."""
        return (self.base or self).folder / SAFETENSORS_SINGLE_FILE

    def fingerprint(self) -> str:
        """SHA-256 of everything its actions depend on: weights, configuration and statistics."""
        digest = sha256(self.weights_file)
        if self.base is not None:
            digest.update(adapter_digest(self.folder, read_json(self.folder / ADAPTER_CONFIG_NAME)))
        fields = read_json(self.folder / CONFIG_NAME)
        relevant = {k: v for k, v in fields.items() if not k.startswith(IRRELEVANT_TO_ACTIONS)}
        digest.update(json.dumps(relevant, sort_keys=True).encode())
        for name, tensor in sorted(self.statistics().items()):
            digest.update(name.encode() + tensor.double().numpy().tobytes())
        return digest.hexdigest()

    def statistics(self) -> dict[str, Tensor]:
        """The normalisation statistics saved with it, e.g. `{"action.mean": ..., "action.std": ...}`."""
        steps = self.processor_steps(PREPROCESSOR_NAME)
        files = [step.state_file for step in steps if issubclass(step.type, NormalizerProcessorStep)]
        return {name: tensor.float() for file in files if file for name, tensor in StoredTensors(file).items()}

    def processor_steps(self, processor: str) -> Sequence[SavedStep]:
        """The steps of one of its processors. Raises ReflowError if it has no such processor."""
        if processor not in self.processors:
            raise ReflowError(
                f"The checkpoint {self.source} has no {processor}, so the statistics of its actions are unknown. Use a "
                "checkpoint saved by lerobot-train, or convert one of LeRobot 0.3 with: python -m "
                f"lerobot.processor.migrate_policy_normalization --pretrained-path {self.source}"
                + (f" --revision {self.commit}" if self.commit else "")
            )
        return self.processors[processor]

    def noted(self, section: str) -> dict[str, Any]:
        """A section of the configuration of the run that made it, "reflow" or "dataset"; empty if there is none."""
        file = self.folder / TRAIN_CONFIG_NAME
        return (read_json(file).get(section) or {}) if file.is_file() else {}

    def cited(self) -> str:
        """Its name, with the commit if it has one."""
        return f"{self.source} at {self.commit}" if self.commit else self.source


def open_checkpoint(source: str | Path, revision: str | None = None, backbone: str | None = None) -> Checkpoint:
    """Open a checkpoint that `SmolVLAPolicy.save_pretrained` or `lerobot-train`, also with `--peft.*`, wrote.

    Args:
        source: the folder or hub id.
        revision: of a hub id, a branch, tag or commit; its main branch if None.
        backbone: folder or hub id of the vision-language backbone, if it is not where the checkpoint says.
    """
    location = locate(source, revision)
    if (location.folder / ADAPTER_CONFIG_NAME).is_file() and not (location.folder / SAFETENSORS_SINGLE_FILE).is_file():
        return _read(location, backbone, _base_of(location))
    _check_weights(location)
    return _read(location, backbone)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint without looking at its weights. Raises ReflowError if its JSON files cannot be used."""
    return _read(locate(source))


def locate(source: str | Path, revision: str | None = None) -> Location:
    """Find a checkpoint's folder on this machine, or download it from the hub. Raises ReflowError if there is none."""
    path = Path(source).expanduser()
    if not may_be_hub_id(str(source)) or path.is_dir():
        path = _policy_in(path)
    if os.path.exists(path):  # unlike `Path.exists`, false for a name that is too long or has a null character
        if revision is not None:
            raise ReflowError(f"{source} is a folder, so the revision {revision} has no effect; leave it out.")
        location = Location(path, str(path.resolve()))
    elif may_be_hub_id(str(source)):
        folder = _download(str(source), revision)
        location = Location(folder, str(source), commit=folder.name)
    else:
        raise ReflowError(f"There is no checkpoint at {source}: the path does not exist.")
    if not (location.folder / CONFIG_NAME).is_file():
        raise ReflowError(
            f"{source} is no checkpoint: it holds no {CONFIG_NAME}. Name a folder such as "
            "RUN/checkpoints/last/pretrained_model."
        )
    return location


def _policy_in(path: Path) -> Path:
    """The policy's folder that a path means: itself, or the newest one of a training run."""
    with contextlib.suppress(OSError, ValueError):  # a name that is too long or has a null character
        if not (path / CONFIG_NAME).is_file():
            newest = find_config(path).parent
            return newest if (newest / CONFIG_NAME).is_file() else path
    return path


def may_be_hub_id(name: str) -> bool:
    """True if a name has the form of a repository's id, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ReflowError if the file is missing or holds anything else."""
    with doing(f"reading {path}"):
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise TypeError("it holds no JSON object")
    return fields


def read_config(folder: Path) -> SmolVLAConfig:
    """The config as the installed LeRobot reads it. Raises ReflowError if LeRobot cannot, or it is not SmolVLA's."""
    with doing(f"reading {folder / CONFIG_NAME} with {installed()}"):
        try:
            config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        except SystemExit:  # how draccus reports an unknown type of policy
            raise ValueError("unknown type of policy") from None
    if not isinstance(config, SmolVLAConfig):
        raise ReflowError(f"{folder} holds a policy of type '{config.type}'; only smolvla can be reflowed.")
    return config


def _base_of(adapter: Location) -> Location:
    """The checkpoint that an adapter was trained on, found where LeRobot looks for it."""
    file = adapter.folder / ADAPTER_CONFIG_NAME
    fields = read_json(file)
    check_adapter(adapter.source, adapter.folder, fields)
    named = str(fields.get("base_model_name_or_path"))
    try:
        base = locate(named, None if os.path.exists(named) else fields.get("revision"))
        _check_weights(base)
    except ReflowError as error:
        raise ReflowError(
            f"The adapter {adapter.source} needs the base that base_model_name_or_path={named} names in {file}: {error}"
        ) from None
    return base


def _check_weights(location: Location) -> None:
    """Raise ReflowError unless the checkpoint holds weights, and LeRobot would load no others."""
    folder, source, _ = location
    if not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ReflowError(
            f"The checkpoint {source} holds no {SAFETENSORS_SINGLE_FILE}. Pickled weights are never loaded; "
            f"lerobot-convert-dcp --checkpoint_dir={folder} makes one file of weights in shards."
        )
    fields = read_json(folder / CONFIG_NAME)
    refuse_forked(source, fields, StoredTensors(folder / SAFETENSORS_SINGLE_FILE))
    if fields.get("use_peft") and (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ReflowError(
            f"{source} holds an adapter, which LeRobot would load, beside a {SAFETENSORS_SINGLE_FILE}. If the adapter "
            f"is merged into these weights, remove the adapter_* files. If not, remove {SAFETENSORS_SINGLE_FILE} and "
            f"merge the adapter with: {merge_command(source)}"
        )


def _read(location: Location, backbone: str | None = None, base: Location | None = None) -> Checkpoint:
    """Read the configuration and the processors of a checkpoint."""
    folder, source, commit = location
    processors = {
        name: saved_steps(folder / name, read_json(folder / name)) for name in PROCESSORS if (folder / name).is_file()
    }
    config = read_config(folder)
    config.use_peft = False
    tokenizer = _tokenizer(processors.get(PREPROCESSOR_NAME, ()), config.vlm_model_name, backbone)
    config.vlm_model_name = backbone or config.vlm_model_name
    return Checkpoint(source, folder, config, commit, tokenizer, base, processors)


def _tokenizer(steps: Sequence[SavedStep], saved_backbone: str, backbone: str | None) -> str | None:
    """Folder or hub id of the tokenizer: in the checkpoint, where the saved step says, or with the given backbone."""
    for step in steps:
        if step.name == TOKENIZER_STEP:
            name = step.artifacts.get("tokenizer_name") or step.config.get("tokenizer_name")
            if backbone is None or "tokenizer_name" in step.artifacts:
                return name
            return backbone if name == saved_backbone or tokenizer_or_none(name) is None else name
    return None


def _download(repo_id: str, revision: str | None) -> Path:
    """Download a checkpoint from the hub; returns its folder, whose name is the commit."""
    at = f" (revision {revision})" if revision else ""
    with doing(f"downloading {repo_id}{at} from the hub, since there is no such folder"):
        folder = _snapshot(repo_id, revision, FILES_ON_HUB)
        found = [folder / name for name in PROCESSORS if (folder / name).is_file()]
        inner = [f"{escape(name)}/*" for file in found for name in named_files(read_json(file))[1]]
        if inner:
            _snapshot(repo_id, folder.name, inner)
    return folder


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a commit in the hub's cache, with the files of these patterns."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except HfHubHTTPError:  # the hub's own answer, such as an unknown revision
        raise
    except Exception:
        # Without a network, huggingface_hub 1 does not look for a commit in its own cache.
        with contextlib.suppress(Exception):
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        raise
