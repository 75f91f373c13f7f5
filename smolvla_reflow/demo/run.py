"""The demo, stage by stage: record, train the teacher, reflow it, measure both, draw the picture."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.driving import draw_paths, repeated_drives
from smolvla_reflow.demo.flags import LAST, evaluation_flags, one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.task import DEMONSTRATIONS, Scene, write_dataset
from smolvla_reflow.errors import ReflowError

MODULES = {
    "lerobot-train": "lerobot.scripts.lerobot_train",
    "smolvla-reflow-train": "smolvla_reflow.commands.train",
}
PICTURED = 60
EVALUATION_SEED = 1000  # gives scenes that no demonstration shows


def run_demo(folder: Path, seed: int, measure: Callable[[list[str]], object]) -> None:
    """Run the whole demo in a new folder.

    `seed` is that of both trainings and of the policies' noise; `measure` is `smolvla-reflow-eval`, called with flags.
    """
    print(f"[1/4] Recording {DEMONSTRATIONS} demonstrations of driving past an obstacle, above or below it")
    with quiet():
        write_dataset(folder / "dataset", DEMONSTRATIONS)
        write_backbone(folder / "backbone")
    print("[2/4] Training the teacher (1-RF) with LeRobot")
    run_training("lerobot-train", [*one_rectified_flow_flags(folder), f"--seed={seed}"], folder / "1rf.log")
    print("[3/4] Reflowing it: the student (2-RF) learns the teacher's couplings of noise and actions")
    run_training("smolvla-reflow-train", [*reflow_flags(folder), f"--seed={seed}"], folder / "2rf.log")
    print("[4/4] Measuring both, on recorded frames and in the simulator, in scenes that no demonstration shows")
    flags = [*evaluation_flags(folder), f"--seed={EVALUATION_SEED + seed}"]
    print("$ " + shlex.join(["smolvla-reflow-eval", *flags]))
    measure(flags)
    draw_picture(folder, seed)


def run_training(program: str, flags: Sequence[str], log_file: Path) -> None:
    """Run a training command in a separate process, as a user would, with its output in `log_file`."""
    print("$ " + shlex.join([program, *flags]))
    # Two loader processes feed the training: one computing thread each is faster on few cores.
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **os.environ}
    command = [sys.executable, "-m", MODULES[program], *flags]
    total = next(int(flag.partition("=")[2]) for flag in flags if flag.startswith("--steps="))
    with (
        log_file.open("wb") as log,
        tqdm(total=total, desc="      training", unit="step", mininterval=1.0) as bar,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        while output := os.read(process.stdout.fileno(), 65536):
            log.write(output)
            log.flush()
            for done in re.findall(rb"Training: .*?(\d+)/\d+ \[", output)[-1:]:
                bar.update(int(done) - bar.n)
        code = process.wait()
        bar.update(total - bar.n if code == 0 else 0)
    if code != 0:
        lines = [line for line in re.split(r"[\r\n]+", log_file.read_text(errors="replace")) if line.strip()]
        raise ReflowError(
            f"{program} failed: {lines[-1] if lines else 'no output'} (its whole output is in {log_file})"
        )


def draw_picture(folder: Path, seed: int) -> None:
    """Draw many drives of the same scene, by teacher and student."""
    scene = Scene(start_y=0.0, obstacle_y=0.0)
    checkpoints = {"teacher": folder / "1rf" / LAST, "student": folder / "2rf" / LAST}
    with quiet():
        panels = {
            f"{name}, {n} step{'s' * (n > 1)}": repeated_drives(checkpoints[name], scene, n, PICTURED, seed)
            for name, n in (("teacher", 10), ("teacher", 1), ("student", 1))
        }
    draw_paths(panels, folder / "paths.png")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what LeRobot prints, and its dataset library's progress bar for each episode."""
    disable_progress_bars()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        enable_progress_bars()
