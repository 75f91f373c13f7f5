"""Whether student and teacher read an instruction as the same tokens; a batch is tokenised once for both."""

from typing import Any

from lerobot.processor import TokenizerProcessorStep

from smolvla_reflow.checkpoint.backbone import load_tokenizer
from smolvla_reflow.checkpoint.read import PREPROCESSOR_NAME, Checkpoint
from smolvla_reflow.errors import ReflowError

NEW_LINE_STEP = "smolvla_new_line_processor"
# Padding is masked, so that how much of it there is changes nothing.
SETTINGS = ("max_length", "truncation", "padding_side", "task_key")


def check_words(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ReflowError unless the processors saved with both make the same tokens of an instruction.

    Args:
        student: that the run starts from, or that is resumed.
        teacher: of the run.
    """
    here, there = _reading(student), _reading(teacher)
    unlike = [name for name in here if here[name] != there[name]]
    if unlike:
        raise ReflowError(
            f"The student reads instructions otherwise than the teacher: {unlike[0]} is {there[unlike[0]]} in "
            f"{teacher.source} and {here[unlike[0]]} in {student.source}. Start the student from the teacher's "
            "checkpoint."
        )
    if student.tokenizer != teacher.tokenizer and not _same_vocabulary(student.tokenizer, teacher.tokenizer):
        raise ReflowError(
            f"The student's tokenizer, {student.tokenizer}, is not the teacher's, {teacher.tokenizer}. Start the "
            "student from the teacher's checkpoint."
        )


def _reading(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the checkpoint's preprocessor turns an instruction into tokens, by name of the setting."""
    steps = checkpoint.steps(PREPROCESSOR_NAME)
    settings = next((step.config for step in steps if issubclass(step.type, TokenizerProcessorStep)), {})
    new_line = any(step.name == NEW_LINE_STEP for step in steps)
    return {"the new line at its end": new_line, **{name: settings.get(name) for name in SETTINGS}}


def _same_vocabulary(*names: str | None) -> bool:
    """Whether two tokenizers, which may be one under two names, agree; also where one is not here to be asked."""
    try:
        first, second = (load_tokenizer(str(name)) for name in names)
    except (OSError, ValueError):
        return True
    return first.get_vocab() == second.get_vocab()
