"""Measuring a student on held-out frames while it trains: what is measured, and that nothing else changes by it."""

import importlib
import json
import re
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from helpers import reflow_run, reflow_train_main, refused, torchrun
from lerobot.configs.default import DatasetConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from oracle import Flow
from pairs_helpers import CHUNK, WIDTH, observed, weights

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.noise import pair_noise
from smolvla_reflow.training import measuring
from smolvla_reflow.training.inherited import inherit

HELD = "[6,7]"  # the last two of eight episodes, six frames each: 36 to 47
NAMES = ("flow_error_1", "flow_error_2", "energy_distance_1", "energy_distance_2")
LINE = re.compile(r"Reflow: held out, after step (\d+): (.*)")
BAR = re.compile(r"The teacher's own num_steps=(\d+): flow_error:(\S+) energy_distance:(\S+)")
HOLDS_OUT = "eval_split" in {field.name for field in fields(DatasetConfig)}


def by_name(text):
    return {name: float(value) for name, value in (word.split(":") for word in text.split())}


def measured(capsys):
    """What was logged: the values by step, and the teacher's own."""
    log = capsys.readouterr().err
    ((steps, *bar),) = BAR.findall(log)
    return {int(step): by_name(text) for step, text in LINE.findall(log)}, (int(steps), *map(float, bar)), log


class Again:
    """The same numbers from LeRobot's own parts: stock sampler, the oracle's velocity, and formulas written out."""

    def __init__(self, workshop, frames):
        self.teacher, self.batch = observed(workshop, frames=frames)
        self.noise = torch.stack([pair_noise(0, frame, k, (CHUNK, WIDTH)) for frame in frames for k in range(4)])
        self.repeated = {
            name: value.repeat_interleave(4, dim=0)
            for name, value in self.batch.items()
            if isinstance(value, torch.Tensor) and value.ndim
        }
        flow, x, h = Flow(self.teacher, self.repeated), self.noise, 1 / 32
        with torch.no_grad():
            for i in range(32):  # Kutta's 3/8 rule

                def v(x, t):
                    return flow.velocity(x, torch.full((len(x),), t))

                t = 1 - i * h
                k1 = v(x, t)
                k2 = v(x - h * k1 / 3, t - h / 3)
                k3 = v(x - h * (k2 - k1 / 3), t - 2 * h / 3)
                k4 = v(x - h * (k1 - k2 + k3), t - h)
                x = x - h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
        self.fine = x[..., :2]

    def distances(self, policy, num_steps):
        """Flow error and energy distance. The batches are normalised by mean and standard deviation."""
        policy.config.num_steps = num_steps
        ends = policy.predict_action_chunk(dict(self.repeated), noise=self.noise)
        by_frame = []
        for x, y in zip(ends.split(4), self.fine.split(4), strict=True):

            def mean(a, b):
                pairs = [(a[i] - b[j]).square().mean().sqrt() for i in range(4) for j in range(4) if i != j]
                return sum(pairs) / len(pairs)

            by_frame.append((2 * mean(x, y) - mean(x, x) - mean(y, y)).item())
        return (ends - self.fine).square().mean().sqrt().item(), sum(by_frame) / len(by_frame)


@pytest.mark.parametrize("frames", [None, 5], ids=["all", "some"])
def test_flow_error_and_energy_distance_are_those_of_the_checkpoints(workshop, tmp_path, capsys, monkeypatch, frames):
    """At the start, every two steps, and after the last; some frames are evenly spaced ones."""
    positions = np.arange(12)
    if frames is not None:
        monkeypatch.setattr(measuring, "FRAMES", frames)
        positions = np.round(np.linspace(0, 11, frames))
    run, every = tmp_path / "run", {"reflow__measure_freq": 2, "reflow__measure_episodes": HELD}
    reflow_train_main(reflow_run(workshop, run, steps=4, save_freq=2, **every))
    found, bar, log = measured(capsys)
    assert "episodes [6, 7] are measured on and not trained on" in log
    assert list(found) == [0, 2, 4]
    again = Again(workshop, [36 + int(position) for position in positions])
    for step, values in found.items():
        folder = run / f"checkpoints/{step:06}/pretrained_model" if step else workshop / "1rf" / LAST
        policy = SmolVLAPolicy.from_pretrained(folder).eval()
        one, two = (again.distances(policy, n) for n in (1, 2))
        expected = dict(zip(NAMES, (one[0], two[0], one[1], two[1]), strict=True))
        assert values == pytest.approx(expected, abs=6e-5, rel=1e-3)
    assert len({values["flow_error_1"] for values in found.values()}) == 3
    assert bar[0] == 10
    assert bar[1:] == pytest.approx(again.distances(again.teacher, 10), abs=6e-5, rel=1e-3)


def test_the_last_values_stand_in_the_metrics(workshop, tmp_path, capsys, monkeypatch):
    """Of each step, as the step's own do; on the console at log_freq."""
    monitor = importlib.import_module("smolvla_reflow.step_metrics").StepMetrics
    returned, read = [], monitor.read
    monkeypatch.setattr(monitor, "read", lambda *a: returned.append(read(*a)) or returned[-1])
    every = {"reflow__measure_freq": 2, "reflow__measure_episodes": HELD}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=4, log_freq=1, **every))
    found, _, log = measured(capsys)
    for metrics, step in zip(returned, (0, 0, 2, 2), strict=True):
        assert {name: metrics[name] for name in NAMES} == pytest.approx(found[step], abs=6e-5)
        assert "one_step_error" in metrics
    printed = [float(value) for value in re.findall(r" one_step_error:.* flow_error_1:(\S+)", log)]
    if not printed:  # in the order in which they were first reported
        printed = [float(value) for value in re.findall(r" flow_error_1:(\S+) .*one_step_error:", log)]
    assert printed == pytest.approx([found[step]["flow_error_1"] for step in (0, 0, 2, 2)], abs=6e-4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_is_the_same_with_and_without(workshop, tmp_path, num_workers):
    """Bit for bit: with the random numbers of `jittered`, of times and of noise."""
    common = {"steps": 3, "num_workers": num_workers, "save_freq": 3}
    without = {"dataset__episodes": "[0,1,2,3,4,5]"}
    every = {"reflow__measure_freq": 1, "reflow__measure_episodes": HELD}
    reflow_train_main(reflow_run(workshop, tmp_path / "without", **common, **without))
    reflow_train_main(reflow_run(workshop, tmp_path / "with", **common, **every))
    one, other = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = [
        (tmp_path / run / "checkpoints/last/training_state/rng_state.safetensors").read_bytes()
        for run in ("without", "with")
    ]
    assert state[0] == state[1]


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
    every = {"reflow__measure_freq": 2, "reflow__measure_episodes": HELD, "steps": 2}
    reflow_train_main(reflow_run(workshop, tmp_path / "online", **every))
    online = measured(capsys)
    reflow_train_main(reflow_run(workshop, tmp_path / "stored", reflow__pairs_path=stored, **every))
    offline = measured(capsys)
    assert offline[0][0] == pytest.approx(online[0][0], abs=2e-4)
    assert offline[1] == pytest.approx(online[1], abs=2e-4)
    assert offline[0].keys() == {0, 2}
    assert "no teacher is loaded" in offline[2]


def test_a_resumed_run_goes_on(workshop, tmp_path, capsys):
    """Its steps are counted on, and the episodes stay held out."""
    run = tmp_path / "run"
    every = {"reflow__measure_freq": 2, "reflow__measure_episodes": HELD}
    reflow_train_main(reflow_run(workshop, run, steps=3, save_freq=3, **every))
    first, bar, _ = measured(capsys)
    config = json.loads((run / LAST / "train_config.json").read_text())
    assert config["dataset"]["episodes"] == [0, 1, 2, 3, 4, 5]
    assert config["reflow"]["measure_episodes"] == [6, 7]
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=6"])
    second, bar_again, _ = measured(capsys)
    assert (list(first), list(second)) == ([0, 2], [3, 4, 6])
    assert bar_again == bar
    again = Again(workshop, range(36, 48))
    policy = SmolVLAPolicy.from_pretrained(run / "checkpoints/000003/pretrained_model").eval()
    assert second[3]["flow_error_1"] == pytest.approx(again.distances(policy, 1)[0], abs=6e-5, rel=1e-3)
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=7", "--reflow.measure_freq=0"])
    assert not LINE.search(capsys.readouterr().err)


@pytest.mark.skipif(not HOLDS_OUT, reason="LeRobot holds nothing out before 0.6")
def test_what_lerobot_holds_out(workshop, tmp_path, capsys):
    common = {"steps": 1, "reflow__measure_freq": 1}
    reflow_train_main(reflow_run(workshop, tmp_path / "split", dataset__eval_split=0.25, **common))
    split = measured(capsys)
    assert "are measured on" not in split[2]
    reflow_train_main(reflow_run(workshop, tmp_path / "named", reflow__measure_episodes=HELD, **common))
    named = measured(capsys)
    assert split[1] == named[1]
    assert split[0][0] == pytest.approx(named[0][0], abs=1e-5)
    reflow_train_main(
        reflow_run(workshop, tmp_path / "both", dataset__eval_split=0.3, reflow__measure_episodes=HELD, **common)
    )
    assert measured(capsys)[1] == named[1]  # on those that are named, before LeRobot splits the others
    saved = json.loads((tmp_path / "both" / LAST / "train_config.json").read_text())["dataset"]
    assert saved["episodes"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freq": -1, "episodes": HELD}, "--reflow.measure_freq=-1: give a number of steps, or 0 for never"),
        ({"episodes": HELD}, "--reflow.measure_episodes has no effect without --reflow.measure_freq"),
        ({"freq": 2}, "name episodes to measure on and not to train on, --reflow.measure_episodes=[0,1]"),
        ({"freq": 2, "episodes": "[]"}, "name episodes to measure on"),
        ({"freq": 2, "episodes": "[7,8]"}, "the dataset has 8, and no episode 8"),
        ({"freq": 2, "episodes": "[-1]"}, "the dataset has 8, and no episode -1"),
        ({"freq": 2, "episodes": "[0,1,2,3,4,5,6,7]"}, "names every episode, so that none is left to train on"),
        ({"freq": 2, "episodes": HELD, "trained": "[5,6]"}, "episode 6 is trained on, too; take it out of"),
        ({"freq": 2, "episodes": HELD, "streaming": "true"}, "not --dataset.streaming"),
    ],
)
def test_what_cannot_be_measured_on_is_refused(workshop, tmp_path, capsys, flags, message):
    names = {"freq": "reflow__measure_freq", "episodes": "reflow__measure_episodes"}
    names |= {"trained": "dataset__episodes", "streaming": "dataset__streaming"}
    given = {names[name]: value for name, value in flags.items()}
    assert message in refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_eval_split_is_offered_where_there_is_one(workshop, tmp_path, capsys):
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__measure_freq=2))
    assert ("--dataset.eval_split" in line) is HOLDS_OUT


def test_a_sharded_student_is_refused(workshop, tmp_path, capsys, monkeypatch):
    """Before LeRobot's training begins."""
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("smolvla_reflow.training.run.lerobot_train", lambda cfg, hooked: hooked(sharded))
    flags = reflow_run(workshop, tmp_path / "run", reflow__measure_freq=2, reflow__measure_episodes=HELD)
    assert "cannot measure a student that FSDP has sharded" in refused(capsys, reflow_train_main, flags)
    assert not (tmp_path / "run").exists()


def test_episodes_of_a_saved_run_hold_for_its_own_dataset(workshop, tmp_path):
    every = {"reflow__measure_freq": 1, "reflow__measure_episodes": HELD}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1, **every))
    file = str(tmp_path / "run" / LAST / "train_config.json")
    assert inherit(file, {}).flags["reflow.measure_episodes"] == [6, 7]
    assert "reflow.measure_episodes" not in inherit(file, {"dataset.repo_id": "me/another"}).flags


def test_two_processes(workshop, tmp_path):
    """Each measures, the main one logs, and with few rows of which some are recorded both report the same names."""
    flags = reflow_run(workshop, tmp_path / "run", steps=4, batch_size=2, log_freq=1)
    flags += ["--reflow.measure_freq=2", f"--reflow.measure_episodes={HELD}", "--reflow.real_data_ratio=0.5"]
    result = torchrun("-m", "smolvla_reflow.commands.train", *flags)
    output = result.stdout + result.stderr
    assert [int(step) for step, _ in LINE.findall(output)] == [0, 2, 4]
    assert len(re.findall(r"one_step_error:\d", output)) == 4
