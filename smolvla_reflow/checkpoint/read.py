"""Find and open a SmolVLA checkpoint, or say in one sentence why it cannot be used."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import NormalizerProcessorStep
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolvla_reflow.checkpoint.adapter import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    adapter_digest,
    check_adapter,
    merge_command,
)
from smolvla_reflow.checkpoint.backbone import load_tokenizer
from smolvla_reflow.checkpoint.saved_steps import NEWER, SavedStep, named_files, saved_steps
from smolvla_reflow.errors import ReflowError, in_one_line, sha256

PREPROCESSOR_NAME = "policy_preprocessor.json"
POSTPROCESSOR_NAME = "policy_postprocessor.json"
TRAIN_CONFIG_NAME = "train_config.json"
TOKENIZER_STEP = "tokenizer_processor"
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
# What the earlier fork wrote into a checkpoint; `smolvla_reflow.checkpoint.fork.migration` takes it out.
FORK_FIELDS = ("training_mode", "teacher_model_path", "use_reflow")
TEACHER_PREFIX = "model.teacher."
# Where LeRobot had the statistics before it had processors.
STATISTICS_AMONG_WEIGHTS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


class Located(NamedTuple):
    """Where a checkpoint is: its folder, how to name it (an absolute path, or a hub id), and its commit on the hub."""

    folder: Path
    name: str
    commit: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A SmolVLA checkpoint on this machine.

    Attributes:
        source: how the user named it; an absolute path if it is a folder.
        folder: where its files are.
        config: its `config.json`, with the backbone that is used here, and of an adapter as of a whole policy.
        commit: of a checkpoint on the hub.
        tokenizer: the folder or hub id that instructions are tokenised from here; None if its processors name none.
        base: of an adapter, the checkpoint with the weights that it was trained on.
    """

    source: str
    folder: Path
    config: SmolVLAConfig
    commit: str | None = None
    tokenizer: str | None = None
    base: Located | None = None

    @property
    def weights_file(self) -> Path:
        """Its `model.safetensors`; of an adapter, its base's."""
        return (self.base or self).folder / SAFETENSORS_SINGLE_FILE

    def weights(self) -> Mapping[str, Tensor]:
        """Its policy's tensors by name, each read when it is asked for; of an adapter, all of the merged policy.

        Raises:
            ReflowError: they cannot be read, or the adapter not be merged.
        """
        if self.base is None:
            return stored_tensors(self.weights_file)
        from smolvla_reflow.checkpoint.load import load_policy  # which loads what is opened here

        return load_policy(self, "cpu").state_dict()

    def fingerprint(self) -> str:
        """SHA-256 of what its actions depend on: weights, configuration and statistics, wherever it is stored."""
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
        steps = self.steps(PREPROCESSOR_NAME)
        files = [step.state_path for step in steps if issubclass(step.type, NormalizerProcessorStep)]
        return {name: tensor.float() for file in files if file for name, tensor in stored_tensors(file).items()}

    def steps(self, processor: str) -> list[SavedStep]:
        """The steps of one of its processors. Raises ReflowError if it has none, or they cannot be used."""
        file = self.folder / processor
        if not file.is_file():
            raise ReflowError(
                f"The checkpoint {self.source} has no {processor}, so the statistics its actions are normalised by "
                "are unknown; use a checkpoint saved by lerobot-train."
            )
        return saved_steps(file, read_json(file))

    def cited(self) -> str:
        """Its name, with the commit if it has one."""
        return f"{self.source} at {self.commit}" if self.commit else self.source


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


def open_checkpoint(source: str | Path, revision: str | None = None, backbone: str | None = None) -> Checkpoint:
    """Open a folder or hub id that `SmolVLAPolicy.save_pretrained` or `lerobot-train`, also with `--peft.*`, wrote.

    Args:
        source: the folder or hub id.
        revision: of a hub id, a branch, tag or commit; its main branch if None.
        backbone: folder or hub id of the vision-language backbone, if it is not where the checkpoint says.

    Raises:
        ReflowError: there is no such checkpoint, or it is not a SmolVLA policy plain LeRobot would load.
    """
    located = locate(source, revision)
    fields = _fields(located)
    base = None
    if _is_adapter(located.folder) and fields.get("use_peft"):
        base = _base_of(located)
    else:
        _check_weights(located, fields)
    return _described(located, backbone, base)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint without its weights, of which an adapter's has only a part.

    Raises:
        ReflowError: its configuration or processors cannot be used.
    """
    located = locate(source)
    _fields(located)
    return _described(located)


def locate(source: str | Path, revision: str | None = None) -> Located:
    """Find a checkpoint's folder, here or on the hub, from where the files that LeRobot reads are downloaded.

    Raises:
        ReflowError: there is none.
    """
    path = Path(source).expanduser()
    try:
        here = path.exists()
    except (OSError, ValueError):  # too long for a path, or with a character none may have
        here = False
    if here and revision is not None:
        raise ReflowError(f"{source} is here, not on the hub, so the revision {revision} has no effect; leave it out.")
    if here:
        located = Located(path, str(path.resolve()))
    elif may_be_hub_id(str(source)):
        folder = _download(str(source), revision)
        located = Located(folder, str(source), commit=folder.name)
    else:
        raise ReflowError(f"There is no checkpoint at {source}: the path does not exist.")
    folder = located.folder
    if not folder.is_dir():
        raise ReflowError(f"{source} is a file; name the checkpoint's folder, here {folder.parent}.")
    if not (folder / CONFIG_NAME).is_file():
        raise ReflowError(f"{source} is no checkpoint: it holds no {CONFIG_NAME}.{_suggestion(folder)}")
    return located


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's id, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


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
        reason = in_one_line(error) or type(error).__name__
        unknown = read_json(path).keys() - SmolVLAConfig.__dataclass_fields__.keys() - {"type"}
        raise ReflowError(
            f"The installed LeRobot cannot read {path}: {reason}" + f". {NEWER}" * bool(unknown)
        ) from None
    if not isinstance(config, SmolVLAConfig):
        raise ReflowError(f"{folder} holds a {type(config).__name__}; only smolvla can be reflowed.")
    return config


def stored_tensors(path: Path) -> StoredTensors:
    """Open a safetensors file. Raises ReflowError if it is none, or cut off."""
    try:
        return StoredTensors(path)
    except (SafetensorError, OSError) as error:
        raise ReflowError(f"The weights {path} cannot be read ({error}); copy the checkpoint again.") from None


def _fields(located: Located) -> dict[str, Any]:
    """The checkpoint's `config.json` as it stands. Raises ReflowError if it is not a SmolVLA's."""
    fields = read_json(located.folder / CONFIG_NAME)
    if fields.get("type") != "smolvla":
        kind = fields.get("type")
        raise ReflowError(f"{located.folder} holds a policy of type '{kind}'; only smolvla can be reflowed.")
    return fields


def _is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds an adapter alone, and no whole policy."""
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / SAFETENSORS_SINGLE_FILE).is_file()


def _base_of(adapter: Located) -> Located:
    """The checkpoint that an adapter was trained on, found where and as LeRobot looks for it.

    Older LeRobots leave out the revision, which is that of the base that the adapter was trained on.

    Raises:
        ReflowError: the adapter cannot be loaded, its base is not here, or is no whole SmolVLA.
    """
    file = adapter.folder / ADAPTER_CONFIG_NAME
    fields = read_json(file)
    check_adapter(adapter.name, adapter.folder, fields)
    named, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not named:
        raise ReflowError(f"{file} names no base (base_model_name_or_path), so LeRobot cannot load it either; add it.")
    try:
        base = locate(named, None if Path(named).exists() else revision)
        base_fields = _fields(base)
        if not _is_adapter(base.folder):
            _check_weights(base, base_fields)
    except ReflowError as error:
        raise ReflowError(
            f"The adapter {adapter.name} needs the base that it was trained on, named as {named} in its "
            f"{ADAPTER_CONFIG_NAME}: {error} If it is somewhere else, write that into base_model_name_or_path there"
            + (", or run this in the folder that the path starts from." if _is_relative(named) else ".")
        ) from None
    if _is_adapter(base.folder):
        raise ReflowError(
            f"The base {named} that {file} names is an adapter too, which LeRobot does not load as a base. LeRobot 0.4 "
            "writes that when it resumes an adapter, which it begins anew then; write that one's own base there, "
            f"{read_json(base.folder / ADAPTER_CONFIG_NAME).get('base_model_name_or_path')}."
        )
    return base


def _is_relative(name: str) -> bool:
    return not Path(name).expanduser().is_absolute()


def _check_weights(located: Located, fields: Mapping[str, Any]) -> None:
    """Raise ReflowError unless the checkpoint holds weights that the installed LeRobot would load."""
    folder, name = located.folder, located.name
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
    before_processors = any(tensor.startswith(STATISTICS_AMONG_WEIGHTS) for tensor in weights)
    if before_processors and not (folder / PREPROCESSOR_NAME).is_file():
        revision = f" --revision {located.commit}" if located.commit else ""
        raise ReflowError(
            f"{name} was saved by LeRobot 0.3 or an earlier one, with its statistics among the weights. LeRobot's own "
            "tool writes a new one beside it: python -m lerobot.processor.migrate_policy_normalization "
            f"--pretrained-path {name}{revision}"
        )
    if fields.get("use_peft") and (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ReflowError(
            f"{name} holds an adapter, which LeRobot would load, beside a {SAFETENSORS_SINGLE_FILE}. If the adapter is "
            f"merged into that, take the adapter_* files out; if not, take out {SAFETENSORS_SINGLE_FILE}, or merge the "
            f"adapter then with: {merge_command(name)}"
        )


def _described(located: Located, backbone: str | None = None, base: Located | None = None) -> Checkpoint:
    """The checkpoint with its configuration and processors read, but not its weights."""
    folder, name, commit = located
    by_file = {
        file: saved_steps(folder / file, read_json(folder / file))
        for file in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME)
        if (folder / file).is_file()
    }
    config = read_config(folder)
    # An adapter is merged here, and what LeRobot notes for it is still there when it had been before.
    config.use_peft = False
    tokenizer = _tokenizer(by_file.get(PREPROCESSOR_NAME, []), config.vlm_model_name, backbone)
    if backbone is not None:
        config.vlm_model_name = backbone
    return Checkpoint(name, folder, config, commit, tokenizer, base)


def _tokenizer(steps: list[SavedStep], named: str, backbone: str | None) -> str | None:
    """Where the tokenizer is here: in the checkpoint, where the saved step says, or with the backbone.

    Args:
        steps: of the saved preprocessor.
        named: the backbone in the checkpoint's config.
        backbone: where it is here, if it is not there.
    """
    step = next((step for step in steps if step.name == TOKENIZER_STEP), None)
    if step is None:
        return None
    inside = step.artifact_paths().get("tokenizer_name")
    name = inside or step.config.get("tokenizer_name")
    if inside is None and backbone is not None and (name == named or not _is_tokenizer(name)):
        return backbone
    return name


def _is_tokenizer(name: object) -> bool:
    try:
        load_tokenizer(str(name))
    except Exception:  # whatever a file that is none leads transformers to
        return False
    return True


def _download(repo_id: str, revision: str | None) -> Path:
    """Download the files of a hub checkpoint that LeRobot reads: a repository may hold a whole run beside them."""
    try:
        folder = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision)).parent
        commit = folder.name
        for name in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME, TRAIN_CONFIG_NAME, ADAPTER_CONFIG_NAME):
            _fetch(repo_id, name, commit, needed=name in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME))
        for name in (PREPROCESSOR_NAME, POSTPROCESSOR_NAME):
            files, folders = named_files(read_json(folder / name)) if (folder / name).is_file() else ([], [])
            for file in files:
                _fetch(repo_id, file, commit)
            for inner in folders:
                if not (folder / inner).exists():
                    snapshot_download(repo_id, revision=commit, allow_patterns=f"{escape(inner)}/*")
        is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
        if is_adapter:
            _fetch(repo_id, ADAPTER_WEIGHTS_NAME, commit)
        _fetch(repo_id, SAFETENSORS_SINGLE_FILE, commit, needed=not is_adapter)
    except ReflowError:
        raise
    except Exception as error:  # the hub client's errors share no base class
        at = f" (revision {revision})" if revision else ""
        raise ReflowError(
            f"There is no folder {repo_id}, and as a hub id{at} it cannot be downloaded ({in_one_line(error)})."
        ) from None
    return folder


def _fetch(repo_id: str, name: str, commit: str, *, needed: bool = True) -> None:
    """Download one file, if the repository has it; one that is not needed may also be out of reach."""
    try:
        hf_hub_download(repo_id, name, revision=commit)
    except LocalEntryNotFoundError:
        if needed:
            raise
    except EntryNotFoundError:
        return


def _suggestion(folder: Path) -> str:
    """Point into a training run's output folder, if that is what was named."""
    for inner in ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model"):
        if (folder / inner / CONFIG_NAME).is_file():
            return f" Did you mean {folder / inner}?"
    return ""


def _instead_of_weights(folder: Path) -> str:
    """What the folder holds in place of weights, and what to do about it."""
    if list(folder.glob("adapter_*")):
        return (
            f" It is a PEFT adapter that LeRobot would not load either: its {CONFIG_NAME} lacks use_peft=true, or it "
            f"has no {ADAPTER_CONFIG_NAME}. Put that right to use it, or to merge it with: {merge_command(folder)}"
        )
    if list(folder.glob("pytorch_model_fsdp_*")):
        return f" They are in shards: make one file of them with lerobot-convert-dcp --checkpoint_dir={folder}"
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        return " Pickled weights are never loaded: have the LeRobot that wrote them save them again."
    return ""
