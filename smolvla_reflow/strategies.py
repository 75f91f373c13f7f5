"""Loss strategies: which (actions, noise, time) the stock forward gets to see.

A strategy is one function. It is given the model, the observation and the recorded actions, and returns the
unreduced loss, nearly always by calling `model.forward_standard`, SmolVLA's own forward:

    @register_loss_strategy("late")
    def late(model, observation, actions, noise=None, time=None):
        return model.forward_standard(*observation, actions, noise, torch.ones(len(actions)))

Any velocity-regression target `(x_t, t, u)` can be handed to that forward: with `noise = x_t + (1 - t) * u`
and `actions = x_t - t * u` it reproduces exactly that `x_t` and that `u`.

Another package can offer a strategy without being imported, by an entry point in the group
`smolvla_reflow.loss_strategies` whose name is the strategy's and whose value is the function.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.flow import Observation
from smolvla_reflow.timesteps import TimeSampling

ENTRY_POINT_GROUP = "smolvla_reflow.loss_strategies"

# (model, observation, actions, noise, time) -> losses. `model` is an attached VLAFlowMatching; `actions` are
# the recorded ones, (B, chunk_size, max_action_dim); `noise` (same shape) and `time` (B,) are None unless the
# caller fixed them; `losses` are (B, chunk_size, max_action_dim), float32.
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossStrategy:
    """A registered loss.

    Attributes:
        name: what `training_mode` and `--reflow.strategy` call it.
        function: computes the unreduced losses, see `LossFunction`.
        whole_chunk: the target is defined on every entry of the chunk, so the loss is the mean over all of
            it. Otherwise the policy's own reduction applies, which from LeRobot 0.5 on leaves out padded
            action dimensions and steps past the episode's end: right for recorded actions, which do not
            exist there, and wrong for a teacher's, which do.
    """

    name: str
    function: LossFunction
    whole_chunk: bool = False

    def __call__(
        self,
        model: Any,
        observation: Observation,
        actions: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        return self.function(model, observation, actions, noise, time)


_registry: dict[str, LossStrategy] = {}


def register_loss_strategy(name: str, *, whole_chunk: bool = False) -> Callable[[LossFunction], LossFunction]:
    """Decorator: register a `LossFunction` under `name`.

    Raises:
        ReflowError: the name is taken by another function.
    """

    def decorator(function: LossFunction) -> LossFunction:
        taken = _registry.get(name)
        if taken is not None and taken.function is not function:
            raise ReflowError(f"A loss strategy named '{name}' is already registered; choose another name.")
        _registry[name] = LossStrategy(name, function, whole_chunk)
        return function

    return decorator


def get_loss_strategy(name: str) -> LossStrategy:
    """The strategy registered under `name`, here or by an installed package.

    Raises:
        ReflowError: there is none; the message lists those there are.
    """
    if name not in _registry:
        _load_entry_point(name)
    if name not in _registry:
        known = available_loss_strategies()
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ReflowError(f"Unknown loss strategy '{name}'; known are: {', '.join(known)}.{hint}")
    return _registry[name]


def available_loss_strategies() -> tuple[str, ...]:
    """Names of all strategies, registered or declared by an installed package, in alphabetical order."""
    return tuple(sorted({*_registry, *entry_points(group=ENTRY_POINT_GROUP).names}))


def _load_entry_point(name: str) -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        function = entry_point.load()
        # Importing the module may have registered it already, with options only its author knows.
        if name not in _registry:
            register_loss_strategy(name)(function)


@register_loss_strategy("standard")
def standard(
    model: Any,
    observation: Observation,
    actions: Tensor,
    noise: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """Flow matching on recorded actions: what `lerobot-train` trains."""
    return model.forward_standard(*observation, actions, noise, time)


@register_loss_strategy("reflow", whole_chunk=True)
def reflow(
    model: Any,
    observation: Observation,
    actions: Tensor,
    noise: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """Flow matching on the teacher's couplings (arXiv 2209.03003, equation 1 with (X_0, X_1) = (Z_0, Z_1))."""
    coupling = model.generate_reflow_target(*observation, noise=noise)
    return model.forward_coupling(observation, actions, coupling, noise, time)


@register_loss_strategy("distill", whole_chunk=True)
def distill(
    model: Any,
    observation: Observation,
    actions: Tensor,
    noise: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor:
    """One-step distillation: reflow at t = 1 alone (arXiv 2209.03003, section 3.2); more steps get worse by it."""
    coupling = model.generate_reflow_target(*observation, noise=noise)
    return model.forward_coupling(observation, actions, coupling, noise, time, TimeSampling("grid:1"))
