"""Resuming: what a path may mean, which files a checkpoint has to have, and what is said where it has not."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import reflow_run, reflow_train_main, refused
from lerobot.configs import train as lerobot_config
from safetensors.torch import load_file, save_file

from smolvla_reflow import ReflowError
from smolvla_reflow.compat import resumes_from_hub, saves_final_checkpoint_alone
from smolvla_reflow.training.arguments import complete
from smolvla_reflow.training.preflight import check_numbers
from smolvla_reflow.training.run import how_to_continue
from smolvla_reflow.training.run_folder import find_config, flaw, last_good, resumable_config

CONFIG = "pretrained_model/train_config.json"


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A run of two steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    reflow_train_main(reflow_run(workshop, folder, steps=2, save_freq=1))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that believes to be where it is."""
    folder = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    for file in folder.glob("checkpoints/0*/pretrained_model/train_config.json"):
        edit(file, output_dir=str(folder))
    return folder


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def flags(*argv):
    return dict(flag[2:].split("=", 1) for flag in complete(argv).flags)


# --- what a path means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("", "000002"),
        ("checkpoints", "000002"),
        ("checkpoints/last", "last"),
        ("checkpoints/000001", "000001"),
        ("checkpoints/000001/pretrained_model", "000001"),
        (f"checkpoints/000001/{CONFIG}", "000001"),
        ("checkpoints/000001/pretrained_model/config.json", "000001"),
    ],
)
def test_every_way_to_name_a_checkpoint(run, path, step, monkeypatch):
    expected = run / "checkpoints" / step / CONFIG
    assert resumable_config(run / path) == find_config(run / path) == expected
    monkeypatch.chdir(run.parent)
    assert flags("--resume=true", f"--config_path=run/{path}")["config_path"] == str(expected)
    monkeypatch.setenv("HOME", str(run.parent))
    assert flags("--resume=true", f"--config_path=~/run/{path}")["config_path"] == str(expected)


def test_a_run_among_other_checkpoints(run, tmp_path):
    """Its own folder may lie in one of that name, and be a number."""
    (tmp_path / "checkpoints").mkdir()
    moved = run.rename(tmp_path / "checkpoints" / "2026")
    assert resumable_config(moved) == moved / "checkpoints/000002" / CONFIG


def test_a_runs_folder_resumes_from_its_newest_whole_checkpoint(run):
    (run / "checkpoints/000002/training_state/optimizer_state.safetensors").unlink()
    reflow_train_main(["--resume=true", f"--config_path={run}", "--steps=3"])
    assert flaw(run / "checkpoints/000003") is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.json", "nowhere.json does not exist."),
        ("no/such/folder", "no/such/folder does not exist."),
        (
            "run/checkpoints/000009",
            "000009 does not exist. The newest whole one of that run is --config_path={run}/checkpoints/000002/",
        ),
        ("run/checkpoints/lst", "lst does not exist. The newest whole one of that run is --config_path={run}/"),
        ("run/checkpoints/000001/training_state", "training_state holds no checkpoint of a training run."),
        ("run/wandb", "run/wandb holds no checkpoint of a training run."),
        ("hand.yaml", "hand.yaml does not belong to a whole checkpoint: {parent}/config.json is missing."),
    ],
)
def test_paths_that_mean_none(run, path, said, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    (run / "wandb").mkdir()
    (run.parent / "hand.yaml").write_text("steps: 3")
    line = refused(capsys, reflow_train_main, ["--resume=true", f"--config_path={path}"])
    assert said.format(run=run, parent=run.parent.name) in line


def test_a_run_without_a_whole_checkpoint(run, capsys):
    for folder in run.glob("checkpoints/0*"):
        (folder / "training_state/rng_state.safetensors").unlink()
    for path in (run, run / "checkpoints/last"):
        line = refused(capsys, reflow_train_main, ["--resume=true", f"--config_path={path}"])
        assert ("holds no whole checkpoint" in line) is (path == run)
    assert line.endswith(": training_state/rng_state.safetensors is missing. That run has none.")


def test_weights_cannot_be_chosen_for_a_resumed_run(run, capsys):
    argv = ["--resume=true", f"--config_path={run}", "--policy.path=elsewhere"]
    assert "--policy.path is for a new run" in refused(capsys, reflow_train_main, argv)
    argv[-1] = "--reflow.num_stepz=3"
    assert "--reflow.num_stepz is unknown" in refused(capsys, reflow_train_main, argv)


def test_a_file_that_another_lerobot_saved(run, capsys, workshop):
    edit(run / "checkpoints/000002" / CONFIG, frobnicate=3)
    line = refused(capsys, reflow_train_main, ["--resume=true", f"--config_path={run}"])
    assert "`frobnicate` are not valid" in line
    assert "saved has such fields; resume with the one that saved it." in line
    line = refused(capsys, reflow_train_main, [f"--config_path={run}"])
    assert "take them out of the file." in line


# --- which files a checkpoint has -------------------------------------------------------------------------------


def test_every_file_that_lerobot_saves_is_needed(run):
    """Missing, and cut off."""
    checkpoint = run / "checkpoints/000002"
    files = [path for path in checkpoint.glob("*/*") if path.is_file()]  # deeper down is what a tokenizer has saved
    assert len(files) == 12
    for path in files:
        name, content = path.relative_to(checkpoint), path.read_bytes()
        path.unlink()
        assert flaw(checkpoint) == f"{name} is missing"
        path.write_bytes(content[:-5])
        assert flaw(checkpoint) == f"{name} is not complete"
        path.write_bytes(content)
    assert flaw(checkpoint) is None


def test_other_layouts(run):
    """An adapter; what LeRobot 0.6.2 adds: a tokenizer, averaged weights, and the shards of several processes."""
    checkpoint = run / "checkpoints/000002"
    policy, state, config = checkpoint / "pretrained_model", checkpoint / "training_state", checkpoint / CONFIG
    weights = (policy / "model.safetensors").rename(policy / "adapter_model.safetensors")
    assert flaw(checkpoint) == "pretrained_model/model.safetensors is missing"
    fields = json.loads(config.read_text())["policy"]
    edit(config, policy={**fields, "use_peft": True})
    assert flaw(checkpoint) == "pretrained_model/adapter_config.json is missing"
    (policy / "adapter_config.json").write_text("{}")
    assert flaw(checkpoint) is None

    edit(config, ema={"enable": True})
    assert flaw(checkpoint) == "training_state/ema_state.pt is missing"
    torch.save({"shadow": torch.zeros(1000)}, state / "ema_state.pt")
    assert flaw(checkpoint) is None
    os.truncate(state / "ema_state.pt", 2000)
    assert flaw(checkpoint) == "training_state/ema_state.pt is not complete"
    edit(config, ema={"enable": False})

    preprocessor = policy / "policy_preprocessor.json"
    steps = json.loads(preprocessor.read_text())["steps"]
    steps[0]["artifacts"] = {"tokenizer_name": "words"}
    edit(preprocessor, steps=steps)
    assert flaw(checkpoint) == "pretrained_model/words is missing"
    (policy / "words").mkdir()
    (policy / "words" / "tokenizer.json").write_text("{")
    assert flaw(checkpoint) == "pretrained_model/words/tokenizer.json is not complete"
    (policy / "words" / "tokenizer.json").write_text("{}")
    assert flaw(checkpoint) is None

    edit(config, checkpoint_format="DCP")
    weights.unlink()
    for folder in (policy / "pytorch_model_fsdp_0", state / "optimizer_0"):
        if folder.parent == state:  # its place may also be taken by the state of one process
            assert flaw(checkpoint) is None
        folder.mkdir()
        assert flaw(checkpoint) == f"{folder.relative_to(checkpoint)}/.metadata is missing"
        (folder / ".metadata").touch()
        assert flaw(checkpoint) == f"{folder.relative_to(checkpoint)}/.metadata is not complete"
        (folder / ".metadata").write_bytes(b"\x80")
    (state / "optimizer_state.safetensors").unlink()
    assert flaw(checkpoint) is None


def test_a_run_without_a_scheduler_needs_none(run):
    checkpoint = run / "checkpoints/000002"
    (checkpoint / "training_state/scheduler_state.json").unlink()
    assert flaw(checkpoint) is not None
    edit(checkpoint / CONFIG, scheduler=None)
    assert flaw(checkpoint) is None


@pytest.mark.parametrize("name", ["pretrained_model/model.safetensors", "training_state/optimizer_state.safetensors"])
def test_a_good_checkpoint_is_finite(run, name):
    assert last_good(run).name == "000002"
    file = run / "checkpoints/000002" / name
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("inf"))
    save_file(tensors, file)
    assert last_good(run).name == "000001"


# --- how one goes on --------------------------------------------------------------------------------------------


def test_what_a_resumed_run_was_told_is_told_again(run):
    """Its last checkpoint was saved before."""
    cfg = SimpleNamespace(output_dir=run, reflow=SimpleNamespace(strategy="reflow"))
    arguments = complete(["--resume=true", f"--config_path={run}", "--steps=9", "--job_name=a b"])
    said = how_to_continue(cfg, arguments)
    assert said.endswith(f"--config_path={run}/checkpoints/000002/{CONFIG} --resume=true --steps=9 '--job_name=a b'")
    plugin = "--env.discover_packages_path=my_envs"
    arguments = complete(["--reflow.teacher_path=T", "--dataset.repo_id=ID", "--steps=9", plugin])
    cfg.reflow.strategy = "/mine.py:x"
    assert how_to_continue(cfg, arguments).endswith(f"--resume=true {plugin} --reflow.strategy=/mine.py:x")


@pytest.mark.parametrize("save_freq", [0, -1])
def test_the_final_checkpoint_alone(workshop, tmp_path, capsys, save_freq):
    run = tmp_path / "run"
    argv = reflow_run(workshop, run, steps=2, save_freq=save_freq)
    if saves_final_checkpoint_alone():
        reflow_train_main(argv)
    else:
        line = refused(capsys, reflow_train_main, argv)
        assert "--save_freq=2, the number of steps, saves the final checkpoint alone" in line
        assert not run.exists()
        reflow_train_main([*argv, "--save_freq=2"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "last"]


def test_numbers_that_cannot_be():
    usable = {"steps": 1, "batch_size": 1, "save_freq": 1, "num_workers": 0}
    check_numbers(SimpleNamespace(**usable))
    for name in ("steps", "batch_size", "num_workers"):
        with pytest.raises(ReflowError, match=f"--{name}={usable[name] - 1}: at least {usable[name]}"):
            check_numbers(SimpleNamespace(**{**usable, name: usable[name] - 1}))


# --- the hub ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(resumes_from_hub(), reason="from LeRobot 0.6.0 on it resumes from there")
def test_this_lerobot_does_not_resume_from_the_hub(capsys):
    line = refused(capsys, reflow_train_main, ["--resume=true", "--config_path=me/2rf"])
    assert "says of a hub id that resuming from the hub is not supported; download the checkpoint" in line


@pytest.mark.skipif(not resumes_from_hub(), reason="before LeRobot 0.6.0 it does not resume from there")
class TestHub:
    def test_no_such_repository(self, capsys):
        line = refused(capsys, reflow_train_main, ["--resume=true", "--config_path=me/2rf"])
        assert "--config_path=me/2rf does not exist, and as a hub id it cannot be resumed (" in line

    @pytest.fixture
    def hub(self, run, monkeypatch):
        """A repository `me/2rf` that holds the checkpoints of a run; counts its downloads."""
        from lerobot.common import train_utils

        downloads = []

        def snapshot_download(repo_id, *, allow_patterns, local_dir, **kwargs):
            downloads.append(local_dir)
            step = allow_patterns.removesuffix("/*")
            shutil.copytree(run / step, Path(local_dir) / step)

        monkeypatch.setattr(lerobot_config, "hf_hub_download", lambda **asked: str(run / "checkpoints/000002" / CONFIG))
        monkeypatch.setattr(train_utils, "find_latest_hub_checkpoint", lambda repo_id: "checkpoints/000002")
        monkeypatch.setattr(train_utils, "snapshot_download", snapshot_download)
        return downloads

    def test_its_last_checkpoint_is_downloaded_once_and_gone_on_from(self, hub, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        reflow_train_main(["--resume=true", "--config_path=me/2rf", "--steps=3"])
        (made,) = hub
        assert flaw(Path(made) / "checkpoints/000003") is None
        assert not (run / "checkpoints/000003").exists()

    def test_what_was_pushed_has_to_be_whole(self, hub, run, tmp_path, capsys):
        (run / "checkpoints/000002/training_state/optimizer_param_groups.json").unlink()
        argv = ["--resume=true", "--config_path=me/2rf", f"--output_dir={tmp_path / 'here'}"]
        line = refused(capsys, reflow_train_main, argv)
        assert "is not whole: training_state/optimizer_param_groups.json is missing" in line

    def test_what_is_no_reflow_run_is_not_downloaded(self, hub, run, capsys):
        edit(run / "checkpoints/000002" / CONFIG, reflow={})
        line = refused(capsys, reflow_train_main, ["--resume=true", "--config_path=me/2rf"])
        assert "names no teacher" in line
        assert hub == []


# --- the home folder --------------------------------------------------------------------------------------------


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
