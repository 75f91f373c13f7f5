"""`smolvla-reflow-train` as a user runs it: what it writes, what stock LeRobot makes of it, what it refuses."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import lerobot
import pytest
import torch
from helpers import (
    lerobot_train_main,
    reflow_run,
    reflow_train_main,
    same_tensors,
    saved_config,
    saved_weights,
    stock_flags,
)
from packaging.version import Version
from people import edit_json

from smolvla_reflow import Solver
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import write_dataset
from smolvla_reflow.training.accelerator import hook
from smolvla_reflow.training.config import ReflowConfig

BEFORE_0_6 = Version(lerobot.__version__) < Version("0.6.0")


@pytest.fixture(scope="module")
def student(workshop, tmp_path_factory):
    """The output folder of one short reflow run, which leaves the teacher's files as they were."""
    folder = tmp_path_factory.mktemp("student") / "2rf"
    files = {path: path.read_bytes() for path in (workshop / "1rf").rglob("*") if path.is_file()}
    reflow_train_main(reflow_run(workshop, folder, save_freq=2))
    assert {path: path.read_bytes() for path in (workshop / "1rf").rglob("*") if path.is_file()} == files
    return folder


def test_checkpoint_is_stock(workshop, student):
    teacher_folder = workshop / "1rf" / LAST
    saved, stock = saved_weights(student), saved_weights(workshop / "1rf")
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in stock.items()}
    assert not same_tensors(saved, stock)
    config, stock = (json.loads((f / "config.json").read_text()) for f in (student / LAST, teacher_folder))
    assert config.keys() == stock.keys()
    assert sorted(p.name for p in (student / LAST).iterdir()) == sorted(p.name for p in teacher_folder.iterdir())


def test_train_config_remembers_the_teacher(workshop, student):
    teacher_path = str((workshop / "1rf" / LAST).resolve())
    defaults = dataclasses.asdict(ReflowConfig())
    fingerprint = open_checkpoint(teacher_path).fingerprint()
    filled_in = {"teacher_fingerprint": fingerprint, "num_steps": 5, "measure_episodes": []}
    remembered = {**defaults, "teacher_path": teacher_path, **filled_in}
    assert saved_config(student)["reflow"] == remembered
    chosen = {"strategy": "reflow", "solver": "jittered", "weighting": "t", "padding_weight": 0.1}
    assert chosen.items() <= defaults.items()


@pytest.mark.slow
def test_stock_lerobot_loads_it_without_this_package(workshop, student, tmp_path):
    """In a process where `smolvla_reflow` cannot be imported: load, act, and train on."""
    flags = [f for f in reflow_run(workshop, tmp_path / "on", steps=1) if not f.startswith("--reflow.")]
    flags += [f"--policy.path={student / LAST}", "--policy.push_to_hub=false"]
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "smolvla_reflow":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        import torch
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
        from lerobot.scripts import lerobot_train

        policy = SmolVLAPolicy.from_pretrained({str(student / LAST)!r})
        action = policy.select_action({{
            "observation.state": torch.zeros(1, 2),
            "observation.images.top": torch.zeros(1, 3, 32, 32),
            "observation.language.tokens": torch.zeros(1, 4, dtype=torch.long),
            "observation.language.attention_mask": torch.ones(1, 4, dtype=torch.bool),
        }})
        assert action.shape == (1, 2)
        sys.argv = ["lerobot-train", *{flags!r}]
        lerobot_train.train()
        assert "smolvla_reflow" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    assert (tmp_path / "on" / LAST / "model.safetensors").exists()


def test_student_starts_as_the_teacher(workshop, tmp_path):
    """At learning rate zero it ends as the teacher, too."""
    zero = {"policy__optimizer_lr": 1e-30, "policy__scheduler_decay_lr": 1e-30}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1, **zero))
    assert same_tensors(saved_weights(tmp_path / "run"), saved_weights(workshop / "1rf"))


@pytest.mark.parametrize(
    ("own", "asked", "said"),
    [
        (2, None, "jittered with num_steps 5 (10 velocity evaluations). The teacher's config says num_steps 2."),
        (2, 2, "jittered with num_steps 2 (4 velocity evaluations)."),
        (14, None, "jittered with num_steps 7 (14 velocity evaluations)."),
    ],
)
def test_couplings_take_ten_evaluations_or_more(workshop, tmp_path, capsys, monkeypatch, own, asked, said):
    """Also those of a teacher that `--write_num_steps` made one of few steps. It is said, and done."""
    teacher = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    edit_json(teacher / "config.json", num_steps=own)
    taken, integrate = set(), Solver.integrate
    monkeypatch.setattr(Solver, "integrate", lambda self, *a, **k: taken.add(self) or integrate(self, *a, **k))
    flags = {"reflow__teacher_path": teacher, "reflow__num_steps": asked, "steps": 1}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", **flags))
    assert f"Reflow: couplings by {said}" in capsys.readouterr().err
    assert taken == {Solver("jittered", num_steps=int(re.search(r"num_steps (\d+)", said)[1]))}
    assert json.loads((tmp_path / "run" / LAST / "config.json").read_text())["num_steps"] == own
    (solver,) = taken
    assert saved_config(tmp_path / "run")["reflow"]["num_steps"] == solver.num_steps
    edit_json(teacher / "config.json", num_steps=40)
    reflow_train_main([f"--config_path={tmp_path / 'run'}", "--resume=true", "--steps=2"])
    assert taken == {solver}  # whatever is written into the teacher's config meanwhile
    resumed = [f"--config_path={tmp_path / 'run'}", "--resume=true"]
    reflow_train_main([*resumed, "--steps=3", "--reflow.solver=jittered"])
    assert taken == {solver}  # the solver that the run has had all along
    reflow_train_main([*resumed, "--steps=4", "--reflow.solver=euler"])
    assert taken == {solver, Solver("euler", num_steps=40)}


def test_a_resumed_loss_from_a_file_keeps_the_number_of_steps(workshop, tmp_path):
    """Such a run is resumed with its --reflow.strategy, by any path of the file."""
    (tmp_path / "loss.py").write_text("def mine(step):\n    return step.losses(step.coupling())\n")
    run, strategy = tmp_path / "run", f"{tmp_path}/loss.py:mine"
    reflow_train_main(reflow_run(workshop, run, steps=1, reflow__strategy=strategy, reflow__num_steps=3))
    again = f"--reflow.strategy={tmp_path}/run/../loss.py:mine"
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=2", again])
    assert saved_config(run)["reflow"]["num_steps"] == 3


def test_standard_strategy_is_lerobot_train_bitwise(workshop, tmp_path):
    """Nothing but the loss differs: same data order, same random numbers, same optimizer, same result."""
    flags = reflow_run(workshop, tmp_path / "run", reflow__strategy="standard")
    reflow_train_main(flags)
    lerobot_train_main(stock_flags(workshop, flags, tmp_path / "run", tmp_path / "stock"))
    assert same_tensors(saved_weights(tmp_path / "run"), saved_weights(tmp_path / "stock"))


def test_a_student_is_a_valid_teacher(workshop, student, tmp_path):
    """2-RF to 3-RF; also from a path relative to the working directory."""
    teacher = os.path.relpath(student / LAST)
    reflow_train_main(reflow_run(workshop, tmp_path / "3rf", steps=2, reflow__teacher_path=teacher))
    assert saved_config(tmp_path / "3rf")["reflow"]["teacher_path"] == str((student / LAST).resolve())
    assert not same_tensors(saved_weights(tmp_path / "3rf"), saved_weights(student))


def test_a_dataset_with_other_statistics(workshop, tmp_path, capsys):
    """The teacher is asked in its own space; the student learns, and saves, the dataset's."""
    write_dataset(tmp_path / "other", episodes=4, seed=9)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=2, dataset__root=tmp_path / "other"))
    assert capsys.readouterr().err.count("The dataset's statistics are not the teacher's (most in '") == 1
    current = json.loads((tmp_path / "other/meta/stats.json").read_text())["action"]["mean"]
    saved = open_checkpoint(tmp_path / "run" / LAST).statistics()["action.mean"]
    teachers = open_checkpoint(workshop / "1rf" / LAST).statistics()["action.mean"]
    torch.testing.assert_close(saved, torch.tensor(current))
    assert not torch.allclose(saved, teachers)


def test_the_forks_yaml_trains(workshop, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    policy = {"type": "smolvla", "training_mode": "reflow", "teacher_model_path": str(workshop / "1rf" / LAST)}
    (tmp_path / "fork.yaml").write_text(f"policy: {json.dumps({**policy, 'optimizer_lr': 3e-5})}")
    flags = reflow_run(workshop, tmp_path / "run", steps=1, reflow__teacher_path=None, policy__optimizer_lr=None)
    reflow_train_main([*flags, f"--config_path={tmp_path / 'fork.yaml'}"])
    saved = saved_config(tmp_path / "run")
    assert (saved["reflow"]["strategy"], saved["optimizer"]["lr"]) == ("reflow", 3e-5)
    assert "training_mode" not in (tmp_path / "run" / LAST / "config.json").read_text()
    assert not list((tmp_path / "scratch").glob("reflow_config_*"))


def resume_at(run: Path, step: str, copy: Path, train) -> dict[str, torch.Tensor]:
    """Cut a copy of a finished run back to `step`, resume it with `train`, and return the last weights."""
    shutil.copytree(run, copy, symlinks=True)
    checkpoints = copy / "checkpoints"
    for folder in checkpoints.iterdir():
        if not folder.is_symlink() and folder.name > step:
            shutil.rmtree(folder)
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to(step)
    file = copy / LAST / "train_config.json"
    edit_json(file, output_dir=str(copy))
    train([f"--config_path={file}", "--resume=true"])
    return saved_weights(copy)


@pytest.mark.parametrize("step", ["000004", pytest.param("000006", marks=pytest.mark.slow)], ids=["mid", "end"])
def test_resumes_as_exactly_as_stock_lerobot(workshop, tmp_path, step, capsys):
    """48 frames in batches of 8: step 6 ends the first epoch.

    Stock LeRobot resumes bitwise at an epoch's end on 0.4 and 0.5, and nowhere on 0.6 (the resumed loader draws one
    random number more, and accelerate resets the sampler's epoch). Reflow resumes bitwise wherever stock does;
    and everywhere its resumed run with the stock loss is the stock resumed run, bitwise.
    """
    common = {"steps": 12, "save_freq": 2}
    reflow_train_main(reflow_run(workshop, tmp_path / "reflow", **common))
    reflow_train_main(reflow_run(workshop, tmp_path / "stock", reflow__strategy="standard", **common))

    def without_reflow(flags):
        file = Path(flags[0].partition("=")[2])
        config = json.loads(file.read_text())
        config.pop("reflow")
        file.write_text(json.dumps(config))
        lerobot_train_main(flags)

    stock = resume_at(tmp_path / "stock", step, tmp_path / "stock_resumed", without_reflow)
    stock_is_exact = same_tensors(stock, saved_weights(tmp_path / "stock"))
    assert stock_is_exact == (BEFORE_0_6 and step == "000006")

    same = resume_at(tmp_path / "stock", step, tmp_path / "standard_resumed", reflow_train_main)
    assert same_tensors(same, stock)
    resumed = resume_at(tmp_path / "reflow", step, tmp_path / "reflow_resumed", reflow_train_main)
    assert same_tensors(resumed, saved_weights(tmp_path / "reflow")) == stock_is_exact
    shared = re.findall(r"Teacher shares (\d+) of its \d+ parameters", capsys.readouterr().err)
    assert len(shared) == 4  # two runs from the start, two resumed ones
    assert len(set(shared)) == 1
    teacher_path = saved_config(tmp_path / "reflow_resumed")["reflow"]["teacher_path"]
    assert teacher_path == str((workshop / "1rf" / LAST).resolve())


@pytest.mark.parametrize("process", [0, 1])
def test_the_accelerator_hands_over_policy_loader_and_losses(process):
    """Before it prepares them, and before each backward pass. Afterwards other processes draw other random numbers."""
    calls, policy = [], torch.nn.Linear(1, 1)
    train, held_out = (torch.utils.data.DataLoader([k]) for k in (0, 1))
    stock = SimpleNamespace(
        process_index=process,
        prepare=lambda *args: calls.append("prepare") or args,
        backward=lambda loss: calls.append("backward"),
    )
    kept = hook(stock, on_policy=calls.append, on_loss=calls.append, on_loader=calls.append)
    torch.manual_seed(0)
    assert kept.prepare(policy, train, held_out) == (policy, train, held_out)
    drawn = torch.rand(3)
    kept.backward(torch.tensor(2.0))
    assert calls == [policy, train, "prepare", 2.0, "backward"]
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3)) is (process == 0)


def test_help_explains_the_reflow_options(capsys):
    with pytest.raises(SystemExit) as exit:
        reflow_train_main(["--help"])
    assert not exit.value.code
    parts = " ".join(capsys.readouterr().out.split()).split(" --reflow.")
    helps = {part.partition(" ")[0]: part for part in parts}
    for name, default in ("teacher_path", None), ("weighting", "t"), ("padding_weight", 0.1), ("solver", "jittered"):
        assert f"(default: {default})" in helps[name]
    for name in ReflowConfig.__dataclass_fields__:
        assert len(helps[name].split()) > 6, name  # draccus drops a text with a colon in it


def test_interrupting_says_how_to_go_on(workshop, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the third step: exit code 130, and the command it prints resumes."""
    calls, integrate = iter(range(100)), Solver.integrate

    def interrupted(*args, **named):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return integrate(*args, **named)

    monkeypatch.setattr(Solver, "integrate", interrupted)
    with pytest.raises(SystemExit) as exit:
        reflow_train_main(reflow_run(workshop, tmp_path / "run", save_freq=2))
    assert exit.value.code == 130
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if "interrupted. Go on from the last good" in ln]
    reflow_train_main(line.partition("with ")[2].split())
    assert (tmp_path / "run" / "checkpoints" / "000004").is_dir()
