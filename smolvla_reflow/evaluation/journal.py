"""The finished parts of an evaluation, kept until its report is complete: the same command goes on with the others.

    journal.recall("episodes of the student at num_steps=2", run_the_episodes)     runs them, or reads what they gave

Each part is a JSON file. `setup.json` beside them says what is evaluated and how.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import ReflowError, doing, write_json

NAME, SETUP = "unfinished", "setup.json"


class Journal:
    """The finished parts of one evaluation.

    Attributes:
        setup: what is evaluated and how, as JSON has it.
        parts: the result of each part by its name, as JSON has it.
    """

    def __init__(self, output_dir: Path, setup: Mapping[str, Any]):
        """Read the journal in this folder, if there is one. Raises ReflowError if it is of another evaluation."""
        self.folder = output_dir / NAME
        self.setup: dict[str, Any] = json.loads(json.dumps(setup))
        self.parts: dict[str, Any] = {}
        if (self.folder / SETUP).is_file():
            with doing(f"reading {self.folder} (remove {output_dir} to begin anew)"):
                self.parts = {file.stem: json.loads(file.read_text()) for file in self.folder.glob("*.json")}
            self._check(self.parts.pop("setup"))

    def _check(self, earlier: Mapping[str, Any]) -> None:
        unlike = [
            f"{name} was {earlier.get(name)} and is {self.setup.get(name)}"
            for name in {**earlier, **self.setup}
            if earlier.get(name) != self.setup.get(name)
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
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self.parts:
                    write_json(self.folder / SETUP, self.setup)
                file = self.folder / f"{name}.json"
                write_json(file, result)
                self.parts[name] = json.loads(file.read_text())
        return self.parts[name]

    def close(self) -> None:
        """Remove the files of a finished evaluation."""
        shutil.rmtree(self.folder, ignore_errors=True)
