"""Store the recommended number of steps in a checkpoint, so that plain LeRobot runs at that speed."""

import json
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME

from smolvla_reflow.checkpoint.read import read_config, read_json
from smolvla_reflow.errors import ReflowError, write_whole
from smolvla_reflow.evaluation.real_time_chunking import capped, is_enabled


def write_num_steps(checkpoint: Path, num_steps: int) -> Path:
    """Store `num_steps` in a checkpoint folder's config.json; returns that file.

    Where real-time chunking is enabled in it and one step would throw off what it should keep, its
    `rtc_config.max_guidance_weight` is capped. Every other field is kept, and the order of the fields.

    Raises:
        ReflowError: the file cannot be read or written; it is then what it was.
    """
    path = checkpoint / CONFIG_NAME
    fields, rtc_config = read_json(path), read_config(checkpoint).rtc_config
    fields["num_steps"] = num_steps
    if is_enabled(rtc_config) and (weight := capped(rtc_config, num_steps)) < rtc_config.max_guidance_weight:
        fields["rtc_config"]["max_guidance_weight"] = weight
    try:
        write_whole(path, (json.dumps(fields, indent=4) + "\n").encode())
    except OSError as error:
        raise ReflowError(f"{path} cannot be written ({error}).") from None
    return path
