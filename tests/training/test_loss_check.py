"""When a run is stopped for its loss, and when a gradient scaler or a loss's own scale is reason not to."""

import math
from dataclasses import replace

import lerobot
import pytest
import torch
from accelerate import Accelerator
from helpers import reflow_run, reflow_train_main, refused, same_tensors, saved_weights
from packaging.version import Version

from smolvla_reflow import ReflowError, compat, register_loss_strategy
from smolvla_reflow.training.loss_check import LossCheck


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", enabled=enabled)


def check(losses, step=0, scaler=None):
    """Look at losses one by one; returns the message with which the run is stopped, if it is."""
    look = LossCheck(step, scaler)
    try:
        for loss in losses:
            look(loss)
    except ReflowError as error:
        return str(error)
    return None


@pytest.mark.parametrize("without", [None, scaler(enabled=False)], ids=["no scaler", "a disabled one"])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_run(loss, without):
    said = check([1.0, loss, 1.0], step=40, scaler=without)
    assert said.startswith(f"The loss is {loss:g} in step 42, so the run was stopped. ")


@pytest.mark.parametrize(
    ("beginning", "limit"), [(0.0, 1e4), (0.02, 1e4), (0.9, 1e4), (30.0, 3e5), (7e5, 7e9), (-3.0, 1e4)]
)
def test_a_loss_is_judged_by_where_it_began(beginning, limit):
    assert check([beginning, 0.99 * limit, beginning, 0.99 * limit]) is None
    assert "in step 3, so the run was stopped" in check([beginning, 0.99 * limit, 1.01 * limit])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_scaler_may_skip_19_steps_in_a_row(bad):
    assert check([bad] * 19, scaler=scaler()) is None
    assert check(([bad] * 19 + [1.0]) * 5, scaler=scaler()) is None
    assert "in step 39, so the run was stopped" in check([1.0] * 19 + [bad] * 21, scaler=scaler())
    assert "The loss is 20000 in step 2" in check([1.0, 2e4], scaler=scaler())  # which a scaler does not skip


@pytest.mark.skipif(Version(lerobot.__version__) >= Version("0.6.2"), reason="LeRobot builds its Accelerator by itself")
def test_in_fp16_a_step_is_skipped_and_a_run_that_never_recovers_is_stopped(
    workshop, tmp_path, capsys, registry, monkeypatch
):
    """With a gradient scaler, as LeRobot trains on a GPU. A skipped step leaves the weights as they were."""

    def with_scaler(*args, **kwargs):
        accelerator = Accelerator(*args, **kwargs)
        accelerator.scaler = scaler()
        return accelerator

    calls = iter(range(1, 1000))

    @register_loss_strategy("spoilt")
    def spoilt(step):
        coupling = step.coupling()
        factor = math.inf if (call := next(calls)) == 2 or call > 3 else 1
        return step.losses(replace(coupling, actions=coupling.actions * factor))

    monkeypatch.setattr(compat, "Accelerator", with_scaler)
    run = tmp_path / "run"
    flags = reflow_run(workshop, run, steps=40, save_freq=1, batch_size=2, reflow__strategy="spoilt")
    line = refused(capsys, reflow_train_main, flags)
    first, skipped, third = (saved_weights(run, f"00000{step}") for step in (1, 2, 3))
    assert same_tensors(first, skipped)
    assert not same_tensors(skipped, third)
    assert all(value.isfinite().all() for value in third.values())
    assert "in step 23, so the run was stopped" in line
    assert f"--config_path={run}/checkpoints/000022/pretrained_model/train_config.json --resume=true" in line
