"""The checkpoints of a run: its teacher, which stays the one that it began with, and the one its student starts from.

LeRobot reads `--policy.path` from the command line itself, without a revision, and takes the tokenizer's name from the
JSON file that it finds there. So the student's checkpoint is handed over as a folder in which all of it holds here, and
an adapter, which LeRobot would go on with as one, as the stock checkpoint that it is once it is merged into its base.
"""

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME
from safetensors import SafetensorError
from torch import nn

from smolvla_reflow.checkpoint.adapter import ADAPTER_CONFIG_NAME, merge_command
from smolvla_reflow.checkpoint.backbone import load_tokenizer
from smolvla_reflow.checkpoint.merging import write_merged
from smolvla_reflow.checkpoint.read import (
    PREPROCESSOR_NAME,
    TOKENIZER_STEP,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.teacher import base_policy
from smolvla_reflow.training.config import ReflowConfig

FILLED_IN = ("teacher_commit", "teacher_fingerprint")


def open_teacher(
    reflow: ReflowConfig, typed: Collection[str], backbone: str | None = None, *, resume: bool = False
) -> Checkpoint:
    """Open the teacher and note in the configuration which one it is, so that no other can take its place later.

    Args:
        reflow: the run's section, which names a teacher; its path, commit and fingerprint are filled in.
        typed: names of the flags on the command line.
        backbone: folder or hub id of the vision-language backbone, if the teacher is to have another than it says.
        resume: whether the run continues an earlier one.

    Raises:
        ReflowError: the teacher cannot be used, or is not the one that the configuration was written with.
    """
    assert reflow.teacher_path is not None
    for name in FILLED_IN:
        if f"reflow.{name}" in typed:
            raise ReflowError(f"--reflow.{name} is filled in by the run; choose one with --reflow.teacher_revision=...")
    named_anew = not resume and "reflow.teacher_path" in typed
    recorded = None if named_anew else reflow.teacher_fingerprint
    teacher = open_checkpoint(reflow.teacher_path, _revision(reflow, typed, named_anew), backbone)
    found = teacher.fingerprint()
    if recorded is not None and recorded != found:
        was = f" (commit {reflow.teacher_commit})" if reflow.teacher_commit else ""
        raise ReflowError(
            f"The teacher {teacher.cited()} is not the one that this {'run began' if resume else 'file was written'} "
            f"with{was}: its weights, configuration or statistics are others. "
            + (
                "Put that one back, or start a new run."
                if resume
                else f"To take it as it is now, name it yourself: --reflow.teacher_path={reflow.teacher_path}"
            )
        )
    reflow.teacher_path, reflow.teacher_commit, reflow.teacher_fingerprint = teacher.source, teacher.commit, found
    return teacher


def _revision(reflow: ReflowConfig, typed: Collection[str], named_anew: bool) -> str | None:
    """Of the teacher on the hub: what was asked for, or else the commit that the run began with."""
    if "reflow.teacher_revision" in typed:
        return reflow.teacher_revision
    if named_anew:  # what the file says is of another teacher
        reflow.teacher_revision = None
    elif not Path(str(reflow.teacher_path)).expanduser().exists():
        return reflow.teacher_commit or reflow.teacher_revision
    return None


def open_start(flags: Sequence[str], teacher: Checkpoint, backbone: str | None) -> Checkpoint:
    """The checkpoint that `--policy.path` names. Raises ReflowError if it cannot be used."""
    given = by_name(flags)
    path, revision = given["policy.path"], given.get("policy.pretrained_revision")
    here = Path(path).expanduser()
    if here.exists():
        revision = None  # which LeRobot does not look at then
        if str(here.resolve()) == teacher.source:
            return teacher
    elif path == teacher.source and revision in (None, given.get("reflow.teacher_revision"), teacher.commit):
        return teacher
    return open_checkpoint(path, revision, backbone)


def check_base(start: Checkpoint) -> None:
    """Raise ReflowError if no adapter can be trained on this checkpoint, of which only the name is saved with it."""
    if start.base is not None:
        raise ReflowError(
            f"With --peft.* the student is a new adapter, whose base LeRobot has to find again, and {start.source} is "
            f"an adapter itself. Merge it first, {merge_command(start.source)}, and start from --policy.path=NEW_FOLDER"
        )


@contextlib.contextmanager
def starting_from(start: Checkpoint | None, flags: Sequence[str]) -> Iterator[list[str]]:
    """The flags with which LeRobot starts the student from this checkpoint.

    What the checkpoint says and does not hold here (where its tokenizer is, an adapter that has been merged) is put
    right in a temporary folder, all else in which are links; and an adapter is merged there.
    """
    if start is None:
        yield list(flags)
        return
    folder, corrected = start.folder.resolve(), _corrected(start)
    with contextlib.ExitStack() as stack:
        if corrected:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reflow_start_")))
            if start.base is not None:
                _merge(start, scratch)
            else:
                for path in folder.iterdir():
                    if path.name not in corrected:
                        (scratch / path.name).symlink_to(path)
            for name, content in corrected.items():
                (scratch / name).write_text(json.dumps(content, indent=2))
            folder = scratch
        yield [*(flag for flag in flags if not flag.startswith("--policy.path=")), f"--policy.path={folder}"]


def _merge(start: Checkpoint, scratch: Path) -> None:
    try:
        write_merged(start, scratch)
    except (OSError, SafetensorError) as error:
        raise ReflowError(
            f"The adapter {start.source} is merged into its base in {scratch}, which cannot be written ({error}). Make "
            "room there, or set TMPDIR to a folder elsewhere."
        ) from None


def name_start(policy: nn.Module, start: Checkpoint) -> None:
    """Have a student say where it started by a name that lasts, in place of the folder that LeRobot read."""
    base_policy(policy).config.pretrained_path = Path(start.source)
    for adapter in getattr(policy, "peft_config", {}).values():
        adapter.base_model_name_or_path, adapter.revision = start.source, start.commit


def restore_adapter(policy: Any, saved: Path) -> None:
    """Give a resumed student the adapter that was saved in this folder, if it is one.

    LeRobot 0.4 wraps it once more, in an adapter that begins at zero and has the saved one for its base.
    """
    adapters = getattr(policy, "peft_config", {})
    for name, adapter in adapters.items():
        policy.load_adapter(str(saved), name, is_trainable=True)
        noted = read_json(saved / ADAPTER_CONFIG_NAME)
        adapter.base_model_name_or_path, adapter.revision = noted.get("base_model_name_or_path"), noted.get("revision")


def by_name(flags: Sequence[str]) -> dict[str, str]:
    """`--name=value` flags by name."""
    return {name: value for name, _, value in (flag[2:].partition("=") for flag in flags)}


def _corrected(start: Checkpoint) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint that say what does not hold here, by name, as they should be."""
    corrected = {}
    config = read_json(start.folder / CONFIG_NAME)
    if config.get("use_peft") and not start.config.use_peft:
        corrected[CONFIG_NAME] = {**config, "use_peft": False}
    if start.tokenizer is not None:
        preprocessor = read_json(start.folder / PREPROCESSOR_NAME)
        step = next(step for step in preprocessor["steps"] if step.get("registry_name") == TOKENIZER_STEP)
        settings, name = step.get("config") or {}, _lasting_tokenizer(start, start.tokenizer)
        if settings.get("tokenizer_name") != name:
            step["config"] = {**settings, "tokenizer_name": name}
            step.pop("artifacts", None)
            corrected[PREPROCESSOR_NAME] = preprocessor
    return corrected


def _lasting_tokenizer(start: Checkpoint, tokenizer: str) -> str:
    """How the student should name the tokenizer, once it is somewhere else than the checkpoint it started from.

    A tokenizer inside that checkpoint is as a rule the backbone's, which the student needs anyway.
    """
    if not Path(tokenizer).is_relative_to(start.folder.absolute()):
        return tokenizer
    try:
        inside, backbones = (load_tokenizer(name) for name in (tokenizer, start.config.vlm_model_name))
    except (OSError, ValueError):
        return tokenizer
    alike = (inside.get_vocab(), inside.special_tokens_map) == (backbones.get_vocab(), backbones.special_tokens_map)
    return start.config.vlm_model_name if alike else tokenizer
