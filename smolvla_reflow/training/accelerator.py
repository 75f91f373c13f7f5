"""The seam to LeRobot's training loop: its Accelerator, which prepares the policy and receives each loss.

No class is subclassed or changed. Two methods are bound onto the instance. `prepare` receives the policy (after loading
and PEFT, before DDP or FSDP) and the data's loader. `backward` receives each loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader


def hook(
    accelerator: Accelerator,
    *,
    on_policy: Callable[[nn.Module], object],
    on_loss: Callable[[float], object],
    on_loader: Callable[[DataLoader], object] = lambda loader: None,
) -> Accelerator:
    """Call these with the policy and its data before they are prepared, and with each loss before its backward pass.

    Args:
        on_policy: may change the module in place.
        on_loss: is given the loss's value, and may raise to stop the run before the gradient is taken.
        on_loader: may change the training data's loader in place. LeRobot hands it over before that of held-out data.
    """
    prepare, backward = accelerator.prepare, accelerator.backward

    def prepare_hooked(*args: Any, **kwargs: Any) -> Any:
        for policy in (item for item in args if isinstance(item, nn.Module)):
            on_policy(policy)
        for loader in [item for item in args if isinstance(item, DataLoader)][:1]:
            on_loader(loader)
        prepared = prepare(*args, **kwargs)
        # LeRobot seeds all processes alike, and resumes them from one saved state, so that each would draw the same
        # noise and times. The frames' order, which all processes share, comes from a separate generator by now.
        if accelerator.process_index:
            set_seed(int(torch.randint(2**31, ())) + accelerator.process_index)
        return prepared

    def backward_hooked(loss: Tensor, **kwargs: Any) -> None:
        on_loss(loss.item())
        backward(loss, **kwargs)

    vars(accelerator).update(prepare=prepare_hooked, backward=backward_hooked)
    return accelerator
