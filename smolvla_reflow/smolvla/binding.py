"""Bind attributes onto one module instance, and take them off again without residue.

LeRobot uses the same slot when it compiles a policy (`self.forward = ...`): the instance's `vars()`. `bind` goes past
`nn.Module.__setattr__`, which would turn a module among the attributes into a submodule.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Binding:
    """A change that `bind` made on one module."""

    module: nn.Module  # the instance
    names: tuple[str, ...]  # the attributes that were bound
    displaced: dict[str, Any]  # those entries of `vars(module)` that they replaced

    def undo(self) -> None:
        """Restore `vars(module)`, in its order."""
        for name in self.names:
            if name in self.displaced:
                vars(self.module)[name] = self.displaced[name]
            else:
                vars(self.module).pop(name, None)


def bind(module: nn.Module, **attributes: Any) -> Binding:
    """Bind `attributes` onto this instance."""
    present = vars(module)
    binding = Binding(
        module=module,
        names=tuple(attributes),
        displaced={name: present[name] for name in attributes if name in present},
    )
    present.update(attributes)
    return binding
