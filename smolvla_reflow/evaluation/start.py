"""The noise that a client starts its chunks from: `--noise`.

    normal     drawn anew for each chunk, as LeRobot does
    zeros      no noise at all
    0          one draw of that seed, the same for every chunk

A student learns from couplings of normal noise, so `normal` is where its evaluation says most. The others show what a
client does with it that starts elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolvla_reflow.errors import ReflowError

NORMAL, ZEROS = "normal", "zeros"
# Without a simulator, the client's noise loses too much if it makes the flow error so many times larger.
MUCH_LARGER = 1.5


def check_start(name: str) -> None:
    """Raise ReflowError unless there is such a noise."""
    if name not in (NORMAL, ZEROS) and not (name.isdecimal() and int(name) < 2**32):
        raise ReflowError(
            f"--noise={name} is unknown; known are {NORMAL} (drawn for each chunk), {ZEROS}, and a number below 2^32, "
            "the seed of one draw for all chunks."
        )


def in_words(name: str) -> str:
    """The noise, as in "student from zeros"."""
    return f"seed {name}" if name.isdecimal() else name


def constant_noise(name: str, shape: Sequence[int]) -> Tensor:
    """The noise (B, chunk_size, max_action_dim) of every chunk, if it is not `normal`; float32 on the CPU."""
    if name == ZEROS:
        return torch.zeros(*shape)
    draw = np.random.RandomState(int(name)).randn(1, *shape[1:]).astype(np.float32)  # as tether's exports draw seed 0
    return torch.from_numpy(draw).expand(*shape).clone()


def warning(rows: Sequence[Mapping[str, Any]], policy: str, normal: str, margins: Mapping[str, float]) -> str | None:
    """A sentence that names the numbers of steps with too large a loss by the client's noise; None without any.

    In a simulator the loss is too large if the mean falls by more than the margin.

    Args:
        rows: of the report.
        policy: name of the policy from the client's noise.
        normal: name of the same policy from normal noise.
        margins: of success and best reward, by name.
    """
    of = {(row["policy"], row["num_steps"]): row for row in rows}
    lost = []
    for name, n in of:
        if name == policy and (said := _loss(of[policy, n], of[normal, n], margins)) is not None:
            lost.append(f"at {n} step{'s' * (n > 1)} {said}")
    if not lost:
        return None
    return (
        f"Do not run the {policy} with these numbers of steps: {'; '.join(lost)} from normal noise. Let the client "
        "draw normal noise, or train with a larger --reflow.scaled_noise."
    )


def _loss(here: Mapping[str, Any], there: Mapping[str, Any], margins: Mapping[str, float]) -> str | None:
    if here["success"] is None or there["success"] is None:
        if here["flow_rmse"] <= MUCH_LARGER * there["flow_rmse"]:
            return None
        return f"the flow error is {here['flow_rmse']:.3f} instead of {there['flow_rmse']:.3f}"
    if there["success"].rate - here["success"].rate > margins["success"]:
        return f"success is {here['success'].rate:.1%} instead of {there['success'].rate:.1%}"
    if there["success"].best_reward - here["success"].best_reward > margins["best_reward"]:
        return f"the best reward is {here['success'].best_reward:.3f} instead of {there['success'].best_reward:.3f}"
    return None
