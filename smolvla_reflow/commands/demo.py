"""`smolvla-reflow-demo`: train, reflow and measure a small SmolVLA, in a few minutes on a laptop CPU, offline.

The demo records a small dataset of a task that can be done in two ways, trains a SmolVLA on it with `lerobot-train`,
reflows that checkpoint with `smolvla-reflow-train`, and measures both with `smolvla-reflow-eval` at 1, 2, 5 and 10
steps.
"""

import contextlib
import datetime as dt
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import draccus
from datasets import disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands.console import asks_for_help, parse_errors, reported_errors
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.driving import repeated_drives
from smolvla_reflow.demo.flags import LAST, evaluation_flags, one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.picture import draw_paths
from smolvla_reflow.demo.task import Scene, write_dataset
from smolvla_reflow.errors import ReflowError

PROGRAM = "smolvla-reflow-demo"
MODULES = {
    "lerobot-train": "lerobot.scripts.lerobot_train",
    "smolvla-reflow-train": "smolvla_reflow.commands.train",
}
DEMONSTRATIONS = 200
PICTURED = 60
EVALUATION_SEED = 1000  # gives scenes that no demonstration shows


@dataclass
class DemoConfig:
    output_dir: Path | None = None
    """Folder for everything the demo makes; must not exist yet. By default outputs/demo/DATE/TIME."""
    seed: int = 0
    """Seed of both trainings and of the noise from which the policies act."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        asks_for_help(argv, __doc__)
        with parse_errors():
            cfg = draccus.parse(DemoConfig, args=argv)
        run(cfg)


def run(cfg: DemoConfig) -> None:
    """Run the whole demo."""
    start = time.monotonic()
    folder = cfg.output_dir or Path("outputs/demo") / f"{dt.datetime.now():%Y-%m-%d/%H-%M-%S}"
    if folder.exists():
        raise ReflowError(f"--output_dir={folder} exists already; name a new folder or remove that one.")
    folder = folder.resolve()

    print(f"[1/4] Recording {DEMONSTRATIONS} demonstrations of driving past an obstacle, above or below it")
    with quiet():
        write_dataset(folder / "dataset", DEMONSTRATIONS)
        write_backbone(folder / "backbone")
    print("[2/4] Training the teacher (1-RF) with LeRobot")
    train("lerobot-train", [*one_rectified_flow_flags(folder), f"--seed={cfg.seed}"], folder / "1rf.log")
    print("[3/4] Reflowing it: the student (2-RF) learns the teacher's couplings of noise and actions")
    train("smolvla-reflow-train", [*reflow_flags(folder), f"--seed={cfg.seed}"], folder / "2rf.log")
    print("[4/4] Measuring both, on recorded frames and in the simulator, in scenes that no demonstration shows")
    flags = [*evaluation_flags(folder), f"--seed={EVALUATION_SEED + cfg.seed}"]
    print("$ " + shlex.join(["smolvla-reflow-eval", *flags]))
    eval_command.main(flags)
    picture(folder, cfg.seed)
    print(f"Picture: {folder / 'paths.png'}")
    print(f"Student: {folder / '2rf' / LAST} (a stock SmolVLA checkpoint)")
    print(f"The demo took {time.monotonic() - start:.0f} s.")


def train(program: str, flags: Sequence[str], log_file: Path) -> None:
    """Run a training command in a process of its own, as a user would, with its output in `log_file`.

    Raises:
        ReflowError: it failed; the message quotes its last line.
    """
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


def picture(folder: Path, seed: int) -> None:
    """Draw many drives of the same scene, by teacher and student."""
    scene = Scene(start_y=0.0, obstacle_y=0.0)
    checkpoints = {"teacher": folder / "1rf" / LAST, "student": folder / "2rf" / LAST}
    with quiet():
        panels = {
            f"{name}, {num_steps} step{'s' if num_steps > 1 else ''}": repeated_drives(
                checkpoints[name], scene, num_steps, PICTURED, seed
            )
            for name, num_steps in (("teacher", 10), ("teacher", 1), ("student", 1))
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


if __name__ == "__main__":
    main()
