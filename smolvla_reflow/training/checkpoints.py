"""The checkpoints of a run: the teacher, which stays the same until the run ends, and the student's start.

LeRobot reads `--policy.path` from the command line itself, without a revision, and takes the tokenizer's name from the
JSON file in that folder. So LeRobot is given a folder whose files hold on this machine. An adapter is merged into its
base there, since LeRobot would go on training the adapter.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.adapter import ADAPTER_CONFIG_NAME, merge_command
from smolvla_reflow.checkpoint.backbone import tokenizer_or_none
from smolvla_reflow.checkpoint.merging import write_merged
from smolvla_reflow.checkpoint.read import (
    PREPROCESSOR_NAME,
    TOKENIZER_STEP,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from smolvla_reflow.errors import ReflowError, doing
from smolvla_reflow.teacher import base_policy
from smolvla_reflow.training.config import ReflowConfig

FILLED_IN = ("teacher_commit", "teacher_fingerprint")


def open_teacher(reflow: ReflowConfig, typed: Collection[str], backbone: str | None, *, resume: bool) -> Checkpoint:
    """Open the teacher and note its path, commit and fingerprint, so that no other can take its place later."""
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
            f"with{was}: its weights, configuration or statistics changed. "
            + (
                "Put the run's teacher back, or start a new run."
                if resume
                else f"To take the present teacher, name it yourself: --reflow.teacher_path={reflow.teacher_path}"
            )
        )
    reflow.teacher_path, reflow.teacher_commit, reflow.teacher_fingerprint = teacher.source, teacher.commit, found
    return teacher


def _revision(reflow: ReflowConfig, typed: Collection[str], named_anew: bool) -> str | None:
    """The revision of a teacher on the hub: as asked for, or else the commit that the run began with."""
    if "reflow.teacher_revision" in typed:
        return reflow.teacher_revision
    if named_anew:  # the file's revision is another teacher's
        reflow.teacher_revision = None
    elif not Path(str(reflow.teacher_path)).expanduser().exists():
        return reflow.teacher_commit or reflow.teacher_revision
    return None


def open_start(given: Mapping[str, str], teacher: Checkpoint, backbone: str | None) -> Checkpoint:
    """The checkpoint that `--policy.path` names. Raises ReflowError if it cannot be used."""
    path, revision = given["policy.path"], given.get("policy.pretrained_revision")
    folder = Path(path).expanduser()
    if folder.exists():
        revision = None  # LeRobot ignores the revision of a folder
        if str(folder.resolve()) == teacher.source:
            return teacher
    elif path == teacher.source and revision in (None, given.get("reflow.teacher_revision"), teacher.commit):
        return teacher
    return open_checkpoint(path, revision, backbone)


def check_base(start: Checkpoint) -> None:
    """Raise ReflowError if no adapter can be trained on this checkpoint: an adapter saves its base's name alone."""
    if start.base is not None:
        raise ReflowError(
            f"With --peft.* the student is a new adapter, whose base LeRobot has to find again, and {start.source} is "
            f"an adapter itself. Merge it first, {merge_command(start.source)}, and start from --policy.path=NEW_FOLDER"
        )


@contextlib.contextmanager
def starting_from(start: Checkpoint | None, flags: Sequence[str]) -> Iterator[list[str]]:
    """The flags that let LeRobot start the student from this checkpoint.

    If some of its files do not hold on this machine, `--policy.path` is a temporary folder with corrected files and
    links to the others, or with the merged adapter.
    """
    if start is None:
        yield list(flags)
        return
    folder, corrected = start.folder.resolve(), _corrected(start)
    with contextlib.ExitStack() as stack:
        if corrected:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reflow_start_")))
            if start.base is not None:
                with doing(f"merging the adapter {start.source} into its base, in {scratch} (TMPDIR names its parent)"):
                    write_merged(start, scratch)
            else:
                for path in folder.iterdir():
                    if path.name not in corrected:
                        _link(scratch / path.name, path)
            for name, content in corrected.items():
                (scratch / name).write_text(json.dumps(content, indent=2))
            folder = scratch
        yield [*(flag for flag in flags if not flag.startswith("--policy.path=")), f"--policy.path={folder}"]


def _link(new: Path, old: Path) -> None:
    """Let a new path stand for a file or a folder, by a copy where the file system has no links."""
    try:
        new.symlink_to(old)
    except OSError:
        (shutil.copytree if old.is_dir() else shutil.copyfile)(old, new)


def name_start(policy: Any, start: Checkpoint) -> None:
    """Name the student's start by a name that lasts, in place of the folder that LeRobot read."""
    base = base_policy(policy)
    base.config.pretrained_path = Path(start.source)
    for adapter in policy.peft_config.values() if policy is not base else ():
        adapter.base_model_name_or_path, adapter.revision = start.source, start.commit


def restore_adapter(policy: Any, saved: Path) -> None:
    """Give a resumed student the adapter saved in this folder; LeRobot 0.4 begins a new adapter on top."""
    for name, adapter in policy.peft_config.items() if policy is not base_policy(policy) else ():
        policy.load_adapter(str(saved), name, is_trainable=True)
        noted = read_json(saved / ADAPTER_CONFIG_NAME)
        adapter.base_model_name_or_path, adapter.revision = noted.get("base_model_name_or_path"), noted.get("revision")


def _corrected(start: Checkpoint) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint that do not hold on this machine, by name, with their corrected content."""
    corrected = {}
    config = read_json(start.folder / CONFIG_NAME)
    if config.get("use_peft") and not start.config.use_peft:
        corrected[CONFIG_NAME] = {**config, "use_peft": False}
    if start.tokenizer is not None:
        preprocessor = read_json(start.folder / PREPROCESSOR_NAME)
        saved = next(step for step in preprocessor["steps"] if step.get("registry_name") == TOKENIZER_STEP)
        settings, name = saved.get("config") or {}, _lasting_tokenizer(start, start.tokenizer)
        if settings.get("tokenizer_name") != name:
            saved["config"] = {**settings, "tokenizer_name": name}
            saved.pop("artifacts", None)
            corrected[PREPROCESSOR_NAME] = preprocessor
    return corrected


def _lasting_tokenizer(start: Checkpoint, tokenizer: str) -> str:
    """The tokenizer's name in the student: the backbone's if it is the same, since the student needs the backbone."""
    if not Path(tokenizer).is_relative_to(start.folder.absolute()):
        return tokenizer
    inside, other = (tokenizer_or_none(name) for name in (tokenizer, start.config.vlm_model_name))
    if inside is None or other is None or inside.special_tokens_map != other.special_tokens_map:
        return tokenizer
    return start.config.vlm_model_name if inside.get_vocab() == other.get_vocab() else tokenizer
