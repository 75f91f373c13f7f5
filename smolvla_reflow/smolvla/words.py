"""Whether student and teacher read an instruction as the same tokens; a batch is tokenised once for both."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.checkpoint import PREPROCESSOR_NAME, Checkpoint, read_json

TOKENIZER_STEP = "tokenizer_processor"
NEW_LINE_STEP = "smolvla_new_line_processor"
# Padding is masked, so that how much of it there is changes nothing.
SETTINGS = ("max_length", "truncation", "padding_side", "task_key")


def check_words(student: Path, teacher: Checkpoint) -> None:
    """Raise ReflowError unless the processors saved in both folders make the same tokens of an instruction.

    Args:
        student: the folder of the checkpoint that the student starts from, or is resumed from.
        teacher: of the run.
    """
    here, there = _reading(student), _reading(teacher.folder)
    unlike = [name for name in here if name != "tokenizer_name" and here[name] != there[name]]
    if unlike:
        raise ReflowError(
            f"The student reads instructions otherwise than the teacher: {unlike[0]} is {there[unlike[0]]} in "
            f"{teacher.source} and {here[unlike[0]]} in {student}. Start the student from the teacher's checkpoint."
        )
    names = here["tokenizer_name"], there["tokenizer_name"]
    if names[0] != names[1] and not _same_vocabulary(*names):
        raise ReflowError(
            f"The student's tokenizer, {names[0]}, is not the teacher's, {names[1]}. Start the student from the "
            "teacher's checkpoint."
        )


def _reading(folder: Path) -> dict[str, Any]:
    """How the checkpoint's preprocessor turns an instruction into tokens, by name of the setting."""
    path = folder / PREPROCESSOR_NAME
    steps = read_json(path).get("steps", []) if path.is_file() else []
    by_name = {step.get("registry_name"): step.get("config", {}) for step in steps}
    settings = by_name.get(TOKENIZER_STEP, {})
    return {
        "the new line at its end": NEW_LINE_STEP in by_name,
        **{name: settings.get(name) for name in SETTINGS},
        "tokenizer_name": settings.get("tokenizer_name"),
    }


def _same_vocabulary(one: str | None, other: str | None) -> bool:
    """Whether two tokenizers, which may be one under two names, agree; also where one of them is not here to ask."""
    try:
        first, second = (AutoTokenizer.from_pretrained(name, trust_remote_code=False) for name in (one, other))
    except (OSError, ValueError):
        return True
    return first.get_vocab() == second.get_vocab()
