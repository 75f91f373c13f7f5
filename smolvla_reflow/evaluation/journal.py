"""The finished parts of an evaluation, kept until its report is complete: the same command goes on with the others.

    with Journal(folder, key) as journal:
        journal.recall("episodes of the student at num_steps=2", run_the_episodes)    runs them, or reads what they gave

Each part is a JSON file. `key.json` beside them holds everything that the numbers depend on (`key.py`), so no report
mixes two evaluations. A lock keeps a second command out.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from smolvla_reflow.errors import ReflowError, doing, sole_use, write_json

NAME, KEY = "unfinished", "key.json"


class Journal:
    """The finished parts of one evaluation.

    Attributes:
        key: everything that they depend on, as JSON has it.
        parts: the result of each part by its name, as JSON has it.
    """

    def __init__(self, output_dir: Path, key: Mapping[str, Any]):
        self.folder = output_dir / NAME
        self.key: dict[str, Any] = json.loads(json.dumps(key))
        self.parts: dict[str, Any] = {}
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Journal":
        """Lock and read the journal in this folder. Raises ReflowError if another command uses it, or began it."""
        where = f"--output_dir={self.folder.parent}"
        busy = f"Another smolvla-reflow-eval is at work in {where}; wait for it to end, or name another folder."
        with doing(f"writing to {where}"):
            self._held.enter_context(sole_use(self.folder, busy))
        try:
            with doing(f"reading {self.folder} (remove {self.folder.parent} to begin anew)"):
                self.parts = {file.stem: json.loads(file.read_text()) for file in self.folder.glob("*.json")}
            if self.parts:
                self._check(self.parts.pop(Path(KEY).stem, {}))
        except ReflowError:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let other commands in. Empty folders that this command made disappear."""
        self._release()

    def _check(self, earlier: Mapping[str, Any]) -> None:
        unlike = [
            f"{name} was {json.dumps(earlier.get(name))} and is {json.dumps(self.key.get(name))}"
            for name in {**earlier, **self.key}
            if earlier.get(name) != self.key.get(name)
        ]
        if unlike:
            raise ReflowError(
                f"--output_dir={self.folder.parent} holds another evaluation, which is unfinished "
                f"({'; '.join(unlike)}). Name a new folder, or remove this folder."
            )

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

    def _release(self) -> None:
        self._held.close()
        with contextlib.suppress(OSError):  # it holds something, or is gone
            self.folder.rmdir()
