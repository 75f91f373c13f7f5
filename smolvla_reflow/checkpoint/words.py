"""The tokens that student and teacher read: a batch is tokenized once, for both."""

from typing import Any

from lerobot.processor import TokenizerProcessorStep

from smolvla_reflow.checkpoint.backbone import load_tokenizer, tokenizer_or_none
from smolvla_reflow.checkpoint.read import PREPROCESSOR_NAME, Checkpoint
from smolvla_reflow.errors import ReflowError

NEW_LINE_STEP = "smolvla_new_line_processor"
# Padding is masked, so the setting for padding changes nothing.
SETTINGS = ("max_length", "truncation", "padding_side", "task_key")


def check_words(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ReflowError unless the processors saved with both make the same tokens of an instruction."""
    of_student, of_teacher = _settings(student), _settings(teacher)
    for name, value in of_student.items():
        if value != of_teacher[name]:
            raise ReflowError(
                f"Student and teacher tokenize the instruction differently: {name} is {of_teacher[name]} in "
                f"{teacher.source} and {value} in {student.source}. Start the student from the teacher's checkpoint."
            )
    if student.tokenizer is not None:
        own, others = load_tokenizer(student.tokenizer), tokenizer_or_none(teacher.tokenizer)
        if others is not None and others.get_vocab() != own.get_vocab():
            raise ReflowError(
                f"The student's tokenizer {student.tokenizer} has another vocabulary than the teacher's, "
                f"{teacher.tokenizer}. Start the student from the teacher's checkpoint."
            )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings in a checkpoint's preprocessor that decide about tokens, by name."""
    steps = checkpoint.processor_steps(PREPROCESSOR_NAME)
    tokenizer = next((step.config for step in steps if issubclass(step.type, TokenizerProcessorStep)), {})
    new_line = any(step.name == NEW_LINE_STEP for step in steps)
    return {"the new line at the end": new_line, **{name: tokenizer.get(name) for name in SETTINGS}}
