"""What a training step tells beside the loss: the one-step error, the loss by tenths of t; and where it is printed."""

import importlib
import json
import math
import re

import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, attach_plain, plain, reflow_run, reflow_train_main
from lerobot.configs.types import NormalizationMode
from oracle import Flow

from smolvla_reflow import ReflowError, Solver, detach, register_loss_strategy
from smolvla_reflow.compat import prints_metrics
from smolvla_reflow.smolvla.normalization import action_deviations
from smolvla_reflow.step_metrics import StepMetrics
from smolvla_reflow.times import TimeSampling

attaching = importlib.import_module("smolvla_reflow.attachment")  # which the package hides by the function of that name
TENTHS = [f"loss_t{k}" for k in range(10)]
TOLERANCE = {"rel": 1e-4}


def in_tenth(times, k):
    """[k/10, (k+1)/10), the last one with its end."""
    return [k / 10 - 1e-6 <= t < (k + 1) / 10 - 1e-6 or (k == 9 and t > 0.999999) for t in times.tolist()]


def errors_of(policy, batch, call):
    """Squared errors of the velocity on the lines that the student was asked about, by the oracle."""
    actions, noise, times = call
    per_frame = len(times) // len(batch["action"])
    repeated = {name: value.repeat_interleave(per_frame, dim=0) for name, value in batch.items()}
    with torch.no_grad():
        velocity = Flow(policy, repeated).velocity(torch.lerp(actions, noise, times[:, None, None]), times)
    return (velocity - (noise - actions)).square()


# --- the one-step error -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["distill", "reflow"])
def test_one_step_error_is_that_of_stock_one_step_actions(policy, teacher, batch, noise_and_time, strategy):
    """Against both policies' own `predict_action_chunk`, the student's in one step, the teacher's in its ten."""
    noise, _ = noise_and_time
    recipe = plain(time_sampling="grid:1") if strategy == "reflow" else None
    with attach_plain(policy, teacher, strategy=strategy, recipe=recipe, solver="euler"):
        loss, metrics = policy.train().forward(dict(batch), noise=noise)
    policy.eval()
    policy.config.num_steps = 1
    one_step, ten = (each.predict_action_chunk(dict(batch), noise=noise) for each in (policy, teacher))
    assert one_step.shape == (4, CHUNK, ACTION_DIM)
    expected = (one_step - ten).square().mean().sqrt().item()
    assert metrics["one_step_error"] == pytest.approx(expected, **TOLERANCE)
    assert metrics["loss_t9"] == pytest.approx(loss.item())  # which is of the padded dimensions, too
    assert metrics.keys() == {"loss", "one_step_error", "loss_t9"}
    assert all(isinstance(value, float) for value in metrics.values())


def test_one_step_error_is_in_standard_deviations_of_the_dimensions_that_move(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time
    with attach_plain(policy, teacher, strategy="distill", solver="euler") as attachment:
        attachment.step_metrics.deviations = torch.tensor([3.0, 0.0])
        _, metrics = policy.train().forward(dict(batch), noise=noise)
    policy.eval()
    policy.config.num_steps = 1
    one_step, ten = (each.predict_action_chunk(dict(batch), noise=noise)[..., 0] for each in (policy, teacher))
    assert metrics["one_step_error"] == pytest.approx(3 * (one_step - ten).square().mean().sqrt().item(), **TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "unit"), [("MEAN_STD", [1.0, 1.0, 0.0]), ("MIN_MAX", [4.0, 0.5, 0.0]), ("IDENTITY", [2.0, 0.1, 0.0])]
)
def test_how_many_standard_deviations_a_normalised_unit_is(make_policy, mode, unit):
    """In MIN_MAX a unit is half of the range. The last dimension never moves."""
    policy = make_policy(normalization_mapping={"ACTION": NormalizationMode[mode]})
    numbers = {"mean": [0.5, 7.0, 3.0], "std": [0.5, 10.0, 0.0], "min": [-1.0, 2.0, 3.0], "max": [3.0, 12.0, 3.0]}
    stats = {"action": {name: torch.tensor(values) for name, values in numbers.items()}}
    assert action_deviations(policy, stats).tolist() == pytest.approx(unit)
    assert action_deviations(policy, {}).tolist() == [1.0] * ACTION_DIM  # of the config, and nothing known


def test_the_command_knows_the_statistics(workshop, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(attaching, "action_deviations", lambda *a: told.append(a[1]) or action_deviations(*a))
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1))
    (stats,) = told
    numbers = json.loads((workshop / "dataset/meta/stats.json").read_text())["action"]
    assert list(stats["action"]["std"]) == pytest.approx(numbers["std"])


# --- by tenths of t -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("time_sampling", ["grid:1+beta", "grid:10"])
def test_losses_by_tenths_are_means_over_the_couplings_lines(policy, teacher, batch, asked, ratio, time_sampling):
    """Against errors derived anew: recorded rows do not touch them, and all lines stand in for an empty tenth."""

    recipe = plain(time_sampling=time_sampling, couplings_per_frame=6, real_data_ratio=ratio)
    with attach_plain(policy, teacher, recipe=recipe) as attachment:
        torch.manual_seed(1)
        _, metrics = policy.train().forward(dict(batch))
        assert attachment.step_metrics.reported == {k: v for k, v in metrics.items() if k != "loss"}
    couplings = asked[-1]  # the recorded rows come before
    frames = {name: value[int(ratio * 4) :] for name, value in batch.items()}
    times, errors = couplings[2], errors_of(policy, frames, couplings)
    expected, empty = {}, 0
    for k, name in enumerate(TENTHS):
        rows = in_tenth(times, k)
        empty += not any(rows)
        expected[name] = errors[rows if any(rows) else slice(None)].mean().item()
    at_one = times == 1
    assert at_one.any()
    expected["one_step_error"] = errors[at_one][..., :ACTION_DIM].mean().sqrt().item()
    if time_sampling == "grid:10":
        del expected["loss_t0"]
    assert {k: v for k, v in metrics.items() if k != "loss"} == pytest.approx(expected, **TOLERANCE)
    assert 0 < empty < 8
    assert len(set(expected.values())) > 4


def test_weights_do_not_touch_them(policy, teacher, batch, noise_and_time, registry):
    @register_loss_strategy("weighed")
    def weighed(step):
        return 100.0 * step.losses(step.coupling(), times="grid:2")

    @register_loss_strategy("plain")
    def plain(step):
        return step.losses(step.coupling(), times="grid:2")

    found = {}
    for name in ("weighed", "plain"):
        with attach_plain(policy, teacher, strategy=name, solver="euler"):
            torch.manual_seed(0)
            found[name] = policy.train().forward(dict(batch), noise=noise_and_time[0])[1]
    assert found["weighed"].pop("loss") == pytest.approx(100 * found["plain"].pop("loss"))
    assert found["weighed"] == found["plain"]
    assert found["plain"].keys() == {"one_step_error", "loss_t5", "loss_t9"}


def test_they_are_running_means(policy, teacher, batch, asked):
    """Of all lines until now, each step's weighing 2 % less with each step."""
    sums, count = torch.zeros(()), 0.0
    with attach_plain(policy, teacher, recipe=plain(time_sampling="grid:1+beta", couplings_per_frame=4)):
        for seed in range(3):
            torch.manual_seed(seed)
            _, metrics = policy.train().forward(dict(batch))
            at_one = asked[-1][2] == 1
            errors = errors_of(policy, batch, asked[-1])[at_one][..., :ACTION_DIM].mean(dim=(1, 2))
            sums, count = 0.98 * sums + errors.sum(), 0.98 * count + len(errors)
            assert metrics["one_step_error"] == pytest.approx((sums / count).sqrt().item(), **TOLERANCE)


def test_a_step_that_is_not_finite_is_forgotten(policy, teacher, batch):
    """In fp16 some are, and are skipped."""
    noise = torch.randn(4, CHUNK, WIDTH)
    with attach_plain(policy, teacher, strategy="distill", solver="euler"):
        _, expected = policy.train().forward(dict(batch), noise=noise)
    with attach_plain(policy, teacher, strategy="distill", solver="euler"):
        _, broken = policy.forward(dict(batch), noise=torch.full_like(noise, torch.nan))
        _, metrics = policy.forward(dict(batch), noise=noise)
    assert math.isnan(broken["loss"])
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        ("grid:1+beta", ["one_step_error", *TENTHS]),
        ("beta", TENTHS),
        ("grid:1", ["one_step_error", "loss_t9"]),
        ("grid:4", ["one_step_error", "loss_t2", "loss_t5", "loss_t7", "loss_t9"]),
        ("grid:2+grid:3", ["one_step_error", "loss_t3", "loss_t5", "loss_t6", "loss_t9"]),
    ],
)
def test_the_same_names_in_every_step(make_policy, batch, sampling, names):
    """LeRobot reduces the metrics of all processes together, each of which draws its own times and rows."""
    policy = make_policy(seed=0).train()
    small = {name: value[:2] for name, value in batch.items()}
    found = set()
    with attach_plain(policy, recipe=plain(time_sampling=sampling, real_data_ratio=0.75)):
        for seed in range(20):
            torch.manual_seed(seed)
            found.add(tuple(policy.forward(dict(small))[1]))
    assert found == {("loss", *names)}


@pytest.mark.parametrize("name", ["grid:7", "grid:10", "grid:12+grid:3"])
def test_tenths_are_those_that_the_times_fall_into(name):
    torch.manual_seed(0)
    times = TimeSampling(name).draw(2000, torch.device("cpu"), None)
    assert TimeSampling(name).tenths == {k for k in range(10) if any(in_tenth(times, k))}


def test_times_of_a_losss_own(policy, teacher, batch, registry):
    """Where it never looks is NaN."""

    @register_loss_strategy("late")
    def late(step):
        return step.losses(step.coupling(), times=0.8 + 0.1 * step.times())

    attach_plain(policy, teacher, strategy="late", recipe=plain(time_sampling="grid:2"))
    torch.manual_seed(0)
    metrics = [policy.train().forward(dict(batch))[1] for _ in range(8)][-1]
    known = {name for name, value in metrics.items() if not math.isnan(value)}
    assert metrics.keys() == {"loss", "one_step_error", *TENTHS}
    assert known == {"loss", "loss_t8", "loss_t9"}


def test_standard_training_has_none_of_them(policy, teacher, batch):
    for settings in ({"strategy": "standard"}, {"recipe": plain(real_data_ratio=1.0)}):
        with attach_plain(policy, teacher, **settings):
            assert not {"one_step_error", *TENTHS} & policy.train().forward(dict(batch))[1].keys()


def test_a_metric_of_ones_own_has_another_name(policy, registry, batch):
    @register_loss_strategy("logging")
    def logging_(step):
        for name in ("one_step_error", "loss_t3", "flow_error_1"):
            with pytest.raises(ReflowError, match=f"'{name}' is reported of every loss; choose another name"):
                step.log(name, 1.0)
        step.log("mine", torch.tensor(2.5))
        return step.losses(step.coupling())

    attach_plain(policy, strategy="logging", solver=Solver("euler", num_steps=1))
    assert policy.train().forward(dict(batch))[1]["mine"] == 2.5
    detach(policy)


# --- the console --------------------------------------------------------------------------------------------------


def test_they_stand_on_the_console_once_at_log_freq(workshop, tmp_path, capsys, monkeypatch):
    """Before 0.6 in a line of our own, with the last step's; from then on in LeRobot's, which averages."""
    returned, read = [], StepMetrics.read
    monkeypatch.setattr(StepMetrics, "read", lambda *a: returned.append(read(*a)) or returned[-1])
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=4, log_freq=2))
    lines = [line for line in capsys.readouterr().err.splitlines() if "one_step_error:" in line]
    assert len(lines) == 2
    assert len(returned) == 4
    for step, line, window in zip((2, 4), lines, (returned[:2], returned[2:]), strict=True):
        assert f"step:{step} " in line
        for name in ("one_step_error", "loss_t0", "loss_t9"):
            steps = [metrics[name] for metrics in window]
            expected = sum(steps) / 2 if prints_metrics() else steps[-1]
            assert float(re.search(rf"\b{name}:(\S+)", line)[1]) == pytest.approx(expected, abs=6e-4)


def test_without_log_freq_nothing_is_printed(workshop, tmp_path, capsys):
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=2, log_freq=0))
    assert "one_step_error" not in capsys.readouterr().err
