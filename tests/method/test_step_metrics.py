"""The numbers that a training step reports beside the loss (one-step error, loss by tenths of t), and their printing."""

import importlib
import json
import math
import re

import pytest
import torch
from helpers import ACTION_DIM, CHUNK, attach_plain, plain, reflow_run, reflow_train_main
from lerobot.configs.types import NormalizationMode
from oracle import squared_errors

from smolvla_reflow import Solver, register_loss_strategy
from smolvla_reflow.compat import prints_metrics
from smolvla_reflow.smolvla.normalization import action_deviations
from smolvla_reflow.step_metrics import StepMetrics
from smolvla_reflow.times import TimeSampling

attaching = importlib.import_module("smolvla_reflow.attachment")  # which the package hides by the function of that name
TENTHS = [f"velocity_mse_t{k}" for k in range(10)]
TOLERANCE = {"rel": 1e-4}


def in_tenth(times, k):
    """[k/10, (k+1)/10), the last one with its end."""
    return [k / 10 - 1e-6 <= t < (k + 1) / 10 - 1e-6 or (k == 9 and t > 0.999999) for t in times.tolist()]


def metrics_of(policy, batch, **given):
    return policy.train().forward(dict(batch), **given)[1]


def numbers(metrics):
    """The metrics without the loss."""
    return {name: value for name, value in metrics.items() if name != "loss"}


@pytest.mark.parametrize("strategy", ["distill", "reflow"])
def test_one_step_error_is_that_of_stock_one_step_actions(policy, teacher, batch, noise, strategy):
    """Against both policies' own `predict_action_chunk`, the student's in one step, the teacher's in its ten. The unit
    is a standard deviation of the dimensions that move."""
    recipe = plain(time_sampling="grid:1") if strategy == "reflow" else None
    attachment = attach_plain(policy, teacher, strategy=strategy, recipe=recipe, solver="euler")
    loss, metrics = policy.train().forward(dict(batch), noise)
    attachment.step_metrics.sums.zero_()
    attachment.step_metrics.deviations = torch.tensor([3.0, 0.0])
    in_deviations = metrics_of(policy, batch, noise=noise)
    policy.eval()
    policy.config.num_steps = 1
    one_step, ten = (each.predict_action_chunk(dict(batch), noise=noise) for each in (policy, teacher))
    assert one_step.shape == (4, CHUNK, ACTION_DIM)
    squares = (one_step - ten).square()
    assert metrics["one_step_error"] == pytest.approx(squares.mean().sqrt().item(), **TOLERANCE)
    assert in_deviations["one_step_error"] == pytest.approx(3 * squares[..., 0].mean().sqrt().item(), **TOLERANCE)
    assert metrics["velocity_mse_t9"] == pytest.approx(loss.item())  # the mean over the padded dimensions, too
    assert metrics.keys() == {"loss", "one_step_error", "velocity_mse_t9"}
    assert all(isinstance(value, float) for value in metrics.values())


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


def test_the_command_knows_the_statistics(workshop, tmp_path, monkeypatch, capsys):
    """And without log_freq it prints none of the numbers."""
    told = []
    monkeypatch.setattr(attaching, "action_deviations", lambda *a: told.append(a[1]) or action_deviations(*a))
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1, log_freq=0))
    (stats,) = told
    saved = json.loads((workshop / "dataset/meta/stats.json").read_text())["action"]
    assert list(stats["action"]["std"]) == pytest.approx(saved["std"])
    assert "one_step_error" not in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("time_sampling", ["grid:1+beta", "grid:10"])
def test_losses_by_tenths_are_means_over_the_couplings_lines(policy, teacher, batch, asked, ratio, time_sampling):
    """Against errors derived anew: recorded rows do not touch them, and all lines stand in for an empty tenth."""
    recipe = plain(time_sampling=time_sampling, couplings_per_frame=6, real_data_ratio=ratio)
    attachment = attach_plain(policy, teacher, recipe=recipe)
    torch.manual_seed(1)
    metrics = numbers(metrics_of(policy, batch))
    assert attachment.step_metrics.reported == metrics
    lines = asked[-1]  # the recorded rows come before
    times, errors = lines[2], squared_errors(policy, {n: v[int(ratio * 4) :] for n, v in batch.items()}, *lines)
    expected, empty = {}, 0
    for k, name in enumerate(TENTHS):
        rows = in_tenth(times, k)
        empty += not any(rows)
        expected[name] = errors[rows if any(rows) else slice(None)].mean().item()
    at_one = times == 1
    assert at_one.any()
    expected["one_step_error"] = errors[at_one][..., :ACTION_DIM].mean().sqrt().item()
    if time_sampling == "grid:10":
        del expected["velocity_mse_t0"]
    assert metrics == pytest.approx(expected, **TOLERANCE)
    assert 0 < empty < 8
    assert len(set(expected.values())) > 4


def test_weights_do_not_touch_them(policy, teacher, batch, noise, registry):
    found = []
    for weight in (1.0, 100.0):
        name = f"weighed by {weight}"
        register_loss_strategy(name)(lambda step, w=weight: w * step.losses(step.coupling(), times="grid:2"))
        with attach_plain(policy, teacher, strategy=name, solver="euler"):
            torch.manual_seed(0)
            found.append(metrics_of(policy, batch, noise=noise))
    assert found[1]["loss"] == pytest.approx(100 * found[0]["loss"])
    assert numbers(found[1]) == numbers(found[0])
    assert numbers(found[0]).keys() == {"one_step_error", "velocity_mse_t5", "velocity_mse_t9"}


def test_they_are_running_means(policy, teacher, batch, asked):
    """Means over all lines until now. The weight of a step's lines falls by 2 % with each later step."""
    sums, count = torch.zeros(()), 0.0
    attach_plain(policy, teacher, recipe=plain(time_sampling="grid:1+beta", couplings_per_frame=4))
    for seed in range(3):
        torch.manual_seed(seed)
        metrics = metrics_of(policy, batch)
        errors = squared_errors(policy, batch, *asked[-1])[asked[-1][2] == 1][..., :ACTION_DIM].mean(dim=(1, 2))
        sums, count = 0.98 * sums + errors.sum(), 0.98 * count + len(errors)
        assert metrics["one_step_error"] == pytest.approx((sums / count).sqrt().item(), **TOLERANCE)


def test_a_step_that_is_not_finite_is_forgotten(policy, teacher, batch, noise):
    """In fp16 some are not, and are skipped."""
    with attach_plain(policy, teacher, strategy="distill", solver="euler"):
        expected = metrics_of(policy, batch, noise=noise)
    attach_plain(policy, teacher, strategy="distill", solver="euler")
    assert math.isnan(metrics_of(policy, batch, noise=torch.full_like(noise, torch.nan))["loss"])
    assert metrics_of(policy, batch, noise=noise) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        ("grid:1+beta", ["one_step_error", *TENTHS]),
        ("beta", TENTHS),
        ("grid:1", ["one_step_error", "velocity_mse_t9"]),
        ("grid:4", ["one_step_error", "velocity_mse_t2", "velocity_mse_t5", "velocity_mse_t7", "velocity_mse_t9"]),
        (
            "grid:2+grid:3",
            ["one_step_error", "velocity_mse_t3", "velocity_mse_t5", "velocity_mse_t6", "velocity_mse_t9"],
        ),
    ],
)
def test_the_same_names_in_every_step(policy, batch, sampling, names):
    """LeRobot reduces the metrics of all processes together, and each process draws its own times and rows."""
    small = {name: value[:2] for name, value in batch.items()}
    recipe = plain(time_sampling=sampling, real_data_ratio=0.75)
    attach_plain(policy, recipe=recipe, solver=Solver("euler", num_steps=1))
    torch.manual_seed(0)
    assert {tuple(metrics_of(policy, small)) for _ in range(20)} == {("loss", *names)}


@pytest.mark.parametrize("name", ["grid:7", "grid:10", "grid:12+grid:3"])
def test_tenths_are_those_that_the_times_fall_into(name):
    torch.manual_seed(0)
    times = TimeSampling(name).draw(2000, torch.device("cpu"), None)
    assert TimeSampling(name).tenths == {k for k in range(10) if any(in_tenth(times, k))}


def test_times_of_a_losss_own(policy, teacher, batch, registry):
    """A tenth in which it has no line is NaN."""
    register_loss_strategy("late")(lambda step: step.losses(step.coupling(), times=0.8 + 0.1 * step.times()))
    attach_plain(policy, teacher, strategy="late", recipe=plain(time_sampling="grid:2"))
    torch.manual_seed(0)
    metrics = [metrics_of(policy, batch) for _ in range(8)][-1]
    assert metrics.keys() == {"loss", "one_step_error", *TENTHS}
    assert {name for name, value in metrics.items() if not math.isnan(value)} == {
        "loss",
        "velocity_mse_t8",
        "velocity_mse_t9",
    }


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
        for name in ("one_step_error", "velocity_mse_t0", "velocity_mse_t9"):
            steps = [metrics[name] for metrics in window]
            expected = sum(steps) / 2 if prints_metrics() else steps[-1]
            assert float(re.search(rf"\b{name}:(\S+)", line)[1]) == pytest.approx(expected, abs=6e-4)
