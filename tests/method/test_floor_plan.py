"""Which module may import which: everything points one way, from the commands down to solver, times and noise."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "smolvla_reflow"

# From the top down. A module may import from its own room and from the floors below it; two rooms on one floor know
# nothing of each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("training", "evaluation", "demo"),
    ("attach",),
    ("sharing",),
    ("losses", "reduction", "pairs", "dataset"),
    ("step",),
    ("coupling", "recipe", "monitor"),
    ("smolvla",),
    ("solver", "times", "noise", "metrics"),
    ("compat", "files"),
    ("errors",),
)
ALLOWED_BESIDE = {
    ("pairs", "dataset"): "the frames to make pairs of",
}


def room(module: str) -> str:
    """The file or folder right under the package that a module stands in."""
    return module.split(".")[1]


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("smolvla_reflow"):
            # `from smolvla_reflow import x` and `from smolvla_reflow.wing import x` may name a module as x.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("smolvla_reflow.")}
    return found


def files() -> dict[str, list[Path]]:
    """All files by room."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "__init__.py":
            found.setdefault(file.relative_to(PACKAGE).with_suffix("").parts[0], []).append(file)
    return found


def test_every_room_has_a_floor():
    assert set(files()) == {name for floor in FLOORS for name in floor}


def test_imports_are_found():
    assert {"smolvla_reflow.losses.get_loss_strategy", "smolvla_reflow.step.Step"} <= imports(PACKAGE / "attach.py")


def test_imports_point_one_way():
    height = {name: len(FLOORS) - i for i, floor in enumerate(FLOORS) for name in floor}
    wrong = []
    for here, its_files in files().items():
        for file in its_files:
            for module in imports(file):
                there = room(module)
                beside = height[there] == height[here] and (here, there) not in ALLOWED_BESIDE
                if there != here and (height[there] > height[here] or beside):
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert not wrong, wrong


def test_the_method_stands_flat_on_top():
    flat = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert {"coupling", "times", "solver", "noise", "recipe", "step", "losses", "attach"} <= flat
    assert len(flat) <= 15
