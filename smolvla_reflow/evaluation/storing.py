"""Store the recommended number of steps in a checkpoint, so that plain LeRobot runs at that speed."""

from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.read import read_config, read_json
from smolvla_reflow.errors import doing, write_json
from smolvla_reflow.evaluation.real_time_chunking import capped


def write_num_steps(checkpoint: Path, num_steps: int) -> Path:
    """Store `num_steps` in a checkpoint folder's config.json, with a cap on the guidance weight; returns that file."""
    path = checkpoint / CONFIG_NAME
    fields, weight = read_json(path), capped(read_config(checkpoint).rtc_config, num_steps)
    fields["num_steps"] = num_steps
    if weight is not None:
        fields["rtc_config"]["max_guidance_weight"] = weight
    with doing(f"writing {path}"):
        write_json(path, fields)
    return path
