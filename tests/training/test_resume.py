"""How a run goes on: what a path may mean, runs that broke off at any moment, and what is said about it."""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import reflow_run, reflow_train_main, refused, saved_weights
from people import edit_json, read_json
from safetensors.torch import load_file, save_file

from smolvla_reflow import register_loss_strategy
from smolvla_reflow.checkpoint.run_folder import complete_checkpoints, find_config, is_complete
from smolvla_reflow.compat import resumes_from_hub
from smolvla_reflow.solver import Solver
from smolvla_reflow.training.arguments import complete
from smolvla_reflow.training.run import Run
from smolvla_reflow.training.run_folder import how_to_go_on, last_good

CONFIG = "pretrained_model/train_config.json"


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A run of three steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    reflow_train_main(reflow_run(workshop, folder, steps=3, save_freq=1))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that takes its own folder for its own."""
    folder = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    for file in folder.glob("checkpoints/0*/pretrained_model/train_config.json"):
        edit_json(file, output_dir=str(folder))
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def resume_flags(folder, step="last", *more):
    return [f"--config_path={folder}/checkpoints/{step}/{CONFIG}", "--resume=true", *more]


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("", "last"),
        ("checkpoints", "last"),
        ("checkpoints/last", "last"),
        ("checkpoints/000001", "000001"),
        ("checkpoints/000001/pretrained_model", "000001"),
        (f"checkpoints/000001/{CONFIG}", "000001"),
        ("checkpoints/000001/pretrained_model/config.json", "000001"),
    ],
)
def test_every_way_to_name_a_checkpoint(run, path, step, monkeypatch):
    expected = run / "checkpoints" / step / CONFIG
    assert find_config(run / path) == expected
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("HOME", str(run.parent))
    for named in (f"run/{path}", f"~/run/{path}"):
        given = complete(["--resume=true", f"--config_path={named}"]).by_name
        assert given["config_path"] == str(expected)


def test_a_run_among_other_checkpoints(run, tmp_path):
    """Its own folder may lie in one of that name, and be a number."""
    (tmp_path / "checkpoints").mkdir()
    moved = run.rename(tmp_path / "checkpoints" / "2026")
    assert find_config(moved) == moved / "checkpoints/last" / CONFIG


@pytest.mark.parametrize(("gone", "newest"), [("", "000003"), ("training_state/scheduler_state.json", "000002")])
def test_where_last_is_of_no_use_the_newest_complete_checkpoint_is_meant(run, gone, newest):
    """LeRobot takes `last` away before it makes it anew; a kill in between leaves none, or one that is cut off."""
    last = run / "checkpoints/last"
    (last / gone).unlink()
    for path in ("", "checkpoints", "checkpoints/last", f"checkpoints/last/{CONFIG}"):
        assert find_config(run / path) == run / "checkpoints" / newest / CONFIG
    reflow_train_main(resume_flags(run, "last", "--steps=4"))
    assert os.readlink(last) == "000004"
    assert is_complete(last)


def test_a_checkpoint_is_complete_if_no_file_is_cut_off_and_the_last_one_is_there(run):
    checkpoint = run / "checkpoints/000002"
    assert next(complete_checkpoints(run)).name == "000003"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) >= 12
    for path in files:
        content = path.read_bytes()
        cut(path)
        assert not is_complete(checkpoint), path
        path.write_bytes(content)
    assert is_complete(checkpoint)
    (checkpoint / "training_state/scheduler_state.json").unlink()
    assert not is_complete(checkpoint)
    edit_json(checkpoint / CONFIG, scheduler=None)
    assert is_complete(checkpoint)


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("nowhere.json", [], "--config_path=nowhere.json holds no checkpoint of a training run: there is no "),
        ("run/wandb", [], "run/wandb holds no checkpoint of a training run"),
        ("{workshop}/1rf", [], "names no teacher"),  # that of a run which was not reflow
        ("run", ["--policy.path=elsewhere"], "--policy.path is for a new run"),
        ("run", ["--frobnicate=3"], "unrecognized arguments: --frobnicate=3"),
    ],
)
def test_flags_that_cannot_resume(workshop, run, path, more, said, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    path = path.format(workshop=workshop)
    assert said in refused(capsys, reflow_train_main, ["--resume=true", f"--config_path={path}", *more])


def test_the_flags_of_a_resumed_run_are_repeated(run):
    """Its last checkpoint was saved before they were typed."""
    cfg = SimpleNamespace(output_dir=run, reflow=SimpleNamespace(strategy="reflow"))

    def said(*argv):
        return Run(cfg, complete(argv), *[None] * 4).how_to_continue()

    resumed = said("--resume=true", f"--config_path={run}", "--steps=9", "--job_name=a b")
    assert resumed.endswith(f"--config_path={run}/checkpoints/000003/{CONFIG} --resume=true --steps=9 '--job_name=a b'")
    plugin = "--env.discover_packages_path=my_envs"
    cfg.reflow.strategy = "/mine.py:x"
    new = said("--reflow.teacher_path=T", "--dataset.repo_id=ID", "--steps=9", plugin)
    assert new.endswith(f"--resume=true {plugin} --reflow.strategy=/mine.py:x")


@pytest.mark.parametrize("name", ["pretrained_model/model.safetensors", "training_state/optimizer_state.safetensors"])
def test_the_last_good_checkpoint_is_finite(run, name):
    assert last_good(run).name == "000003"
    file = run / "checkpoints/000003" / name
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("inf"))
    save_file(tensors, file)
    assert last_good(run).name == "000002"
    assert "/000002/pretrained_model/train_config.json --resume=true" in how_to_go_on(run)
    shutil.rmtree(run / "checkpoints")
    assert last_good(run) is None
    assert "No checkpoint was saved yet; start again with another --output_dir than" in how_to_go_on(run)


def test_a_cut_off_checkpoint_fails_and_the_last_good_one_is_named(run, capsys):
    cut(run / "checkpoints/000003/training_state/optimizer_state.safetensors")
    line = refused(capsys, reflow_train_main, resume_flags(run, "000003", "--steps=4"))
    assert "While training: SafetensorError: " in line
    assert f"Go on from the last good checkpoint with --config_path={run}/checkpoints/000002/" in line
    assert not (run / "checkpoints/000004").exists()


@pytest.fixture
def losing(registry):
    """A strategy whose couplings' actions are NaN in the call numbered `at` and later."""

    def make(at):
        registry.pop("losing", None)
        calls = iter(range(1, 100))

        @register_loss_strategy("losing")
        def losing(step):
            coupling = step.recorded()
            return step.losses(replace(coupling, actions=coupling.actions * (math.nan if next(calls) >= at else 1)))

    return make


def test_a_loss_that_is_not_finite_stops_the_run(workshop, tmp_path, capsys, losing):
    losing(at=3)
    run = tmp_path / "run"
    line = refused(capsys, reflow_train_main, reflow_run(workshop, run, save_freq=1, reflow__strategy="losing"))
    assert "The loss is nan in step 3, so the run was stopped" in line
    hint = f"Go on from the last good checkpoint with --config_path={run}/checkpoints/000002/{CONFIG} --resume=true"
    assert hint in line
    losing(at=2)
    assert "in step 4, so the run was stopped" in refused(capsys, reflow_train_main, hint.partition("with ")[2].split())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"000001", "000002", "000003", "last"}


def test_the_teachers_actions_or_the_student_are_blamed_for_a_first_loss_that_is_nan(
    workshop, tmp_path, capsys, monkeypatch, losing
):
    losing(at=1)
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__strategy="losing"))
    assert (
        "in step 1, so the run was stopped. No loss of this run was finite, and the batch and its couplings are" in line
    )
    integrate = Solver.integrate

    def spoilt(self, velocity, noise):
        actions = integrate(self, velocity, noise)
        actions[1] = math.nan
        return actions

    monkeypatch.setattr(Solver, "integrate", spoilt)
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", batch_size=2))
    assert re.search(r"step 1, .*Already the teacher's actions of the frames \d+ hold NaN", line), line
    assert not (tmp_path / "run").exists()


def test_the_learning_rates_floor_is_said(run, capsys):
    """A schedule of three steps, resumed for six; LeRobot's own flag stretches it."""
    said = "the learning rate's schedule ends at step 3. From there to step 6 the rate stays at 2.5e-05."
    saved = run / "checkpoints/000004/training_state/scheduler_state.json"
    reflow_train_main(resume_flags(run, "000003", "--steps=6"))
    assert said in capsys.readouterr().err
    assert read_json(saved)["_last_lr"] == [2.5e-5]
    reflow_train_main(resume_flags(run, "000003", "--steps=6", "--scheduler.num_decay_steps=6"))
    assert "schedule ends" not in capsys.readouterr().err
    assert read_json(saved)["_last_lr"][0] > 1e-4


def test_an_absurd_learning_rate(workshop, tmp_path, capsys):
    rates = {"policy__optimizer_lr": 1e6, "policy__scheduler_warmup_steps": 0}
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", steps=20, save_freq=1, **rates))
    assert "in step 2, so the run was stopped. Training diverged; a lower --policy.optimizer_lr helps" in line


def test_a_full_disk(workshop, tmp_path, capsys):
    """Files may grow to 50 kB: the configuration fits, the weights do not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "error: While training: " in line
    assert "File too large" in line
    assert f"No checkpoint was saved yet; start again with another --output_dir than {tmp_path}/run." in line


@pytest.mark.slow
def test_killed_at_ten_moments_it_always_goes_on(workshop, tmp_path):
    """Half of the kills wait for a checkpoint that is just being written. Ends with the steps that were asked for."""
    run = tmp_path / "run"
    flags = reflow_run(workshop, run, steps=500, save_freq=1, log_freq=1)
    script = f"""
        import os, random, signal, sys, time
        from pathlib import Path
        from smolvla_reflow.commands import train
        from smolvla_reflow.checkpoint.run_folder import complete_checkpoints
        from smolvla_reflow.training.run_folder import training_step

        run, rng = Path({str(run)!r}), random.Random(0)
        resume = ["--config_path=" + str(run / "checkpoints/last/pretrained_model/train_config.json"), "--resume=true"]
        begun = lambda: set(run.glob("checkpoints/0*"))
        reached = lambda: next((training_step(c) for c in complete_checkpoints(run)), 0)

        def start(*more):
            child = os.fork()
            if child:
                return child
            try:
                train.main([*(resume if reached() else {flags!r}), *more])
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)

        steps = []
        for kill in range(10):
            before, had, child = begun(), reached(), start()
            # Re-written ones are no new folders, and before the first one is complete there is nothing to go on from.
            while len(begun() - before) < 1 + (kill % 3) or not reached():
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05 if kill % 2 else 0.5))
            newest = max(begun())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            steps.append(reached())
            assert steps[-1] >= max(had, int(newest.name) - 1), (steps, newest)
        print(steps, file=sys.stderr)
        end = reached() + 3
        assert os.waitpid(start(f"--steps={{end}}"), 0)[1] == 0
        assert reached() == end
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert is_complete(run / "checkpoints/last")
    assert all(torch.isfinite(t).all() for t in saved_weights(run).values())


@pytest.mark.skipif(not resumes_from_hub(), reason="before LeRobot 0.6.0 it does not resume from there")
def test_a_repositorys_last_checkpoint_is_downloaded_once_and_gone_on_from(run, tmp_path, monkeypatch, capsys):
    from lerobot.common import train_utils

    downloads = []

    def snapshot_download(repo_id, *, allow_patterns, local_dir, **kwargs):
        downloads.append(local_dir)
        step = allow_patterns.removesuffix("/*")
        shutil.copytree(run / step, Path(local_dir) / step)

    argv = ["--resume=true", "--config_path=me/2rf", "--steps=4"]
    assert "While downloading the last checkpoint of me/2rf: " in refused(capsys, reflow_train_main, argv)
    monkeypatch.setattr(train_utils, "find_latest_hub_checkpoint", lambda repo_id: "checkpoints/000003")
    monkeypatch.setattr(train_utils, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    reflow_train_main(argv)
    (made,) = downloads
    assert is_complete(Path(made) / "checkpoints/000004")
    assert not (run / "checkpoints/000004").exists()


def test_a_tilde_is_the_home_folder(workshop, tmp_path, monkeypatch):
    """In flags and in files; the shell leaves it alone after a `=`."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "shop").symlink_to(workshop)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    teacher = "~/shop/1rf/checkpoints/last/pretrained_model"
    (home / "run.yaml").write_text("dataset: {repo_id: smolvla-reflow/demo, root: ~/shop/dataset}\noutput_dir: ~/run")
    argv = reflow_run(workshop, None, steps=1, reflow__teacher_path=teacher)
    argv = [flag for flag in argv if not flag.startswith(("--dataset.", "--output_dir="))]
    reflow_train_main([*argv, "--config_path=~/run.yaml", "--policy.vlm_model_name=~/shop/backbone"])
    assert (home / "run/checkpoints/000001").is_dir()
    assert not (tmp_path / "~").exists()


def interrupted(command, flags, capsys):
    """A command that ends by Ctrl-C: exit code 130 and one sentence, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        command(flags)
    assert exit.value.code == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": interrupted. " in line]
    return line


@pytest.fixture
def ctrl_c():
    """Ctrl-C, with Python's own handler before and after the test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *given: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("failing", [False, True])
def test_a_second_ctrl_c_is_ignored(workshop, tmp_path, capsys, monkeypatch, registry, ctrl_c, failing):
    """Also if the first one made a file that was being written fail, as torch's do."""
    calls = iter(range(1, 100))

    @register_loss_strategy("interrupting")
    def interrupting(step):
        if next(calls) == 2:
            try:
                ctrl_c()
            finally:
                ctrl_c()
                if failing:
                    raise RuntimeError("unexpected pos 64 vs 0")
        return step.losses(step.coupling())

    run = tmp_path / "run"
    line = interrupted(
        reflow_train_main, reflow_run(workshop, run, save_freq=1, reflow__strategy="interrupting"), capsys
    )
    hint = line.partition("last good checkpoint with ")[2].split()
    assert hint[0] == f"--config_path={run}/checkpoints/000001/{CONFIG}"
    ctrl_c()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reflow_train_main(hint)
    assert (run / "checkpoints/000004").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_in_a_finalizer_is_not_lost(workshop, tmp_path, capsys, registry, ctrl_c):
    """Python drops what a finalizer raises; the run is interrupted all the same, without a word about the finalizer."""

    class Finalized:
        __del__ = ctrl_c

    @register_loss_strategy("finalizing")
    def finalizing(step):
        Finalized()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.01)
        return step.losses(step.coupling())

    flags = reflow_run(workshop, tmp_path / "run", reflow__strategy="finalizing")
    hook = sys.unraisablehook
    assert "smolvla-reflow-train: interrupted." in interrupted(reflow_train_main, flags, capsys)
    assert sys.unraisablehook is hook


@pytest.mark.slow
def test_ctrl_c_twice_at_ten_moments(workshop, tmp_path):
    """Half of them wait for a checkpoint that is being written. Each time one sentence and 130, and the run goes on."""
    run = tmp_path / "run"
    flags = reflow_run(workshop, run, steps=500, save_freq=1, num_workers=1)
    script = f"""
        import os, random, signal, sys, time
        from pathlib import Path
        from smolvla_reflow.checkpoint.run_folder import complete_checkpoints
        from smolvla_reflow.commands import train

        run, rng = Path({str(run)!r}), random.Random(0)
        resume = [f"--config_path={{run}}", "--resume=true"]
        begun = lambda: len(list(run.glob("checkpoints/0*")))
        for moment in range(10):
            before, child = begun(), os.fork()
            if not child:
                os.dup2(os.open(f"{tmp_path}/{{moment}}.txt", os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = os.fdopen(2, "w")
                train.main(resume if next(complete_checkpoints(run), None) else {flags!r})
                sys.exit("ended by itself")
            while begun() - before < (1 if moment % 2 else 2):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02 if moment % 2 else 0.3))
            os.kill(child, signal.SIGINT)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGINT)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == 130, (moment, code)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    for moment in range(10):
        # Where torchcodec finds no ffmpeg, LeRobot 0.6 logs its traceback, which is no error.
        said = re.sub(
            r"\[start of libtorchcodec.*?\[end of libtorchcodec",
            "",
            (tmp_path / f"{moment}.txt").read_text(),
            flags=re.DOTALL,
        )
        assert said.count(": interrupted. Go on from the last good checkpoint with --config_path=") == 1, said
        assert "Traceback" not in said
