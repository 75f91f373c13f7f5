"""Store the recommended number of steps in a checkpoint, and the weight of real-time chunking (RTC) that fits to it.

While the robot runs one chunk, the policy makes the next. The actions that run meanwhile, the frozen prefix, should
stay as they are. LeRobot guides the sampler towards them (Black, Galliker & Levine, "Real-Time Execution of Action
Chunking Flow Policies", arXiv 2506.07339). Let A be the earlier chunk, a = x - t v the actions at the end of v, and
0 < w <= max_guidance_weight. The weights W in time are 1 on the prefix. LeRobot's Euler step of length 1/n is

    x <- x - (v - w W (A - a)) / n

It goes the share (w / n) W of the way from a to A, and past A if w > n.

In the last step, t = 1/n, x - v/n is a itself, so x - A = (1 - w/n) (a - A) is left on the prefix. LeRobot's w is
max_guidance_weight at t = 1, and at most n - 1 + 1/(n - 1) in the last of n >= 2 steps. So one step leaves
|1 - max_guidance_weight| times the error of a chunk without guidance, 9 times for LeRobot's 10, and more steps keep the
prefix with any weight from n on.

The weight is capped at n. With a larger weight the first step goes past A, and the network sees x where no path goes:
the prefix is kept, but the actions after it suffer. On PushT a student with two steps covers 0.45 of the goal with
LeRobot's weight of 10, and 0.62 with 2 (`examples/studies/latency.py --clients=true`).
"""

from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from smolvla_reflow.checkpoint.read import read_config, read_json
from smolvla_reflow.errors import doing, write_json


def write_num_steps(checkpoint: Path, num_steps: int) -> Path:
    """Store `num_steps` in a checkpoint folder's config.json, and fit the guidance weight; returns that file."""
    path = checkpoint / CONFIG_NAME
    fields, before = read_json(path), read_config(checkpoint)
    weight = fitted(before.rtc_config, before.num_steps, num_steps)
    fields["num_steps"] = num_steps
    if weight is not None:
        fields["rtc_config"]["max_guidance_weight"] = weight
    with doing(f"writing {path}"):
        write_json(path, fields)
    return path


def fitted(rtc_config: RTCConfig | None, before: int, num_steps: int) -> float | None:
    """The `max_guidance_weight` to store with this number of steps; None if the configured one can stay.

    A weight that equals the number of steps before was fitted to that number.
    """
    if rtc_config is None or not rtc_config.enabled or rtc_config.max_guidance_weight == num_steps:
        return None
    weight = rtc_config.max_guidance_weight
    return float(num_steps) if weight > num_steps or weight == before else None


def rtc_note(rtc_config: RTCConfig | None, num_steps: int | None) -> str | None:
    """A warning if the guidance would go past the frozen actions at the recommended number of steps."""
    if num_steps is None or rtc_config is None or not rtc_config.enabled or rtc_config.max_guidance_weight <= num_steps:
        return None
    return (
        f"Real-time chunking: a max_guidance_weight of {rtc_config.max_guidance_weight:g} in config.json is too large "
        f"for num_steps={num_steps}. The first step goes past the chunk before, so the actions jump or get worse. "
        f"--write_num_steps stores a weight of {num_steps}. lerobot-rollout takes no weight from config.json; "
        f"give it --inference.rtc.max_guidance_weight={num_steps}."
    )
