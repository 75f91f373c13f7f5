"""The earlier fork's marks in a checkpoint: additional fields in `config.json`, and sometimes the teacher's tensors."""

from collections.abc import Collection

from smolvla_reflow.errors import ReflowError

FORK_FIELDS = ("training_mode", "teacher_model_path", "use_reflow")
TEACHER_PREFIX = "model.teacher."


def refuse_forked(source: str, fields: Collection[str], tensors: Collection[str]) -> None:
    """Raise ReflowError if the names of config fields and tensors show a checkpoint of the fork."""
    marks = [name for name in FORK_FIELDS if name in fields]
    marks += [f"tensors {TEACHER_PREFIX}*"] * any(name.startswith(TEACHER_PREFIX) for name in tensors)
    if marks:
        raise ReflowError(
            f"{source} is a checkpoint of the earlier fork (it has {', '.join(marks)}), and LeRobot refuses it. Make a "
            f"stock checkpoint with: smolvla-reflow-migrate {source} NEW_FOLDER --write"
        )
