"""Reflow for SmolVLA: fine-tune a checkpoint on its own couplings until one or two ODE steps are enough."""

from smolvla_reflow.attachment import Attachment, attach, detach, is_attached
from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import (
    LossStrategy,
    available_loss_strategies,
    get_loss_strategy,
    register_loss_strategy,
)
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.solver import Solver
from smolvla_reflow.step import Step
from smolvla_reflow.teacher import FrozenTeacher

__all__ = [
    "Attachment",
    "Coupling",
    "CouplingSource",
    "FrozenTeacher",
    "LossStrategy",
    "Observation",
    "Pairs",
    "Recipe",
    "ReflowError",
    "Solver",
    "Step",
    "attach",
    "available_loss_strategies",
    "detach",
    "get_loss_strategy",
    "is_attached",
    "register_loss_strategy",
]
