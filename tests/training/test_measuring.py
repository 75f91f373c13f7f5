"""Measuring a student on held-out frames while it trains: what is measured, and that nothing else changes by it."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from helpers import eval_flags, eval_main, reflow_run, reflow_train_main, refused, saved_config, torchrun
from lerobot.configs.default import DatasetConfig
from pairs_helpers import weights

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.training import measuring
from smolvla_reflow.training.config import ReflowConfig
from smolvla_reflow.training.hold_out import hold_out, in_words
from smolvla_reflow.training.inherited import inherit

HELD = "[6,7]"  # the last two of eight episodes, six frames each: 36 to 47
NAMES = ("flow_error_1", "flow_error_2", "energy_distance_1", "energy_distance_2")
LINE = re.compile(r"Reflow: held out, after step (\d+): (.*)")
BAR = re.compile(r"The teacher's own num_steps=(\d+): flow_error:(\S+) energy_distance:(\S+)")
EVERY_TWO = {"reflow__measure_freq": 2, "reflow__measure_episodes": HELD}
HOLDS_OUT = "eval_split" in {field.name for field in fields(DatasetConfig)}


def measured(capsys):
    """What was logged: the values by step, and the teacher's own."""
    log = capsys.readouterr().err
    ((steps, *bar),) = BAR.findall(log)
    values = {int(step): [word.split(":") for word in text.split()] for step, text in LINE.findall(log)}
    by_name = {step: {name: float(value) for name, value in pairs} for step, pairs in values.items()}
    return by_name, (int(steps), *map(float, bar)), log


@pytest.fixture
def evaluated(workshop, tmp_path):
    """The same numbers from `smolvla-reflow-eval`, whose own are held against stock LeRobot (test_evaluation.py)."""

    def run(policy: Path, frames: int = 12) -> tuple[dict[str, float], tuple[float, float]]:
        flags = {"policy__path": policy, "teacher_path": workshop / "1rf" / LAST, "num_noises": 4}
        measured_on = {"dataset__episodes": HELD, "num_frames": frames, "reference_steps": 32}
        rows = eval_main(eval_flags(workshop, tmp_path / policy.parent.name, **flags, **measured_on))["rows"]
        found = {(r["policy"], r["num_steps"]): (r["flow_rmse"], r["energy_distance"]["value"]) for r in rows}
        one, two = found["student", 1], found["student", 2]
        return dict(zip(NAMES, (one[0], two[0], one[1], two[1]), strict=True)), found["teacher", 10]

    return run


@pytest.mark.parametrize("frames", [None, pytest.param(5, marks=pytest.mark.slow)], ids=["all", "some"])
def test_flow_error_and_energy_distance_are_those_of_the_checkpoints(
    workshop, tmp_path, capsys, monkeypatch, evaluated, frames
):
    """At the start, every two steps, and after the last; some frames are evenly spaced ones."""
    monkeypatch.setattr(measuring, "FRAMES", frames or measuring.FRAMES)
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, steps=4, save_freq=2, **EVERY_TWO))
    found, bar, log = measured(capsys)
    assert "2 episodes are held out of training, to judge the student on: [6, 7]" in log
    assert list(found) == [0, 2, 4]
    for step, values in found.items():
        folder = run / f"checkpoints/{step:06}/pretrained_model" if step else workshop / "1rf" / LAST
        expected, expected_bar = evaluated(folder, frames or 12)
        assert values == pytest.approx(expected, abs=6e-5, rel=1e-3)
        assert bar == (10, *(pytest.approx(value, abs=6e-5, rel=1e-3) for value in expected_bar))
    assert len({values["flow_error_1"] for values in found.values()}) == 3


def test_the_last_values_stand_in_the_metrics(workshop, tmp_path, capsys, monkeypatch):
    """Of each step, as the step's own do; on the console at log_freq."""
    monitor = importlib.import_module("smolvla_reflow.step_metrics").StepMetrics
    returned, read = [], monitor.read
    monkeypatch.setattr(monitor, "read", lambda *a: returned.append(read(*a)) or returned[-1])
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=4, log_freq=1, **EVERY_TWO))
    found, _, log = measured(capsys)
    for metrics, step in zip(returned, (0, 0, 2, 2), strict=True):
        assert {name: metrics[name] for name in NAMES} == pytest.approx(found[step], abs=6e-5)
        assert "one_step_error" in metrics
    printed = [float(value) for value in re.findall(r" one_step_error:.* flow_error_1:(\S+)", log)]
    if not printed:  # in the order in which they were first reported
        printed = [float(value) for value in re.findall(r" flow_error_1:(\S+) .*one_step_error:", log)]
    assert printed == pytest.approx([found[step]["flow_error_1"] for step in (0, 0, 2, 2)], abs=6e-4)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_is_the_same_with_and_without(workshop, tmp_path, num_workers):
    """Bit for bit: with the random numbers of `jittered`, of times and of noise."""
    common = {"steps": 3, "num_workers": num_workers, "save_freq": 3}
    reflow_train_main(reflow_run(workshop, tmp_path / "without", dataset__episodes="[0,1,2,3,4,5]", **common))
    reflow_train_main(reflow_run(workshop, tmp_path / "with", **common, **EVERY_TWO))
    one, other = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(one[name], other[name]) for name in one)
    file = "checkpoints/last/training_state/rng_state.safetensors"
    assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_a_policy_comes_back_in_the_modes_that_it_was_in(policy):
    policy.train()
    policy.model.action_out_proj.eval()
    before = {name: module.training for name, module in policy.named_modules()}
    assert len(set(before.values())) == 2
    with measuring.inference(policy):
        assert not any(module.training for module in policy.modules())
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert torch.is_grad_enabled()


def test_with_stored_pairs(workshop, stored, tmp_path, capsys):
    """The same teacher gives the same numbers, and is built for them alone."""
    reflow_train_main(reflow_run(workshop, tmp_path / "online", steps=2, **EVERY_TWO))
    online, bar, _ = measured(capsys)
    reflow_train_main(reflow_run(workshop, tmp_path / "stored", reflow__pairs_path=stored, steps=2, **EVERY_TWO))
    offline, same_bar, log = measured(capsys)
    assert offline[0] == pytest.approx(online[0], abs=2e-4)
    assert same_bar == pytest.approx(bar, abs=2e-4)
    assert offline.keys() == {0, 2}
    assert "no teacher is loaded" in log


def test_a_resumed_run_goes_on(workshop, tmp_path, capsys, evaluated):
    """Its steps are counted on, and the episodes stay held out; a run that starts from its configuration on another
    dataset does not take them over."""
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, steps=3, save_freq=3, **EVERY_TWO))
    first, bar, _ = measured(capsys)
    file = run / LAST / "train_config.json"
    assert json.loads(file.read_text())["dataset"]["episodes"] == [0, 1, 2, 3, 4, 5]
    assert inherit(str(file), {}).flags["reflow.measure_episodes"] == [6, 7]
    assert "reflow.measure_episodes" not in inherit(str(file), {"dataset.repo_id": "me/another"}).flags
    assert inherit(str(file), {}).rest["dataset"]["episodes"] == [0, 1, 2, 3, 4, 5]
    assert "episodes" not in inherit(str(file), {"reflow.measure_episodes": "[]"}).rest["dataset"]
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=6"])
    second, bar_again, _ = measured(capsys)
    assert (list(first), list(second), bar_again) == ([0, 2], [3, 4, 6], bar)
    assert second[3] == pytest.approx(evaluated(run / "checkpoints/000003/pretrained_model")[0], abs=6e-5, rel=1e-3)
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=7", "--reflow.measure_freq=0"])
    assert not LINE.search(capsys.readouterr().err)


def test_episodes_that_a_run_has_trained_on_are_not_held_out_later(workshop, tmp_path, capsys):
    """Measured on, and evaluated on by `smolvla-reflow-eval`, they would pass for unseen."""
    run, flag = tmp_path / "run", "--reflow.measure_episodes=[0,1]"
    resumed = [f"--config_path={run}", "--resume=true", "--steps=2", "--reflow.measure_freq=1"]
    reflow_train_main(reflow_run(workshop, run, steps=1))
    assert "This run has trained on all; leave the flag out." in refused(capsys, reflow_train_main, resumed)
    said = refused(capsys, reflow_train_main, [*resumed, flag])
    assert "this run has trained on episode 0 already, and only a new run can hold it out" in said
    anew = {"reflow__measure_episodes": "[0,1]", "dataset__episodes": "[2,3,4]"}
    reflow_train_main(reflow_run(workshop, tmp_path / "part", steps=1, **anew))
    reflow_train_main([f"--config_path={tmp_path / 'part'}", *resumed[1:], flag.replace("0,1", "1,5")])
    assert saved_config(tmp_path / "part")["dataset"]["episodes"] == [2, 3, 4]


@pytest.mark.skipif(not HOLDS_OUT, reason="LeRobot holds nothing out before 0.6")
def test_what_lerobot_holds_out(workshop, tmp_path, capsys):
    split = {**EVERY_TWO, "reflow__measure_episodes": None, "dataset__eval_split": 0.25}
    both = {**EVERY_TWO, "dataset__eval_split": 0.3}  # the named episodes, before LeRobot splits the others
    found = {}
    for name, changes in (("split", split), ("named", EVERY_TWO), ("both", both)):
        reflow_train_main(reflow_run(workshop, tmp_path / name, steps=1, **changes))
        found[name] = measured(capsys)
    assert "are held out of training" not in found["split"][2]
    assert found["split"][1] == found["named"][1] == found["both"][1]
    assert found["split"][0][0] == pytest.approx(found["named"][0][0], abs=1e-5)
    saved = json.loads((tmp_path / "both" / LAST / "train_config.json").read_text())["dataset"]
    assert saved["episodes"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("freq", "held", "dataset", "message"),
    [
        (2, [6, 7], {"streaming": True}, "needs frames in any order; leave out --dataset.streaming"),
        (2, None, {}, "--reflow.measure_freq=2 needs episodes to measure on and not to train on"),
        (2, [], {}, "Name them: --reflow.measure_episodes=[0,1]."),
        (2, [7, 8], {}, "there is no episode 8; choose from 0 to 7"),
        (2, [-1], {}, "there is no episode -1"),
        (2, [0, 1, 2, 3, 4, 5, 6, 7], {}, "names every episode, and none is left to train on"),
        (2, [6, 7], {"episodes": [5, 6]}, "episode 6 is trained on, too; take it out of --dataset.episodes"),
    ],
)
def test_silently_wrong_episodes_are_refused(freq, held, dataset, message):
    reflow = ReflowConfig(measure_freq=freq, measure_episodes=held)
    cfg = SimpleNamespace(dataset=DatasetConfig("me/robot", **dataset), reflow=reflow, resume=False)
    with pytest.raises(ReflowError, match=re.escape(message)) as error:
        hold_out(cfg, SimpleNamespace(total_episodes=8))
    assert ("--dataset.eval_split" in str(error.value)) is (HOLDS_OUT and not held)


@pytest.mark.parametrize(
    ("total", "changes", "held"),
    [
        (49, {}, []),  # holding ten out would cost more than a fifth
        (50, {}, [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]),
        (200, {}, 20),
        (5000, {}, 50),
        (200, {"measure_episodes": []}, []),
        (200, {"measure_episodes": [3]}, [3]),
        (200, {"episodes": [*range(190)]}, []),  # ten are unseen anyway
        (200, {"episodes": [*range(190)], "measure_freq": 5}, [*range(190, 200)]),
        (200, {"streaming": True}, []),
        (200, {"resume": True}, []),  # of a run that began before episodes were held out
        pytest.param(200, {"eval_split": 0.1}, [], marks=pytest.mark.skipif(not HOLDS_OUT, reason="from LeRobot 0.6")),
    ],
)
def test_the_episodes_that_are_held_out(total, changes, held):
    """A number stands for so many, evenly spaced. The others are trained on, and the log says it."""
    reflow = ReflowConfig(**{name: value for name, value in changes.items() if name.startswith("measure")})
    dataset = {name: value for name, value in changes.items() if name in ("episodes", "streaming", "eval_split")}
    resume = changes.get("resume", False)
    cfg = SimpleNamespace(dataset=DatasetConfig("me/robot", **dataset), reflow=reflow, resume=resume)
    hold_out(cfg, SimpleNamespace(total_episodes=total))
    found = reflow.measure_episodes or []
    if isinstance(held, int):
        assert (found[0], found[-1], len(found)) == (0, total - 1, held)
        assert max(np.diff(found)) - min(np.diff(found)) <= 1
    else:
        assert found == held
    chosen = changes.get("episodes") or ([e for e in range(total) if e not in found] if found else None)
    assert cfg.dataset.episodes == chosen
    said = in_words(cfg)
    if found:
        assert said.startswith(f"{len(found)} episodes are held out of training")
    elif dataset.keys() <= {"streaming"}:
        assert said.startswith("every episode is trained on")
    else:
        assert said is None


def test_a_sharded_student_is_refused(workshop, tmp_path, capsys, monkeypatch):
    """Before LeRobot's training begins."""
    flags = reflow_run(workshop, tmp_path / "run", **EVERY_TWO)
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("smolvla_reflow.training.run.lerobot_train", lambda cfg, hooked: hooked(sharded))
    assert "cannot measure a student that FSDP has sharded" in refused(capsys, reflow_train_main, flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(workshop, tmp_path):
    """Each measures, the main one logs, and with few rows of which some are recorded both report the same names."""
    changes = {"batch_size": 2, "log_freq": 1, "reflow__real_data_ratio": 0.5, **EVERY_TWO}
    flags = reflow_run(workshop, tmp_path / "run", steps=4, **changes)
    result = torchrun("-m", "smolvla_reflow.commands.train", *flags)
    output = result.stdout + result.stderr
    assert [int(step) for step, _ in LINE.findall(output)] == [0, 2, 4]
    assert len(re.findall(r"one_step_error:\d", output)) == 4
