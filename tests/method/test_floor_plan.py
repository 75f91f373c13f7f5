"""Which module may import which: everything points one way, and LeRobot's version is asked in one place."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "smolvla_reflow"

# From the top down. A module may import from its own room and from the floors below it; two rooms on one floor know
# nothing of each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("training", "evaluation", "demo"),
    ("attachment",),
    ("reduction", "pairs"),
    ("losses", "dataset"),
    ("step",),
    ("teacher", "distance"),
    ("coupling", "recipe", "step_metrics"),
    ("smolvla",),
    ("checkpoint",),
    ("solver", "times", "noise"),
    ("compat",),
    ("errors",),
)


def name_of(file: Path) -> str:
    return ".".join(("smolvla_reflow", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, also within a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from smolvla_reflow.wing import x` may name a module as x.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in MODULES and module != name_of(file)}


def room(module: str) -> str:
    """The file or folder right under the package that a module stands in."""
    return module.split(".")[1]


IN_ROOMS = {module: file for module, file in MODULES.items() if module != "smolvla_reflow"}


def test_every_room_has_a_floor():
    assert {room(module) for module in IN_ROOMS} == {name for floor in FLOORS for name in floor}


def test_imports_are_found():
    assert {"smolvla_reflow.losses", "smolvla_reflow.step"} <= imports(PACKAGE / "attachment.py")
    assert "smolvla_reflow.checkpoint.read" in imports(PACKAGE / "checkpoint" / "load.py")


def test_imports_point_one_way():
    height = {name: -i for i, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{module} imports {imported}"
        for module, file in IN_ROOMS.items()
        for imported in imports(file) - {"smolvla_reflow"}
        if room(imported) != room(module) and height[room(imported)] >= height[room(module)]
    ]
    assert not wrong, wrong


def test_no_circle_of_imports_also_within_a_room():
    below: dict[str, set[str]] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in below:
            for imported in imports(MODULES[module]):
                visit(imported, (*path, module))
            below[module] = imports(MODULES[module])

    for module in MODULES:
        visit(module, ())


def test_the_method_stands_flat_on_top():
    flat = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert {"coupling", "teacher", "times", "solver", "noise", "recipe", "step", "losses", "attachment"} <= flat
    assert len(flat) <= 15


# Where a missing attribute is no question about LeRobot's version.
NO_VERSION = {
    "base_policy": "a PEFT wrapper, or DDP",
    "_copy_sharing_parameters": "modules of any kind",
    "detach": "a function or another callable",
}
ASKS_VERSION = re.compile(r"lerobot\.__version__|\bVersion\(")


@pytest.mark.parametrize("module", [name for name in IN_ROOMS if name != "smolvla_reflow.compat"])
def test_lerobots_version_is_asked_in_compat_alone(module):
    """A `getattr` with a default, or a `hasattr`, on one of LeRobot's objects is a version check in disguise."""
    text = IN_ROOMS[module].read_text()
    assert not ASKS_VERSION.search(text)
    asks = []
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and function.name not in NO_VERSION:
            for node in ast.walk(function):
                name = getattr(getattr(node, "func", None), "id", "")
                if name == "hasattr" or (name == "getattr" and len(node.args) == 3):
                    asks.append(f"{function.name}: {ast.unparse(node)}")
    assert not asks, asks
