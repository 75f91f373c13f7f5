"""Runs that break off: killed at any moment, out of disk, out of their minds. What is left, and how one goes on."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import reflow_run, reflow_train_main, refused
from safetensors.torch import load_file, save_file

from smolvla_reflow import Losses, register_loss_strategy
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.training.run_folder import how_to_go_on, is_whole, last_good, whole_checkpoints


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A run of four steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    reflow_train_main(reflow_run(workshop, folder, save_freq=1))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that believes to be where it is."""
    folder = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    for file in folder.glob("checkpoints/0*/pretrained_model/train_config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "output_dir": str(folder), "steps": 6}))
    return folder


def resume_flags(folder, step="last"):
    return [f"--config_path={folder}/checkpoints/{step}/pretrained_model/train_config.json", "--resume=true"]


# --- killed ---------------------------------------------------------------------------------------------------


def test_killed_at_ten_moments_it_always_goes_on(workshop, tmp_path):
    """Half of the kills wait for a checkpoint that is just being written. Ends with the steps that were asked for."""
    run = tmp_path / "run"
    flags = reflow_run(workshop, run, steps=60, save_freq=1, log_freq=1)
    script = f"""
        import os, random, signal, sys, time
        from pathlib import Path
        from smolvla_reflow.commands import train
        from smolvla_reflow.training.run_folder import training_step, whole_checkpoints

        run, rng = Path({str(run)!r}), random.Random(0)
        resume = ["--config_path=" + str(run / "checkpoints/last/pretrained_model/train_config.json"), "--resume=true"]
        begun = lambda: set(run.glob("checkpoints/0*"))
        reached = lambda: next((training_step(c) for c in whole_checkpoints(run)), 0)

        def start():
            child = os.fork()
            if child:
                return child
            try:
                train.main(resume if reached() else {flags!r})
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)

        steps = []
        for kill in range(10):
            before, had, child = begun(), reached(), start()
            while len(begun() - before) < 1 + (kill % 3):  # re-written ones are no new folders
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05 if kill % 2 else 0.5))
            newest = max(begun())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            steps.append(reached())
            assert steps[-1] >= max(had, int(newest.name) - 1), (steps, newest)
        print(steps, file=sys.stderr)
        assert os.waitpid(start(), 0)[1] == 0
        assert reached() == 60
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert is_whole(run / "checkpoints/last")
    assert all(torch.isfinite(t).all() for t in load_file(run / LAST / "model.safetensors").values())


@pytest.mark.parametrize("broken", ["no last", "last is torn"])
def test_resuming_last_takes_the_newest_whole_checkpoint(run, broken):
    """LeRobot takes `last` away before it makes it anew; a kill in between leaves none."""
    last = run / "checkpoints/last"
    if broken == "no last":
        last.unlink()
        newest = "000004"
    else:
        (last / "training_state/scheduler_state.json").unlink()
        newest = "000003"
    assert next(whole_checkpoints(run)).name == newest
    reflow_train_main(resume_flags(run))
    assert (run / "checkpoints/000006").is_dir()
    assert is_whole(last)


def test_a_torn_checkpoint_is_refused_and_the_whole_one_named(run, capsys):
    weights = run / "checkpoints/000004/pretrained_model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(capsys, reflow_train_main, resume_flags(run, "000004"))
    assert "does not belong to a whole checkpoint" in line
    assert f"The newest whole one of that run is --config_path={run}/checkpoints/000003/" in line
    shutil.rmtree(run / "checkpoints/000003")
    for step in ("000001", "000002"):
        (run / f"checkpoints/{step}/training_state/training_step.json").write_text("{")
    assert "That run has none." in refused(capsys, reflow_train_main, resume_flags(run, "000004"))


# --- a loss that is lost --------------------------------------------------------------------------------------


@pytest.fixture
def losing(registry):
    """A strategy whose losses are spoilt by `spoil` in the call numbered `at` and later."""

    def make(at, spoil):
        registry.pop("losing", None)
        calls = iter(range(1, 100))

        @register_loss_strategy("losing")
        def losing(step):
            values = step.losses(step.recorded()).values
            return Losses(spoil(values) if next(calls) >= at else values)

    return make


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda losses: losses * math.nan, "nan"),
        (lambda losses: losses + math.inf, "inf"),
        (lambda losses: losses * 1e6, "e+0"),
    ],
    ids=["nan", "inf", "exploding"],
)
def test_a_lost_loss_stops_the_run(workshop, tmp_path, capsys, losing, spoil, said):
    losing(at=3, spoil=spoil)
    run = tmp_path / "run"
    line = refused(capsys, reflow_train_main, reflow_run(workshop, run, save_freq=1, reflow__strategy="losing"))
    assert said in line.partition(" in step 3, so the run was stopped")[0]
    hint = f"Go on from the last good checkpoint with --config_path={run}/checkpoints/000002/pretrained_model/train_config.json --resume=true"
    assert hint in line
    losing(at=2, spoil=spoil)
    assert "in step 4, so the run was stopped" in refused(capsys, reflow_train_main, hint.partition("with ")[2].split())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"000001", "000002", "000003", "last"}


def test_an_absurd_learning_rate(workshop, tmp_path, capsys):
    rates = {"policy__optimizer_lr": 1e6, "policy__scheduler_warmup_steps": 0}
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", steps=20, save_freq=1, **rates))
    assert "A lower --policy.optimizer_lr helps" in line
    assert "in step 2, so" in line


def test_the_last_good_checkpoint_has_finite_weights(run):
    assert last_good(run).name == "000004"
    file = run / "checkpoints/000004/pretrained_model/model.safetensors"
    weights = load_file(file)
    weights["model.action_out_proj.bias"] *= float("nan")
    save_file(weights, file)
    assert last_good(run).name == "000003"
    assert "/000003/pretrained_model/train_config.json --resume=true" in how_to_go_on(run)
    assert how_to_go_on(run, ["--reflow.strategy=f.py:x"]).endswith(" --resume=true --reflow.strategy=f.py:x")
    shutil.rmtree(run / "checkpoints")
    assert last_good(run) is None
    assert "No checkpoint was saved yet" in how_to_go_on(run)


# --- disks ----------------------------------------------------------------------------------------------------


def test_a_full_disk(workshop, tmp_path, capsys):
    """Files may grow to 50 kB: the configuration fits, the weights do not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"--output_dir={tmp_path}/run: " in line
    assert "No checkpoint was saved yet" in line
