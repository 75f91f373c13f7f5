"""Losses by name: standard, reflow, distill, and how to add another.

    @register_loss_strategy("reflow")
    def reflow(step):
        return step.losses(step.coupling())

A loss is a function from a `Step` (step.py) to a tensor (B, chunk_size, max_action_dim). It is found by the name it was
registered under, in this package or in an installed one (entry point group `smolvla_reflow.loss_strategies`, name and
function), or by its file, `path/to/file.py:name`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction
from pathlib import Path

from torch import Tensor

from smolvla_reflow.errors import ReflowError, first_line, known_are
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.step import Step

ENTRY_POINT_GROUP = "smolvla_reflow.loss_strategies"

LossFunction = Callable[[Step], Tensor]


@dataclass(frozen=True)
class LossStrategy:
    """A registered loss.

    Attributes:
        name: for `training_mode` and `--reflow.strategy`.
        function: the loss.
        couples: False for a loss on recorded actions. LeRobot then reduces it; a solver or pairs are refused.
        unused: names of `Recipe` fields that have no effect on the loss, and are refused beside it.
        joint_forward: True if the loss needs the student's whole training forward, which also trains `state_proj`.
            Other losses are computed on a prefix that student and teacher share, at a fraction of the cost.
    """

    name: str
    function: LossFunction
    couples: bool = True
    unused: tuple[str, ...] = ()
    joint_forward: bool = False

    def __call__(self, step: Step) -> Tensor:
        """The losses of one step, (B, chunk_size, max_action_dim).

        Raises:
            ReflowError: the function returned anything else.
        """
        losses = self.function(step)
        if not isinstance(losses, Tensor):
            raise ReflowError(
                f"The loss strategy '{self.name}' returned a {type(losses).__name__}; return a tensor, such as "
                "step.losses(...)."
            )
        if losses.ndim != 3 or losses.shape[0] != len(step.actions):
            raise ReflowError(
                f"The loss strategy '{self.name}' returned losses of shape {tuple(losses.shape)}; they have to be "
                f"unreduced, ({len(step.actions)}, chunk_size, max_action_dim)."
            )
        return losses

    def check_effect(
        self, recipe: Recipe, *, teacher: object, pairs: object, solver: object, cuda_graph: bool = False
    ) -> None:
        """Raise ReflowError if an argument of `attach` has no effect on this loss, or beside another argument."""
        for name in self.unused:
            if getattr(recipe, name) != getattr(Recipe, name):
                raise ReflowError(
                    f"{name}={getattr(recipe, name)} has no effect with strategy={self.name}; leave it out."
                )
        for name, given in (("solver", solver), ("pairs", pairs), ("cuda_graph", cuda_graph or None)):
            if given is not None and not self.couples:
                raise ReflowError(
                    f"{name} has no effect with strategy={self.name}, which asks for no couplings; leave it out."
                )
        if pairs is not None and teacher is not None:
            raise ReflowError("Attach either a teacher or the pairs it made, not both.")
        for name, given in (("solver", solver), ("cuda_graph", cuda_graph or None)):
            if pairs is not None and given is not None:
                raise ReflowError(
                    f"{name} has no effect beside pairs, whose ODE was solved when they were made; leave it out."
                )


_registry: dict[str, LossStrategy] = {}


def register_loss_strategy(
    name: str, *, couples: bool = True, unused: tuple[str, ...] = (), joint_forward: bool = False
) -> Callable[[LossFunction], LossFunction]:
    """Decorator: register a loss, a function from a `Step` to (B, chunk_size, max_action_dim), under `name`.

    Args:
        name: for `attach(strategy=...)`, `model.training_mode` and `--reflow.strategy`.
        couples, unused, joint_forward: see `LossStrategy`.

    Raises:
        ReflowError: the name is taken by another function, or `unused` names no field of a recipe.
    """
    for field in unused:
        if field not in Recipe.__dataclass_fields__:
            raise ReflowError(
                f"unused={field} is no field of a Recipe; {known_are(Recipe.__dataclass_fields__, field)}"
            )

    def decorator(function: LossFunction) -> LossFunction:
        taken = _registry.get(name)
        if taken is not None and taken.function is not function:
            raise ReflowError(f"A loss strategy named '{name}' is already registered; choose another name.")
        _registry[name] = LossStrategy(name, function, couples, unused, joint_forward)
        return function

    return decorator


def get_loss_strategy(name: str) -> LossStrategy:
    """Find a strategy: registered, of an installed package, or in a file, `path/to/file.py:name`.

    The file is run, with everything in it, once in a process.

    Raises:
        ReflowError: the name is unknown (the message lists the known ones), or the file cannot be run.
    """
    if name not in _registry:
        _load_entry_point(name)
    if name not in _registry and is_file_strategy(name):
        _registry[name] = _from_file(name)
    if str(name).endswith(".py"):
        raise ReflowError(f"strategy={name}: add the name of the loss in that file, strategy={name}:NAME.")
    if name not in _registry:
        raise ReflowError(f"Unknown loss strategy '{name}'; {known_are(available_loss_strategies(), name)}")
    return _registry[name]


def available_loss_strategies() -> tuple[str, ...]:
    """Names of all strategies, registered or declared by an installed package, in alphabetical order."""
    names = {*_registry, *entry_points(group=ENTRY_POINT_GROUP).names}
    return tuple(sorted(name for name in names if not is_file_strategy(name)))


def is_file_strategy(name: str) -> bool:
    """True if `name` is that of a loss in a file, `path/to/file.py:name`."""
    return str(name).rpartition(":")[0].endswith(".py")


def _load_entry_point(name: str) -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        function = entry_point.load()
        # Importing the module may have registered the function already, with options only its author knows.
        if name not in _registry:
            register_loss_strategy(name)(function)


def _from_file(name: str) -> LossStrategy:
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ReflowError(f"strategy={name}: there is no file {path}.")
    try:
        found = _run(file.resolve())
    except (Exception, SystemExit) as error:  # the file may do anything
        what = str(error) if isinstance(error, ReflowError) else f"{type(error).__name__}: {first_line(error)}"
        raise ReflowError(f"strategy={name}: {path} cannot be run ({what}).") from error
    if attribute not in found:
        raise ReflowError(f"strategy={name}: {path} has no loss '{attribute}'; {known_are(sorted(found), attribute)}")
    return replace(found[attribute], name=name)


@cache
def _run(file: Path) -> dict[str, LossStrategy]:
    """The losses of a file by name: its registered losses, and its other functions."""
    spec = spec_from_file_location(f"loss_in_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module, before = module_from_spec(spec), dict(_registry)
    sys.modules[spec.name] = module  # dataclasses look there for the module they stand in
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        for name in _registry.keys() - before.keys():  # so that the mended file can be run again
            del _registry[name]
        raise
    registered = {name: _registry[name] for name in _registry.keys() - before.keys()}
    by_function = {strategy.function: strategy for strategy in registered.values()}
    functions = {
        name: by_function.get(value, LossStrategy(name, value))
        for name, value in vars(module).items()
        if isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    return {**functions, **registered}


@register_loss_strategy(
    "standard",
    couples=False,
    unused=("time_sampling", "weighting", "padding_weight", "real_data_ratio", "scaled_noise"),
    joint_forward=True,
)
def standard(step: Step) -> Tensor:
    """Flow matching on recorded actions, as `lerobot-train` trains."""
    return step.losses(step.recorded())


@register_loss_strategy("reflow")
def reflow(step: Step) -> Tensor:
    """Flow matching on the teacher's couplings (arXiv 2209.03003, equation 1 with (X_0, X_1) = (Z_0, Z_1))."""
    return step.losses(step.coupling())


@register_loss_strategy("distill", unused=("time_sampling",))
def distill(step: Step) -> Tensor:
    """One-step distillation: reflow at t = 1 only (arXiv 2209.03003, section 3.2); more steps get worse by it."""
    return step.losses(step.coupling(), times="grid:1")
