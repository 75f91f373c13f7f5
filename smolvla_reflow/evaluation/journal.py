"""What an evaluation has measured so far, in a file that grows: the same command goes on where it was broken off.

    journal.recall("episodes: student at 2 steps", run_the_episodes)     runs them, or reads what they gave

The file has a line for each part that is finished: its name, and what it gave, as JSON. The first line says what is
evaluated and how.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smolvla_reflow.errors import ReflowError

NAME = "unfinished.jsonl"


class Journal:
    """The finished parts of one evaluation.

    Attributes:
        setup: what is evaluated and how, as JSON has it.
        parts: what each has given, by its name, as JSON has it.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any]):
        """Open the journal of this folder, if there is one; nothing is written yet.

        Args:
            folder: of the report.
            setup: what is evaluated and how.

        Raises:
            ReflowError: the folder holds a journal of another evaluation, or one that cannot be read.
        """
        self.file = folder / NAME
        self.setup: dict[str, Any] = json.loads(json.dumps(setup))
        self.parts: dict[str, Any] = {}
        self._whole = 0  # bytes up to the end of the last line that was written whole
        if self.file.is_file():
            self._read()

    def recall(self, name: str, measure: Callable[[], Any]) -> Any:
        """What the part of this name gave; if it is not finished, run it, and note what it gives.

        Raises:
            ReflowError: the file cannot be written.
        """
        if name not in self.parts:
            self._note({name: measure()})
        return self.parts[name]

    def close(self) -> None:
        """The evaluation is finished, and the journal of no more use."""
        self.file.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            text = self.file.read_bytes()
            self._whole = text.rfind(b"\n") + 1  # what comes after was being written when the command was broken off
            setup, *parts = [json.loads(line) for line in text[: self._whole].splitlines()] or [self.setup]
        except (OSError, ValueError) as error:
            raise ReflowError(f"{self.file} cannot be read ({error}); remove it to begin anew.") from None
        unlike = [
            f"{name} is {setup.get(name)} there and {self.setup.get(name)} here"
            for name in {**setup, **self.setup}
            if setup.get(name) != self.setup.get(name)
        ]
        if unlike:
            raise ReflowError(
                f"--output_dir={self.file.parent} holds an evaluation that was broken off, and is another one "
                f"({'; '.join(unlike)}). Name a new folder, or remove that one."
            )
        for part in parts:
            self.parts.update(part)

    def _note(self, part: dict[str, Any]) -> None:
        part = json.loads(json.dumps(part))
        lines = [] if self._whole else [self.setup]
        text = "".join(json.dumps(line) + "\n" for line in (*lines, part)).encode()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("r+b" if self.file.exists() else "wb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ReflowError(f"--output_dir={self.file.parent} cannot be written ({error}).") from None
        self._whole += len(text)
        self.parts.update(part)
