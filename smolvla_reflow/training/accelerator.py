"""Where reflow meets LeRobot's training loop: the one Accelerator that prepares the policy and receives each loss.

No class is subclassed or changed. Two methods are bound onto that one instance: `prepare`, through which LeRobot
hands the policy it made (after loading and PEFT, before DDP or FSDP) and the loader of its data, and `backward`, which
gets every loss.
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
    on_loss: Callable[[float], None],
    on_loader: Callable[[DataLoader], object] | None = None,
) -> Accelerator:
    """Call these with the policy and its data before the Accelerator prepares them, and before each backward pass.

    Once they are prepared, each process draws random numbers of its own.

    Args:
        accelerator: the one that LeRobot trains with; the same is returned.
        on_policy: may change the module in place.
        on_loss: is given the loss's value, and may raise to stop the run before its gradient is taken.
        on_loader: may change the loader of the training data in place. LeRobot hands it before that of held-out data.
    """
    prepare, backward = accelerator.prepare, accelerator.backward

    def prepare_hooked(*args: Any, **kwargs: Any) -> Any:
        for item in args:
            if isinstance(item, nn.Module):
                on_policy(item)
        loaders = [item for item in args if isinstance(item, DataLoader)]
        if loaders and on_loader is not None:
            on_loader(loaders[0])
        prepared = prepare(*args, **kwargs)
        draw_apart(accelerator.process_index)
        return prepared

    def backward_hooked(loss: Tensor, **kwargs: Any) -> None:
        on_loss(loss.item())
        backward(loss, **kwargs)

    vars(accelerator).update(prepare=prepare_hooked, backward=backward_hooked)
    return accelerator


def draw_apart(process_index: int) -> None:
    """Give this process random numbers of its own: noise, times, which pairs and which rows are recorded ones.

    LeRobot seeds all processes alike, and resumes them from one saved state, so that several would draw what one does.
    What has to be drawn alike, the order of the frames, has a generator or a seed of its own once the loader is
    prepared. The main process goes on as it was.

    Args:
        process_index: 0 for the main process.
    """
    if process_index:
        set_seed(int(torch.randint(2**31, ())) + process_index)
