"""Recipes: recorded actions in a reflow batch, which get stock LeRobot's loss, and several couplings for each frame."""

from dataclasses import replace

import lerobot
import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, attach_plain, plain
from oracle import Flow, reflow_losses
from packaging.version import Version

from smolvla_reflow import ReflowError, Solver, detach, register_loss_strategy
from smolvla_reflow.smolvla.vision import vision_encoder


def per_sample(policy, batch, noise, time):
    return policy.train().forward(dict(batch), noise=noise, time=time, reduction="none")[0]


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 1), (0.5, 2)])
def test_recorded_samples_get_the_stock_loss(policy, teacher, batch, noise_and_time, ratio, count):
    """On one scale with the others: from LeRobot 0.5 on, their padded dimensions do not count (test_recorded_share.py)."""
    noise, time = noise_and_time
    stock = per_sample(policy, batch, noise, time)
    with attach_plain(policy, teacher, solver="midpoint"):
        reflow = per_sample(policy, batch, noise, time)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=ratio), solver="midpoint")
    mixed = per_sample(policy, batch, noise, time)
    counted = ACTION_DIM / WIDTH if Version(lerobot.__version__) >= Version("0.5.0") else 1.0
    scale = 4 / (count * counted + 4 - count)
    torch.testing.assert_close(mixed[:count], stock[:count] * counted * scale)
    torch.testing.assert_close(mixed[count:], reflow[count:] * scale)
    assert not torch.isclose(stock, reflow).any()
    loss, metrics = policy.forward(dict(batch), noise=noise, time=time)
    torch.testing.assert_close(loss, mixed.mean())
    assert metrics["loss"] == pytest.approx(mixed.mean().item())


@pytest.mark.parametrize(("strategy", "time_sampling"), [("reflow", "grid:1"), ("distill", "beta")])
def test_recorded_samples_draw_noise_of_their_own_and_smolvlas_times(
    policy, teacher, batch, asked, strategy, time_sampling
):
    attach_plain(policy, teacher, recipe=plain(time_sampling=time_sampling, real_data_ratio=0.5))
    policy.model.training_mode = strategy
    policy.train().forward(dict(batch))
    actions, noise, time = (torch.cat(calls) for calls in zip(*asked, strict=True))
    recorded = policy.prepare_action(batch)
    assert torch.equal(actions[:2], recorded[:2])
    assert not torch.isclose(actions[2:], recorded[2:]).all(dim=(1, 2)).any()
    assert (time[:2] < 1).all()
    assert (time[2:] == 1).all()
    assert len(noise.flatten().unique()) == noise.numel()


def test_a_fractional_share_holds_on_average():
    torch.manual_seed(0)
    recipe = plain(real_data_ratio=0.3)
    counts = [recipe.recorded_frames(4) for _ in range(2000)]
    assert set(counts) == {1, 2}
    assert sum(counts) / len(counts) == pytest.approx(1.2, abs=0.04)  # 4 standard errors


def test_validation_and_other_strategies_are_left_alone(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    stock, _ = policy.eval().forward(dict(batch), noise=noise, time=time)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5))
    policy.model.training_mode = "standard"
    assert torch.equal(policy.eval().forward(dict(batch), noise=noise, time=time)[0], stock)
    assert torch.equal(policy.train().forward(dict(batch), noise=noise, time=time)[0], stock)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(ratio):
    with pytest.raises(ReflowError, match=r"real_data_ratio=.* is no share; give a number from 0 to 1"):
        plain(real_data_ratio=ratio)


# --- several couplings for each frame ---------------------------------------------------------------------------

PER_FRAME = 3


def repeated(batch):
    return {name: value.repeat_interleave(PER_FRAME, dim=0) for name, value in batch.items()}


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_frames_loss_is_the_mean_over_its_couplings(policy, teacher, batch, asked, solver):
    """Against the loss of a batch in which each frame stands three times, with the same noise and times."""
    recipe = plain(time_sampling="beta", couplings_per_frame=PER_FRAME)
    attach_plain(policy, teacher, solver=Solver(solver, num_steps=5), recipe=recipe)
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    losses.mean().backward()
    gradient = policy.model.action_out_proj.weight.grad.clone()
    ((actions, noise, time),) = asked
    assert noise.shape == (4 * PER_FRAME, 5, 6)
    assert len(time.unique()) == len(time) == 4 * PER_FRAME
    assert len(noise.flatten().unique()) == noise.numel()

    policy.zero_grad()
    detach(policy)
    attach_plain(policy, teacher, solver=Solver(solver, num_steps=5))
    expected, _ = policy.train().forward(repeated(batch), noise=noise, time=time, reduction="none")
    expected.mean().backward()
    torch.testing.assert_close(actions, asked[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, expected.unflatten(0, (4, PER_FRAME)).mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, policy.model.action_out_proj.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_state_proj", [False, True])
def test_a_frame_is_looked_at_once_for_all_of_its_couplings(policy, batch, train_state_proj):
    """The whole prefix is encoded once for both; if the student trains it, by the teacher once, and each image once."""
    counts, prefixes = [], {"student": [], "teacher": []}
    vision_encoder(policy).encoder.register_forward_hook(lambda _, __, output: counts.append(len(output[0])))
    attach_plain(policy, recipe=plain(couplings_per_frame=PER_FRAME), train_state_proj=train_state_proj)
    for name, model in (("student", policy.model), ("teacher", policy.model.teacher.model)):
        embed = model.embed_prefix
        vars(model)["embed_prefix"] = lambda images, *a, embed=embed, name=name, **k: (
            prefixes[name].append(len(images[0])) or embed(images, *a, **k)
        )
    for step in (1, 2):
        policy.train().forward(dict(batch))[0].backward()
        assert counts == [4] * step
        if train_state_proj:
            assert prefixes == {"student": [4] * PER_FRAME * step, "teacher": [4] * step}
        else:
            assert prefixes == {"student": [4] * step, "teacher": []}


def test_recorded_frames_are_recorded_in_all_of_their_couplings(policy, teacher, batch, asked):
    attach_plain(policy, teacher, recipe=plain(couplings_per_frame=PER_FRAME, real_data_ratio=0.5))
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    actions, noise, time = (torch.cat(calls) for calls in zip(*asked, strict=True))
    recorded = policy.prepare_action(repeated(batch))
    assert torch.equal(actions[: 2 * PER_FRAME], recorded[: 2 * PER_FRAME])
    assert not torch.isclose(actions, recorded).all(dim=(1, 2))[2 * PER_FRAME :].any()
    detach(policy)
    stock = per_sample(policy, repeated(batch), noise, time).unflatten(0, (4, PER_FRAME)).mean(dim=1)[:2]
    torch.testing.assert_close(losses[:2] / losses[:2].sum(), stock / stock.sum())


def test_a_noise_that_is_given_is_the_only_one(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    losses = []
    for recipe in (plain(), plain(couplings_per_frame=PER_FRAME)):
        with attach_plain(policy, teacher, recipe=recipe, solver="midpoint"):
            losses.append(per_sample(policy, batch, noise, time))
    assert torch.equal(*losses)


def test_a_strategy_need_not_know_of_it(policy, teacher, batch, asked, registry):
    """A strategy of another package gets three lines for each frame without asking for them."""

    @register_loss_strategy("late")
    def late(step):
        coupling = step.coupling()
        assert len(coupling.noise) == len(coupling.actions) == PER_FRAME * len(step.actions)
        return step.losses(coupling, times=torch.full((len(coupling.noise),), 0.9))

    attach_plain(policy, teacher, strategy="late", recipe=plain(couplings_per_frame=PER_FRAME), solver="midpoint")
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    ((_, noise, time),) = asked
    assert (time == 0.9).all()
    detach(policy)
    expected = reflow_losses(policy, teacher, repeated(batch), noise, time, 10).mean(dim=(1, 2))
    torch.testing.assert_close(losses, expected.unflatten(0, (4, PER_FRAME)).mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_frame", [1, PER_FRAME])
def test_the_teacher_is_shown_what_a_strategy_shows_it(policy, teacher, batch, asked, registry, per_frame):
    """Here other images than the student's."""
    found = []

    @register_loss_strategy("darkened")
    def darkened(step):
        observation = step.observation
        dark = replace(step, observation=observation._replace(images=[image - 0.5 for image in observation.images]))
        found.append(dark.coupling())
        return dark.losses(found[0])

    attach_plain(policy, teacher, strategy="darkened", recipe=plain(couplings_per_frame=per_frame), solver="midpoint")
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    name = "observation.images.top"
    dark = {n: v.repeat_interleave(per_frame, dim=0) for n, v in {**batch, name: batch[name] - 0.25}.items()}
    with torch.no_grad():  # SmolVLA takes images from [0, 1] to [-1, 1]
        expected = Flow(teacher, dark).midpoint(found[0].noise, 10)
    torch.testing.assert_close(found[0].actions, expected, rtol=1e-4, atol=1e-5)
    ((_, noise, time),) = asked
    of_student = reflow_losses(policy, teacher, dark, noise, time, 10).mean(dim=(1, 2))
    torch.testing.assert_close(losses, of_student.unflatten(0, (4, per_frame)).mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, -1])
def test_at_least_one_coupling(count):
    with pytest.raises(ReflowError, match=f"couplings_per_frame={count}: at least 1 is needed"):
        plain(couplings_per_frame=count)


# --- weighing ---------------------------------------------------------------------------------------------------


def gradient_of(loss, policy):
    policy.zero_grad()
    loss.backward()
    return policy.model.action_out_proj.weight.grad.clone()


@pytest.mark.parametrize("strategy", ["reflow", "distill"])
def test_huber_is_the_pseudo_huber_of_whole_chunks(policy, teacher, batch, noise_and_time, strategy):
    """Its gradient is that of `2 / sqrt(d) (sqrt(S + k^2) - k)`, S of a chunk, k = 0.00054 d, written out here."""
    noise, time = noise_and_time
    with attach_plain(policy, teacher, solver="midpoint"):
        squares, _ = policy.train().forward(dict(batch), noise=noise, time=time, reduction="none")
        d = CHUNK * WIDTH
        k = 0.00054 * d
        expected = gradient_of((2 / d**0.5 * ((squares * d + k * k).sqrt() - k)).mean(), policy)
        unweighed = gradient_of(policy.forward(dict(batch), noise=noise, time=time)[0], policy)
    attach_plain(policy, teacher, solver="midpoint", strategy=strategy, recipe=plain(weighting="huber"))
    found = gradient_of(policy.forward(dict(batch), noise=noise, time=time)[0], policy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found / found.norm(), unweighed / unweighed.norm(), rtol=1e-2, atol=1e-3)


def test_huber_weighs_each_coupling_by_its_own_error(policy, teacher, batch, asked):
    """Several couplings of a frame are weighed one by one, before their mean is taken."""
    attach_plain(policy, teacher, recipe=plain(couplings_per_frame=PER_FRAME, weighting="huber"))
    losses, metrics = policy.train().forward(dict(batch), reduction="none")
    ((actions, noise, time),) = asked
    detach(policy)
    squares = per_sample_of_lines(policy, repeated(batch), actions, noise, time)
    weighed = squares / (squares + 0.00054**2 * CHUNK * WIDTH).sqrt()
    torch.testing.assert_close(losses, weighed.unflatten(0, (4, PER_FRAME)).mean(dim=1), rtol=1e-4, atol=1e-5)
    assert metrics["loss_t9"] == pytest.approx(squares[time >= 0.9].mean().item(), rel=1e-3)  # monitored as it is


def per_sample_of_lines(policy, batch, actions, noise, time):
    """Mean squared error of the velocity on these lines, by the stock forward at full width."""
    images, img_masks = policy.prepare_images(batch)
    language = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    state = policy.prepare_state(batch)
    return policy.model.forward(images, img_masks, *language, state, actions, noise, time).mean(dim=(1, 2))


@pytest.mark.parametrize("strategy", ["reflow", "distill"])
def test_weighed_by_time(policy, teacher, batch, noise_and_time, strategy):
    """Each squared error counts t fold, so that the gradient is that of errors sqrt(t) times as large."""
    noise, time = noise_and_time
    with attach_plain(policy, teacher, solver="midpoint"):
        squares, _ = policy.train().forward(dict(batch), noise=noise, time=time, reduction="none")
        expected = gradient_of((squares * time).mean(), policy)
    attach_plain(policy, teacher, solver="midpoint", strategy=strategy, recipe=plain(weighting="t"))
    found = gradient_of(policy.forward(dict(batch), noise=noise, time=time)[0], policy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_recorded_actions_are_not_weighed(policy, teacher, batch, noise_and_time):
    """Half of the batch is recorded: beside those, the couplings' losses are what `huber` makes of them."""
    noise, time = noise_and_time
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5), solver="midpoint")
    unweighed = per_sample(policy, batch, noise, time)
    detach(policy)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5, weighting="huber"), solver="midpoint")
    weighed = per_sample(policy, batch, noise, time)
    torch.testing.assert_close(weighed[:2], unweighed[:2])
    assert not torch.isclose(weighed[2:], unweighed[2:]).any()


@pytest.mark.parametrize("weighting", ["none", "huber"])
def test_padded_dimensions_weigh_less(policy, teacher, batch, noise_and_time, weighting):
    """Before a line is weighed by its error."""
    noise, time = noise_and_time
    with attach_plain(policy, teacher, solver="midpoint"):
        squares = reflow_losses(policy, teacher, batch, noise, time, 10)
    squares = torch.cat([squares[..., :ACTION_DIM], 0.25 * squares[..., ACTION_DIM:]], dim=-1).mean(dim=(1, 2))
    expected = squares if weighting == "none" else squares / (squares + 0.00054**2 * CHUNK * WIDTH).sqrt()
    attach_plain(policy, teacher, recipe=plain(weighting=weighting, padding_weight=0.25), solver="midpoint")
    torch.testing.assert_close(per_sample(policy, batch, noise, time), expected, rtol=1e-4, atol=1e-5)


def test_the_robots_dimensions_are_those_of_the_batch(policy, teacher, batch, noise_and_time):
    """A config may say those of the base that the policy was fine-tuned from."""
    noise, time = noise_and_time
    recipe = plain(padding_weight=0.25)
    with attach_plain(policy, teacher, recipe=recipe, solver="midpoint"):
        expected = per_sample(policy, batch, noise, time)
    feature = policy.config.output_features["action"]
    policy.config.output_features["action"] = replace(feature, shape=(ACTION_DIM - 1,))
    attach_plain(policy, teacher, recipe=recipe, solver="midpoint")
    assert torch.equal(per_sample(policy, batch, noise, time), expected)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_padding_weighs_from_0_to_1(weight):
    with pytest.raises(ReflowError, match=r"padding_weight=.* is no weight; give a number from 0 to 1"):
        plain(padding_weight=weight)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(
        ReflowError, match=r"weighting 'hubr' is unknown; known are: none, t, huber. Did you mean 'huber'"
    ):
        plain(weighting="hubr")
