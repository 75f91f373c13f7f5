"""The reflow loss: its value, its gradient, its direction of time, and what it is averaged over."""

import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, attach_plain, make_batch, plain
from oracle import Flow, reflow_losses

from smolvla_reflow import Coupling, Solver

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=[False, True], ids=["one prefix", "own prefix"])
def own_prefix(request):
    return request.param


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("solver", ["midpoint", "euler"])
def test_loss_and_gradient_equal_an_independent_derivation(policy, teacher, batch, noise_and_time, solver, num_steps):
    noise, time = noise_and_time
    attach_plain(policy, teacher, solver=Solver(solver, num_steps=num_steps))
    policy.train()

    loss, metrics = policy.forward(dict(batch), noise=noise, time=time)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    expected = reflow_losses(policy, teacher, batch, noise, time, num_steps, solver).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert len(gradients) > 10
    assert gradients.keys() == {name for name, p in policy.named_parameters() if p.grad is not None}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, **TOLERANCE)


def test_reduction_none_gives_one_loss_per_sample(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    attach_plain(policy, teacher, solver="midpoint")
    policy.train()
    losses, _ = policy.forward(dict(batch), noise=noise, time=time, reduction="none")
    expected = reflow_losses(policy, teacher, batch, noise, time, 10).mean(dim=(1, 2))
    torch.testing.assert_close(losses, expected, **TOLERANCE)


def test_whole_chunk_counts_on_every_lerobot(policy, teacher, batch, noise_and_time):
    """LeRobot 0.6 drops padded steps and dimensions of recorded actions; a teacher's actions exist there too."""
    noise, time = noise_and_time
    attach_plain(policy, teacher, solver="midpoint")
    policy.train()
    padded, _ = policy.forward(dict(batch), noise=noise, time=time)
    unpadded, _ = policy.forward({**batch, "action_is_pad": torch.zeros(4, CHUNK, dtype=torch.bool)}, noise, time)
    assert padded == unpadded

    losses = reflow_losses(policy, teacher, batch, noise, time, 10)
    assert abs(losses.mean() - losses[:, :, :ACTION_DIM].mean()) > 1e-3  # the fault would show


def test_observations_are_prepared_once_for_both(policy, teacher, batch, monkeypatch):
    """Student and teacher see the same tensors, not equal ones prepared twice; which one encoding serves, if it can."""
    attachment = attach_plain(policy, teacher, solver="euler")
    prepared, seen = [], []
    prepare = policy.prepare_images
    monkeypatch.setitem(vars(policy), "prepare_images", lambda b: prepared.append(prepare(b)) or prepared[-1])
    for model in (policy.model, policy.model.teacher.model):
        embed = model.embed_prefix
        monkeypatch.setitem(
            vars(model),
            "embed_prefix",
            lambda *o, state, embed=embed: seen.append((*o, state)) or embed(*o, state=state),
        )
    policy.train().forward(dict(batch))
    assert len(prepared) == 1
    assert all(one[0][0] is prepared[0][0][0] for one in seen)
    if attachment.sharing.why_not_shared is None:
        assert len(seen) == 1
    else:
        by_teacher, by_student = seen
        assert all(a is b for a, b in zip(by_teacher, by_student, strict=True))


def test_recorded_actions_have_no_influence(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    attach_plain(policy, teacher, solver="midpoint")
    policy.train()
    loss, _ = policy.forward(dict(batch), noise=noise, time=time)
    other, _ = policy.forward({**batch, "action": batch["action"] + 100.0}, noise=noise, time=time)
    assert loss == other


@pytest.mark.parametrize("strategy", ["standard", "reflow"])
def test_eval_mode_is_the_stock_loss(policy, teacher, batch, noise_and_time, strategy):
    noise, time = noise_and_time
    stock_train, _ = policy.train().forward(dict(batch), noise=noise, time=time)
    stock, stock_metrics = policy.eval().forward(dict(batch), noise=noise, time=time)
    attach_plain(policy, teacher, strategy=strategy)
    loss, metrics = policy.forward(dict(batch), noise=noise, time=time)
    assert torch.equal(loss, stock)
    assert metrics == stock_metrics
    if strategy == "standard":
        assert torch.equal(policy.train().forward(dict(batch), noise=noise, time=time)[0], stock_train)


def test_coupling_is_the_teachers_stock_sampler_at_full_width(policy, teacher, batch):
    """Noise drawn, and actions used, at max_action_dim: neither cut to the robot's width nor zero-padded."""
    attach_plain(policy, teacher, solver="euler")
    observation = (
        *policy.prepare_images(batch),
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
    )
    torch.manual_seed(5)
    coupling = policy.model.generate_reflow_target(*observation)
    assert isinstance(coupling, Coupling)
    assert coupling.noise.shape == coupling.actions.shape == (4, CHUNK, WIDTH)
    assert coupling.noise[..., ACTION_DIM:].std() > 0.5
    assert coupling.actions[..., ACTION_DIM:].abs().min() > 0
    assert not coupling.actions.requires_grad

    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(coupling.actions, teacher.model.sample_actions(*observation))
        torch.testing.assert_close(coupling.actions, Flow(teacher, batch).euler(coupling.noise, 10), **TOLERANCE)


def test_student_draws_noise_and_time_as_stock_training_does(policy, teacher, batch):
    """Same seed: the loss is the oracle's on the noise and time stock training would have drawn."""
    torch.manual_seed(7)
    noise = policy.model.sample_noise((4, CHUNK, WIDTH), "cpu")
    time = policy.model.sample_time(4, "cpu")
    attach_plain(policy, teacher, recipe=plain(time_sampling="beta"), solver="midpoint")
    policy.train()
    torch.manual_seed(7)
    loss, _ = policy.forward(dict(batch))
    torch.testing.assert_close(loss, reflow_losses(policy, teacher, batch, noise, time, 10).mean(), **TOLERANCE)


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
    student.train()
    torch.manual_seed(0)
    for _ in range(150):
        loss, _ = student.forward(dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    noise = torch.randn(16, CHUNK, WIDTH)
    known = scale * noise + shift
    backwards = noise + (noise - known)  # where a student of the literature's time direction ends

    def distance(actions):
        return (actions - known)[..., :ACTION_DIM].square().mean().sqrt()

    for num_steps in (1, 2, 10):
        student.config.num_steps = num_steps
        sampled = student.predict_action_chunk(dict(batch), noise=noise)
        assert distance(torch.nn.functional.pad(sampled, (0, WIDTH - ACTION_DIM))) < distance(backwards) / 4
        assert distance(noise) > distance(backwards) / 4  # and an untrained student would not pass
