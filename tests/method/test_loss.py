"""The reflow loss: its value, its gradient, its direction of time, and the losses that count in its mean."""

import pytest
import torch
from helpers import (
    ACTION_DIM,
    CHUNK,
    WIDTH,
    assert_close,
    attach_plain,
    gradients,
    loss_of,
    losses_of,
    make_batch,
    plain,
)
from oracle import Flow, by_frame, euler, inputs_of, midpoint, reflow_losses

from smolvla_reflow import Coupling, Solver


@pytest.fixture(params=[False, True], ids=["one prefix", "own prefix"])
def own_prefix(request):
    return request.param


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("step", [midpoint, euler])
def test_loss_and_gradient_equal_an_independent_derivation(policy, teacher, batch, noise_and_time, step, num_steps):
    attach_plain(policy, teacher, solver=Solver(step.__name__, num_steps=num_steps))
    loss, metrics = policy.train().forward(dict(batch), *noise_and_time)
    found = gradients(policy, loss)
    losses = reflow_losses(policy, teacher, batch, *noise_and_time, num_steps, step)
    assert_close(loss, losses.mean())
    assert metrics["loss"] == pytest.approx(loss.item())
    assert_close(losses_of(policy, batch, *noise_and_time), by_frame(losses))
    assert len(found) > 10
    assert_close(found, gradients(policy, losses.mean()))


def test_whole_chunk_counts_on_every_lerobot(policy, teacher, batch, noise_and_time):
    """LeRobot 0.6 drops padded steps and dimensions of recorded actions; a teacher's actions exist there too.
    The recorded actions themselves have no influence."""
    attach_plain(policy, teacher, solver="midpoint")
    padded = loss_of(policy, batch, *noise_and_time)
    no_pad = torch.zeros(4, CHUNK, dtype=torch.bool)
    others = {**batch, "action_is_pad": no_pad, "action": batch["action"] + 100.0}
    assert loss_of(policy, others, *noise_and_time) == padded
    losses = reflow_losses(policy, teacher, batch, *noise_and_time)
    assert abs(losses.mean() - losses[:, :, :ACTION_DIM].mean()) > 1e-3  # the fault would show


@pytest.mark.parametrize("strategy", ["standard", "reflow"])
def test_eval_mode_is_the_stock_loss(policy, teacher, batch, noise_and_time, strategy):
    """And in train mode `standard` is, whatever the recipe."""
    stock_train = loss_of(policy, batch, *noise_and_time)
    stock, stock_metrics = policy.eval().forward(dict(batch), *noise_and_time)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5))
    policy.model.training_mode = strategy
    loss, metrics = policy.eval().forward(dict(batch), *noise_and_time)
    assert torch.equal(loss, stock)
    assert metrics == stock_metrics
    if strategy == "standard":
        assert torch.equal(loss_of(policy, batch, *noise_and_time), stock_train)


def test_coupling_is_the_teachers_stock_sampler_at_full_width(policy, teacher, batch):
    """Noise is drawn, and actions are used, at max_action_dim, without a cut to the robot's width or zeros beyond it."""
    attach_plain(policy, teacher, solver="euler")
    torch.manual_seed(5)
    coupling = policy.model.generate_reflow_target(*inputs_of(policy, batch))
    assert isinstance(coupling, Coupling)
    assert coupling.noise.shape == coupling.actions.shape == (4, CHUNK, WIDTH)
    assert coupling.noise[..., ACTION_DIM:].std() > 0.5
    assert coupling.actions[..., ACTION_DIM:].abs().min() > 0
    assert not coupling.actions.requires_grad

    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(coupling.actions, teacher.model.sample_actions(*inputs_of(policy, batch)))
    assert_close(coupling.actions, Flow(teacher, batch).solved(coupling.noise, 10, euler))


def test_student_draws_noise_and_time_as_stock_training_does(policy, teacher, batch):
    """Same seed: the loss is the oracle's on the noise and time stock training would have drawn."""
    torch.manual_seed(7)
    noise = policy.model.sample_noise((4, CHUNK, WIDTH), "cpu")
    time = policy.model.sample_time(4, "cpu")
    attach_plain(policy, teacher, recipe=plain(time_sampling="beta"), solver="midpoint")
    torch.manual_seed(7)
    assert_close(loss_of(policy, batch), reflow_losses(policy, teacher, batch, noise, time).mean())


def test_direction_of_time(make_policy):
    """Trained on a linear flow with a known end, the stock sampler arrives at that end.

    The teacher's coupling is `actions = A noise + b` exactly, so the straight flow has velocity
    `u = noise - (A noise + b)` along each line. A student trained with time reversed leaves in the wrong direction.
    """
    student = make_policy(seed=0, train_expert_only=True)
    scale, shift = 0.25, 2.0

    def linear_flow(observation, *, frames, noise, per_frame):
        noise = student.model.sample_noise((len(observation.state) * per_frame, CHUNK, WIDTH), "cpu")
        return Coupling(noise, scale * noise + shift)

    attach_plain(student, pairs=linear_flow)
    batch = make_batch(16)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(student, batch).backward()
        optimizer.step()
        schedule.step()

    noise = torch.randn(16, CHUNK, WIDTH)
    known = scale * noise + shift
    backwards = noise + (noise - known)  # where a student of the literature's time direction ends

    def distance(actions):
        return (actions[..., :ACTION_DIM] - known[..., :ACTION_DIM]).square().mean().sqrt()

    for num_steps in (1, 2, 10):
        student.config.num_steps = num_steps
        sampled = student.predict_action_chunk(dict(batch), noise=noise)
        assert distance(sampled) < distance(backwards) / 4
        assert distance(noise) > distance(backwards) / 4  # and an untrained student would not pass
