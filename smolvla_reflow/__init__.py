"""Reflow for SmolVLA: fine-tune a checkpoint on its own couplings until one or two ODE steps are enough."""

from smolvla_reflow.attach import Attachment, attach, detach, is_attached
from smolvla_reflow.coupling import Coupling
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.flow import Observation
from smolvla_reflow.pairs import Pairs
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import (
    LossStrategy,
    available_loss_strategies,
    get_loss_strategy,
    register_loss_strategy,
)

__all__ = [
    "Attachment",
    "Coupling",
    "LossStrategy",
    "Observation",
    "Pairs",
    "Recipe",
    "ReflowError",
    "Solver",
    "attach",
    "available_loss_strategies",
    "detach",
    "get_loss_strategy",
    "is_attached",
    "register_loss_strategy",
]
