"""Under autocast the teacher runs as its stock inference would, and stays close to float32."""

import pytest
import torch
from helpers import SMOOTH, let_each_encode_for_itself, loss_of
from oracle import inputs_of

from smolvla_reflow import Solver, attach
from smolvla_reflow.smolvla.sharing import vision_encoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def relative_error(found, exact):
    return (found - exact).square().mean().sqrt() / exact.std()


@pytest.mark.parametrize("device", DEVICES)
def test_couplings_under_autocast_are_the_stock_samplers(policy, teacher, batch, noise, device):
    policy, teacher, noise = policy.to(device), teacher.to(device), noise.to(device)
    inputs = inputs_of(policy, {name: tensor.to(device) for name, tensor in batch.items()})
    attach(policy, teacher, solver="euler")
    with torch.autocast(device, torch.bfloat16):
        actions = policy.model.generate_reflow_target(*inputs, noise=noise).actions
        with torch.no_grad():
            stock = teacher.model.sample_actions(*inputs, noise=noise)
    assert torch.equal(actions, stock)
    assert actions.dtype == torch.float32
    assert 0 < relative_error(actions, policy.model.generate_reflow_target(*inputs, noise=noise).actions) < 0.02


def test_other_solvers_keep_the_state_in_float32(make_policy, batch, noise):
    """An adaptive solver takes other steps than in float32, so that only its distance to the true ends can be promised."""
    policy, teacher = make_policy(seed=0, **SMOOTH), make_policy(seed=1, **SMOOTH)

    def actions(method, autocast=True, **settings):
        with (
            attach(policy, teacher, solver=Solver(method, **settings)),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            found = policy.model.generate_reflow_target(*inputs_of(policy, batch), noise=noise).actions
        assert found.dtype == torch.float32
        return found

    for method in ("midpoint", "rk4"):
        assert 0 < relative_error(actions(method), actions(method, autocast=False)) < 0.02
    true = actions("rk4", autocast=False, num_steps=50)
    one_euler_step = actions("euler", autocast=False, num_steps=1)
    adaptive = actions("dopri5", rtol=1e-2, atol=1e-2)
    assert (adaptive - true).square().mean() < (one_euler_step - true).square().mean() / 10


def test_features_are_shared_under_autocast(policy, teacher, batch, noise_and_time, monkeypatch):
    losses, passes = [], []
    for shared in (True, False):
        if not shared:
            let_each_encode_for_itself(monkeypatch)
        with (
            attach(policy, teacher, train_state_proj=True, solver="midpoint") as attachment,
            torch.autocast("cpu", torch.bfloat16),
        ):
            seen = []
            for each in (policy, attachment.teacher):
                layer = vision_encoder(each).encoder.layers[0]
                layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(module))
            losses.append(loss_of(policy, batch, *noise_and_time))
            passes.append(len(seen))
    assert torch.equal(*losses)
    assert passes[0] < passes[1]
