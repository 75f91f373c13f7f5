"""An error that nobody foresaw, thrown at random places of LeRobot: one sentence, exit code 2, and nothing lost."""

import errno
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import lerobot
import pytest
from helpers import reflow_run, reflow_train_main

from smolvla_reflow.checkpoint.run_folder import complete_checkpoints, is_complete

pytestmark = pytest.mark.slow
PROGRAM = "smolvla-reflow-train: error: "
LEROBOT = str(Path(lerobot.__file__).parent)
ERRORS = [
    RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA\n"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("observation.state"),
    AssertionError(),
    MemoryError(),
    NotImplementedError("not yet\n\nsee issue 1"),
]


class Thrower:
    """A profiler that counts the calls of LeRobot's functions, and throws `error` in one call of one of them."""

    def __init__(self, function=None, call=0, error=None):
        self.calls, self.function, self.call, self.error = Counter(), function, call, error

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(LEROBOT):
            name = (code.co_filename, code.co_qualname if sys.version_info >= (3, 11) else code.co_name)
            self.calls[name] += 1
            if name == self.function and self.calls[name] == self.call:
                raise self.error

    def profile(self, flags):
        sys.setprofile(self)
        try:
            reflow_train_main(flags)
        finally:
            sys.setprofile(None)


def ended_with(command, capsys):
    """The exit code of a command."""
    capsys.readouterr()
    try:
        command()
    except SystemExit as exit:
        return exit.code
    return 0


def test_twenty_errors(workshop, tmp_path, capsys):
    """Functions that LeRobot calls while it loads, steps and saves; a call of each, and an error, drawn at random."""
    seen, rng = Thrower(), random.Random(0)
    seen.profile(reflow_run(workshop, tmp_path / "seen", steps=3, save_freq=1))
    ended = 0
    for k, function in enumerate(rng.sample(sorted(seen.calls), 20)):
        error = ERRORS[k % len(ERRORS)]
        thrower, run = Thrower(function, rng.randint(1, seen.calls[function]), error), tmp_path / str(k)
        code = ended_with(partial(thrower.profile, reflow_run(workshop, run, steps=3, save_freq=1)), capsys)
        lines = [line for line in capsys.readouterr().err.splitlines() if PROGRAM in line]  # maybe after a bar
        if code == 0:  # LeRobot went on without what failed
            assert is_complete(run / "checkpoints/000003"), function
            continue
        ended += 1
        (said,) = lines
        assert code == 2, (function, said)
        assert type(error).__name__ in said, (function, said)
        assert run.exists() == ("--config_path=" in said or "No checkpoint was saved yet" in said), (function, said)
        saved = list(complete_checkpoints(run))
        assert not saved or f"--config_path={saved[0]}" in said, (function, said)
    assert ended >= 15
