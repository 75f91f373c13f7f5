"""Whether a student's teacher is still what the student learnt from."""

from collections.abc import Sequence
from typing import Any

from smolvla_reflow.checkpoint.read import TRAIN_CONFIG_NAME, Checkpoint, read_json
from smolvla_reflow.errors import ReflowError


def check_lineage(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise ReflowError if one of them was reflowed from another teacher than what is there under its name now.

    Args:
        checkpoints: the teacher first, each later one perhaps reflowed from an earlier one, or from none of them.
    """
    for position, student in enumerate(checkpoints):
        recorded = _teacher_of(student)
        for teacher in checkpoints[:position]:
            if teacher.source == recorded.get("teacher_path") and not _is_the_same(teacher, recorded):
                commit = recorded.get("teacher_commit")
                raise ReflowError(
                    f"{student.source} was reflowed from {teacher.source} as it was then; what is there now has other "
                    "weights, configuration or statistics, to which the student cannot be compared as to its teacher."
                    + (f" Name the one it learnt from with its revision, {commit}." if commit else "")
                )


def _teacher_of(student: Checkpoint) -> dict[str, Any]:
    """What the run that wrote this checkpoint noted of its teacher; nothing if it was no reflow run."""
    file = student.folder / TRAIN_CONFIG_NAME
    noted = read_json(file).get("reflow") if file.is_file() else None
    return noted if isinstance(noted, dict) else {}


def _is_the_same(teacher: Checkpoint, recorded: dict[str, Any]) -> bool:
    fingerprint = recorded.get("teacher_fingerprint")
    if teacher.commit is not None and teacher.commit == recorded.get("teacher_commit"):
        return True
    return fingerprint is None or fingerprint == teacher.fingerprint()
