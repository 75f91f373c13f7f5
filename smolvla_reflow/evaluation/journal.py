"""The finished parts of an evaluation, kept until its report is complete: the same command goes on with the others.

    with journal_in(folder, key) as journal:
        journal.recall("episodes of the student at num_steps=2", run_the_episodes)    runs them, or reads what they gave

Each part is a JSON file. `key.json` beside them holds everything that the numbers depend on (`key.py`), so no report
mixes two evaluations. A lock keeps a second command out.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import ReflowError, doing, sole_use, write_json

NAME, KEY = "unfinished", "key.json"


@dataclass
class Journal:
    """The finished parts of one evaluation."""

    folder: Path
    key: dict[str, Any]  # everything that they depend on, as JSON has it
    parts: dict[str, Any]  # the result of each part by its name, as JSON has it

    def recall(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this part; an unfinished part is run first, and its result written."""
        if name not in self.parts:
            result = measure()
            with doing(f"writing to --output_dir={self.folder.parent}"):
                if not self.parts:
                    write_json(self.folder / KEY, self.key)
                file = self.folder / f"{name}.json"
                write_json(file, result)
                self.parts[name] = json.loads(file.read_text())
        return self.parts[name]

    def remove(self) -> None:
        """Remove the files of a finished evaluation."""
        for file in self.folder.glob("*.json*"):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def journal_in(output_dir: Path, key: Mapping[str, Any]) -> Iterator[Journal]:
    """Lock and read the journal in this folder. Raises ReflowError if another command uses it, or began it.

    Empty folders that this command made disappear at the end.
    """
    folder, where = output_dir / NAME, f"--output_dir={output_dir}"
    busy = f"Another smolvla-reflow-eval is at work in {where}; wait for it to end, or name another folder."
    with contextlib.ExitStack() as held:
        held.callback(_remove_if_empty, folder)
        with doing(f"writing to {where}"):
            held.enter_context(sole_use(folder, busy))
        with doing(f"reading {folder} (remove {output_dir} to begin anew)"):
            parts = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
        now = json.loads(json.dumps(key))
        then = parts.pop(Path(KEY).stem, {}) if parts else now
        unlike = [
            f"{name} was {json.dumps(then.get(name))} and is {json.dumps(now.get(name))}"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if unlike:
            raise ReflowError(
                f"{where} holds another evaluation, which is unfinished ({'; '.join(unlike)}). Name a new folder, or "
                "remove this folder."
            )
        yield Journal(folder, now, parts)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something, or is gone
        folder.rmdir()
