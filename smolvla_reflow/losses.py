"""From the squared errors of the velocity to the loss that is minimised: a function of each sample's own error.

    mse            m                    the mean squared error of the sample's velocity; arXiv 2209.03003, equation 1
    pseudo_huber   sqrt(m + c^2) - c    arXiv 2405.20320, section 4.2; c = 0.00054, in units of one entry's error
    normalized     m / sg(m)            arXiv 2410.07815 (Simple ReFlow): each sample weighs the same

All three keep the shape `(B, chunk_size, max_action_dim)` of what they are given, so that any mean of it is the mean
loss over the samples. The value of `normalized` is 1 by construction; its gradient is that of log(m).
"""

import difflib
from collections.abc import Callable

from torch import Tensor

from smolvla_reflow.errors import ReflowError

HUBER_SCALE = 0.00054  # Song & Dhariwal, arXiv 2310.14189: c = 0.00054 sqrt(d) for the norm over d entries
EPSILON = 1e-12


def mse(squared_errors: Tensor) -> Tensor:
    return squared_errors


def pseudo_huber(squared_errors: Tensor) -> Tensor:
    per_sample = (_per_sample(squared_errors) + HUBER_SCALE**2).sqrt() - HUBER_SCALE
    return per_sample.expand_as(squared_errors)


def normalized(squared_errors: Tensor) -> Tensor:
    return squared_errors / (_per_sample(squared_errors).detach() + EPSILON)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (mse, pseudo_huber, normalized)
}


def get_loss(name: str) -> Callable[[Tensor], Tensor]:
    """The loss of this name. Raises ReflowError if there is none."""
    if name in LOSSES:
        return LOSSES[name]
    close = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ReflowError(f"loss '{name}' is unknown; known are {', '.join(LOSSES)}.{hint}")


def _per_sample(squared_errors: Tensor) -> Tensor:
    return squared_errors.mean(dim=(1, 2), keepdim=True)
