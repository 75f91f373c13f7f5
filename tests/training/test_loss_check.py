"""When a run is stopped for its loss, and when a gradient scaler or a loss's own scale is reason not to."""

import json
import logging
import math

import lerobot
import pytest
import torch
from accelerate import Accelerator
from helpers import reflow_run, reflow_train_main, refused
from packaging.version import Version
from safetensors.torch import load_file

from smolvla_reflow import Losses, ReflowError, compat, register_loss_strategy
from smolvla_reflow.training.loss_check import LossCheck


def scaler(enabled=True):
    return torch.amp.GradScaler("cpu", enabled=enabled)


def check(losses, step=0, accumulation=1, scaler=None):
    """Look at losses one by one; returns the message with which the run is stopped, if it is."""
    look = LossCheck(step, accumulation, scaler, advice=lambda: "Go on.")
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
    assert said.endswith(" Go on.")


@pytest.mark.parametrize(
    ("beginning", "limit"), [(0.0, 1e4), (0.02, 1e4), (0.9, 1e4), (30.0, 3e5), (7e5, 7e9), (-3.0, 1e4)]
)
def test_a_loss_is_judged_by_where_it_began(beginning, limit):
    assert check([beginning, 0.99 * limit, beginning, 0.99 * limit]) is None
    assert "in step 3, so the run was stopped" in check([beginning, 0.99 * limit, 1.01 * limit])


def test_a_loss_that_grows_with_the_error_is_judged_by_the_root():
    look = LossCheck(0, 1, None, advice=lambda: "Go on.", exploded=1e2)
    for loss in (0.5, 99.0, 0.5):
        look(loss)
    with pytest.raises(ReflowError, match="The loss is 101 in step 4, so the run was stopped"):
        look(101.0)


def test_a_high_beginning_is_pointed_out(caplog):
    with caplog.at_level(logging.WARNING):
        assert check([2e4, 2e4, 1.0]) is None
    assert len(caplog.records) == 1
    assert "the loss begins at 20000" in caplog.text
    caplog.clear()
    assert check([9e3, 2e4]) is None
    assert not caplog.records


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_scaler_may_skip_19_steps_in_a_row(bad):
    assert check([bad] * 19, scaler=scaler()) is None
    assert check(([bad] * 19 + [1.0]) * 5, scaler=scaler()) is None
    assert "in step 39, so the run was stopped" in check([1.0] * 19 + [bad] * 21, scaler=scaler())
    assert "The loss is 20000 in step 2" in check([1.0, 2e4], scaler=scaler())  # which a scaler does not skip


def test_a_step_of_several_passes_is_skipped_for_one_of_them():
    one_in_four = [1.0, math.nan, 1.0, 1.0]
    assert check(one_in_four * 19 + [1.0] * 4 + one_in_four * 19, accumulation=4, scaler=scaler()) is None
    assert "in step 78, so" in check(one_in_four * 20, accumulation=4, scaler=scaler())
    assert check([math.nan] * 76, accumulation=4, scaler=scaler()) is None


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch):
    """LeRobot trains with a gradient scaler, as it does in fp16, which needs a GPU."""

    def with_scaler(*args, **kwargs):
        accelerator = Accelerator(*args, **kwargs)
        accelerator.scaler = scaler()
        return accelerator

    monkeypatch.setattr(compat, "Accelerator", with_scaler)


def spoil(name, at, by):
    """Register a loss that is `by` times reflow's in the calls whose numbers are in `at`."""
    calls = iter(range(1, 1000))

    @register_loss_strategy(name)
    def spoilt(step):
        values = step.losses(step.coupling()).values
        return Losses(values * by if next(calls) in at else values)


before_0_6_2 = pytest.mark.skipif(
    Version(lerobot.__version__) >= Version("0.6.2"), reason="builds its Accelerator by itself"
)


@before_0_6_2
def test_a_skipped_step_leaves_the_weights_as_they_were(workshop, tmp_path, registry, scaled):
    spoil("spoilt", at={2}, by=math.inf)
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, steps=3, save_freq=1, reflow__strategy="spoilt"))
    weights = [load_file(run / f"checkpoints/00000{step}/pretrained_model/model.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(value.isfinite().all() for value in weights[2].values())


@before_0_6_2
def test_a_run_that_the_scaler_cannot_save_is_stopped(workshop, tmp_path, capsys, registry, scaled):
    spoil("spoilt", at=range(3, 1000), by=math.nan)
    run = tmp_path / "run"
    flags = reflow_run(workshop, run, steps=40, save_freq=10, batch_size=2, reflow__strategy="spoilt")
    line = refused(capsys, reflow_train_main, flags)
    assert "The loss is nan in step 22, so the run was stopped" in line
    assert f"--config_path={run}/checkpoints/000020/pretrained_model/train_config.json --resume=true" in line


def test_a_loss_of_another_scale_is_trained(workshop, tmp_path, registry):
    spoil("large", at=range(1, 1000), by=1e6)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=2, reflow__strategy="large"))
    state = tmp_path / "run/checkpoints/000002/training_state/training_step.json"
    assert json.loads(state.read_text())["step"] == 2
