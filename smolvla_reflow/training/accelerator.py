"""Where reflow meets LeRobot's training loop: the one Accelerator that prepares the policy and receives each loss.

No class is subclassed or changed. Two methods are bound onto that one instance: `prepare`, through which LeRobot
hands the policy it made (after loading and PEFT, before DDP or FSDP), and `backward`, which gets every loss.
"""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn


def hook(
    accelerator: Accelerator, *, on_policy: Callable[[nn.Module], object], on_loss: Callable[[float], None]
) -> Accelerator:
    """Call `on_policy` with each module before the Accelerator prepares it, and `on_loss` before each backward pass.

    Args:
        accelerator: the one that LeRobot trains with; the same is returned.
        on_policy: may change the module in place.
        on_loss: is given the loss's value, and may raise to stop the run before its gradient is taken.
    """
    prepare, backward = accelerator.prepare, accelerator.backward

    def prepare_hooked(*args: Any, **kwargs: Any) -> Any:
        for item in args:
            if isinstance(item, nn.Module):
                on_policy(item)
        return prepare(*args, **kwargs)

    def backward_hooked(loss: Tensor, **kwargs: Any) -> None:
        on_loss(loss.item())
        backward(loss, **kwargs)

    vars(accelerator).update(prepare=prepare_hooked, backward=backward_hooked)
    return accelerator
