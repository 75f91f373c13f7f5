"""Where reflow meets LeRobot's training loop: the one Accelerator that prepares the policy and receives each loss.

No class is subclassed or changed. Two methods are bound onto that one instance: `prepare`, through which LeRobot
hands the policy it made (after loading and PEFT, before DDP or FSDP), and `backward`, which gets every loss.
"""

import math
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from smolvla_reflow.errors import ReflowError

# Actions are normalised, so that a loss of 1 is that of a policy which has learnt nothing.
EXPLODED = 1e4


def equip(
    accelerator: Accelerator, teach: Callable[[nn.Module], object], lost: Callable[[int, float], str]
) -> Accelerator:
    """Have an Accelerator hand every module to `teach` before it prepares it, and stop at a loss that is lost.

    Args:
        accelerator: the one that LeRobot trains with; the same is returned.
        teach: called with each module passing through `prepare`.
        lost: what to say of a loss that is not finite or above 1e4, given how many backward passes went before it
            in this process, and its value.
    """
    prepare, backward, passes = accelerator.prepare, accelerator.backward, 0

    def teach_and_prepare(*args: Any, **kwargs: Any) -> Any:
        for item in args:
            if isinstance(item, nn.Module):
                teach(item)
        return prepare(*args, **kwargs)

    def check_and_backward(loss: Tensor, **kwargs: Any) -> None:
        nonlocal passes
        value = loss.item()
        if not math.isfinite(value) or value > EXPLODED:
            raise ReflowError(lost(passes, value))
        passes += 1
        backward(loss, **kwargs)

    vars(accelerator).update(prepare=teach_and_prepare, backward=check_and_backward)
    return accelerator
