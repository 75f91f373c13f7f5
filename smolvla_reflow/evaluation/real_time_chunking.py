"""Real-time chunking (RTC) at few steps: how well a chunk keeps what the one before it has fixed, and by what weight.

While the robot runs one chunk, the policy makes the next. The actions that run meanwhile, the frozen prefix, should
come out of it as they were. LeRobot guides the sampler towards them (Black, Galliker & Levine, "Real-Time Execution of
Action Chunking Flow Policies", arXiv 2506.07339). With A the earlier chunk, a = x - t v the actions that v leads to
from here, W in [0, 1] (1 on the prefix) and 0 < w <= max_guidance_weight, its Euler step of length 1/n is

    x <- x - (v - w W (A - a)) / n        so a step goes the share (w / n) W of the way from a to A, past it if w > n.

In the last step, t = 1/n, x - v/n is a itself, which leaves x - A = (1 - w/n) (a - A) on the prefix. LeRobot's w is
max_guidance_weight at t = 1, and in the last of n >= 2 steps at most n - 1 + 1/(n - 1), which is n for two and less
than n for more. Therefore one step leaves |1 - max_guidance_weight| times the error of a chunk without guidance, nine
times for LeRobot's 10 and none for 1, while two steps leave none from a weight of 2 on.

From two steps on the weight is left alone. A cap at n would keep the earlier steps from going past A as well, but the
last step puts that right, and where W is small the actions after the prefix would follow the chunk before less.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.noise import frames_noise
from smolvla_reflow.smolvla.observation import with_one_state


@dataclass(frozen=True)
class PrefixError:
    """How far the frozen prefix of a chunk is off the chunk before: root mean square, in normalised actions.

    Attributes:
        num_steps: Euler steps of both chunks.
        max_guidance_weight: as configured.
        unguided: without guidance.
        guided: with it, as configured.
        capped: with it, at the weight that should be stored with this number of steps.
    """

    num_steps: int
    max_guidance_weight: float
    unguided: float
    guided: float
    capped: float


def is_enabled(rtc_config: RTCConfig | None) -> bool:
    """Whether a checkpoint with this in its config guides its chunks."""
    return rtc_config is not None and rtc_config.enabled


def capped(rtc_config: RTCConfig, num_steps: int) -> float:
    """The `max_guidance_weight` with which the last step does not go past the chunk before: at most 1 for one step."""
    return min(rtc_config.max_guidance_weight, 1.0) if num_steps == 1 else rtc_config.max_guidance_weight


@contextlib.contextmanager
def chunking(policy: SmolVLAPolicy, rtc_config: RTCConfig) -> Iterator[None]:
    """Guide the policy's chunks by this configuration."""
    before = policy.config.rtc_config, policy.rtc_processor, policy.model.rtc_processor
    policy.config.rtc_config = rtc_config
    policy.init_rtc_processor()
    try:
        yield
    finally:
        policy.config.rtc_config, policy.rtc_processor, policy.model.rtc_processor = before


def measure_chunking(
    policy: MeasuredPolicy, rtc_config: RTCConfig, batch: dict[str, Any], num_steps: Sequence[int], seed: int
) -> list[PrefixError]:
    """Make two chunks of each frame, the second while a few actions of the first run, for each number of steps.

    The few actions are a tenth of a chunk, or as many as are guided if that is less. Both chunks are of one frame, a
    little more favourable than in motion, from two noises.

    Args:
        policy: of the checkpoint, loaded without guidance.
        rtc_config: the checkpoint's own.
        batch: raw, of a few frames; four chunks of each are made at each number of steps.
        num_steps: numbers of Euler steps.
        seed: of the noise.
    """
    config, frames = policy.policy.config, batch["index"].tolist()
    prepared = policy.preprocessor({k: v for k, v in batch.items() if not k.startswith("action")})
    observation = with_one_state(policy.policy, prepared)
    noise = frames_noise(seed, frames, 2, (config.chunk_size, config.max_action_dim)).to(config.device)
    first, second = noise.unflatten(0, (len(frames), 2)).unbind(dim=1)
    frozen = max(1, min(config.chunk_size // 10, rtc_config.execution_horizon))
    run = min(frozen, config.chunk_size - frozen)

    def chunk(noise: Tensor, **guidance: Any) -> Tensor:
        # LeRobot converts Aloha's state in place.
        given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in observation.items()}
        return policy.policy.predict_action_chunk(given, noise=noise, **guidance)

    def guided(left_over: Tensor, weight: float) -> Tensor:
        with chunking(policy.policy, replace(rtc_config, max_guidance_weight=weight)):
            return chunk(second, prev_chunk_left_over=left_over, inference_delay=frozen)

    def error(made: Tensor, left_over: Tensor) -> float:
        return (made[:, :frozen] - left_over[:, :frozen]).square().mean().sqrt().item()

    found = []
    for n in sorted(set(num_steps)):
        with policy.inference(n):
            left_over = chunk(first)[:, run:]
            found.append(
                PrefixError(
                    num_steps=n,
                    max_guidance_weight=rtc_config.max_guidance_weight,
                    unguided=error(chunk(second), left_over),
                    guided=error(guided(left_over, rtc_config.max_guidance_weight), left_over),
                    capped=error(guided(left_over, capped(rtc_config, n)), left_over),
                )
            )
    return found


def note(found: Sequence[PrefixError], num_steps: int | None = None) -> str:
    """What the report says of it.

    Args:
        found: at one number of steps or more.
        num_steps: the recommended number, None if there is none.
    """
    weight = found[0].max_guidance_weight
    steps = _listed(f"{each.num_steps}" for each in found)
    sentence = (
        f"Real-time chunking: with the max_guidance_weight of {weight:g} in config.json, the actions that run while a "
        f"chunk is made are off the chunk before by {_listed(f'{each.guided:.2f}' for each in found)} (root mean "
        f"square, normalised) at {steps} steps, without guidance by "
        f"{_listed(f'{each.unguided:.2f}' for each in found)}."
    )
    one = next((each for each in found if each.num_steps == 1 and weight > 1), None)
    if one is None or num_steps not in (1, None):
        return sentence
    two = " Two steps keep them with the weight as it is." if weight >= 2 else ""
    return (
        f"{sentence} At 1 step a weight above 1 goes past them; capped at 1, which --write_num_steps stores with 1 "
        f"step, it leaves {one.capped:.2f}. lerobot-rollout takes no weight from config.json: there it needs "
        f"--inference.rtc.max_guidance_weight=1.{two}"
    )


def _listed(parts: Iterable[str]) -> str:
    return " / ".join(parts)
