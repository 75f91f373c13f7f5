"""Under autocast the teacher runs as its stock inference would, and stays close to float32."""

import contextlib

import pytest
import torch
from helpers import SMOOTH

from smolvla_reflow import Solver, attach
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.vision import vision_encoder

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_couplings_under_autocast_are_the_stock_samplers(policy, teacher, batch, noise_and_time, device):
    noise = noise_and_time[0].to(device)
    policy, teacher = policy.to(device), teacher.to(device)
    observation = observe(policy, {name: tensor.to(device) for name, tensor in batch.items()})
    attach(policy, teacher, solver="euler")
    with torch.autocast(device, torch.bfloat16):
        coupling = policy.model.generate_reflow_target(*observation, noise=noise)
        with torch.no_grad():
            stock = teacher.model.sample_actions(*observation, noise=noise)
    assert torch.equal(coupling.actions, stock)
    assert coupling.actions.dtype == torch.float32
    exact = policy.model.generate_reflow_target(*observation, noise=noise).actions
    distance = (coupling.actions - exact).square().mean().sqrt() / exact.std()
    assert 0 < distance < 0.02


@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
def test_other_solvers_keep_the_state_in_float32(make_policy, batch, noise_and_time, solver):
    noise, _ = noise_and_time
    policy, teacher = make_policy(seed=0, **SMOOTH), make_policy(seed=1, **SMOOTH)
    attach(policy, teacher, solver=solver)
    with torch.autocast("cpu", torch.bfloat16):
        actions = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise).actions
    exact = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise).actions
    assert actions.dtype == torch.float32
    assert 0 < (actions - exact).square().mean().sqrt() / exact.std() < 0.02


def test_an_adaptive_solver_copes_with_rounded_velocities(make_policy, batch, noise_and_time):
    """It takes other steps than in float32, so that nothing but its distance to the true ends can be promised."""
    noise, _ = noise_and_time
    policy, teacher = make_policy(seed=0, **SMOOTH), make_policy(seed=1, **SMOOTH)

    def actions(method, **settings):
        with attach(policy, teacher, solver=Solver(method, **settings)):
            return policy.model.generate_reflow_target(*observe(policy, batch), noise=noise).actions

    true = actions("rk4", num_steps=50)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = actions("dopri5", rtol=1e-2, atol=1e-2)
    assert rounded.dtype == torch.float32
    one_euler_step = (actions("euler", num_steps=1) - true).square().mean()
    assert (rounded - true).square().mean() < one_euler_step / 10


def test_features_are_shared_under_autocast(policy, teacher, batch, noise_and_time, nothing_shared):
    noise, time = noise_and_time
    losses, passes = [], []
    for shared in (contextlib.nullcontext(), nothing_shared()):
        with (
            shared,
            attach(policy, teacher, train_state_proj=True, solver="midpoint") as attachment,
            torch.autocast("cpu", torch.bfloat16),
        ):
            seen = []
            for each in (policy, attachment.teacher):
                layer = vision_encoder(each).encoder.layers[0]
                layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(module))
            losses.append(policy.train().forward(dict(batch), noise=noise, time=time)[0])
            passes.append(len(seen))
    assert torch.equal(*losses)
    assert passes[0] < passes[1]
