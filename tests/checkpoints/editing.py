"""Changes to the files of a checkpoint and of a dataset."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers import eval_flags, reflow_run, reflow_train_main
from pairs_helpers import pairs_flags
from safetensors.torch import load_file, save_file

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import pairs as pairs_command

PREPROCESSOR = "policy_preprocessor.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_step(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change one step of the saved preprocessor."""
    edit(folder / PREPROCESSOR, lambda s: [change(step) for step in s["steps"] if step["registry_name"] == name])


def tokenizer_at(name: str) -> Callable[[dict[str, Any]], None]:
    """A change of the step: its tokenizer is at `name`, and not inside the checkpoint as from LeRobot 0.6.2 on."""

    def change(step: dict[str, Any]) -> None:
        step["config"]["tokenizer_name"] = name
        step.pop("artifacts", None)

    return change


def add_step(file: Path, step: dict[str, Any]) -> None:
    """Put a step in front of those of a saved processor."""
    edit(file, lambda saved: saved["steps"].insert(0, step))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def doubled(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.mul_(2)


def state_file(folder: Path) -> Path:
    (file,) = folder.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    return file


EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
COMMANDS: dict[str, tuple[Callable, Callable[..., list[str]]]] = {
    "train": (reflow_train_main, lambda workshop, out, **changes: reflow_run(workshop, output_dir=out, **changes)),
    "pairs": (pairs_command.main, pairs_flags),
    "eval": (eval_command.main, eval_flags),
}
Change = Callable[[Path], object]  # of a dataset's folder


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda root: edit(root / name, change)


def info(**changes: Any) -> Change:
    return edited("meta/info.json", lambda content: content.update(changes))


def stats(change: Callable[[dict[str, Any]], object]) -> Change:
    return edited("meta/stats.json", change)


def gone(name: str) -> Change:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Change:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-200])


def rows(name: str, start: int, stop: int, to: str | None = None) -> Change:
    return lambda root: pq.write_table(pq.read_table(root / name)[start:stop], root / (to or name))


def column(file: str, name: str, change: Callable[[list], Sequence]) -> Change:
    def apply(root: Path) -> None:
        table = pq.read_table(root / file)
        field = table.schema.field(name)
        values = pa.array(change(table[name].to_pylist()), field.type)
        pq.write_table(table.set_column(table.schema.get_field_index(name), field, values), root / file)

    return apply
