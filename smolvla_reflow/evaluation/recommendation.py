"""The recommended number of steps: chosen from an evaluation, said in a sentence, stored in a checkpoint."""

import json
from pathlib import Path

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.measure import Evaluation
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.files import write_whole


def recommend(evaluation: Evaluation, name: str, reference: MeasuredPolicy, tolerance: float) -> int | None:
    """Choose the smallest number of steps at which the policy called `name` is good enough; None if there is none.

    Good enough is: as close to the reference policy's fine solution as that policy's own sampler with its default
    number of steps is, or within `tolerance` standard deviations.
    """
    (default,) = (
        row.flow_rmse
        for row in evaluation.rows
        if row.policy == reference.name and row.num_steps == reference.num_steps
    )
    enough = [
        row.num_steps for row in evaluation.rows if row.policy == name and row.flow_rmse <= max(default, tolerance)
    ]
    return min(enough, default=None)


def in_words(recommended: int | None, judged: MeasuredPolicy, reference: MeasuredPolicy, tolerance: float) -> str:
    """Say the recommendation in a sentence, or what would help if there is none."""
    own = f"the {reference.name}'s own {reference.num_steps} steps"
    enough = f"as close to the {reference.name}'s fine solution as {own} are"
    if tolerance:
        enough += f", or within {tolerance:g} standard deviations"
    if recommended is not None:
        return f"Recommended: num_steps={recommended}, the smallest at which the {judged.name} is {enough}."
    return (
        f"No number of steps that was measured brings the {judged.name} {enough}. What helps: training longer "
        "or at a higher learning rate, a more accurate teacher (a higher --reflow.num_steps), more couplings in each "
        "step (--reflow.couplings_per_frame=4), or accepting a --tolerance."
    )


def write_num_steps(checkpoint: Path, num_steps: int) -> Path:
    """Store `num_steps` in a checkpoint folder's config.json, which keeps every other field; returns that file.

    Raises:
        ReflowError: the file cannot be written; it is then what it was.
    """
    path = checkpoint / "config.json"
    fields = json.loads(path.read_text())
    fields["num_steps"] = num_steps
    try:
        write_whole(path, (json.dumps(fields, indent=4) + "\n").encode())
    except OSError as error:
        raise ReflowError(f"{path} cannot be written ({error}).") from None
    return path
