"""Recipes: recorded actions in a reflow batch, several couplings for each frame, weights."""

from dataclasses import replace

import lerobot
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
    plain,
    prefixes_encoded,
)
from oracle import Flow, by_frame, reflow_losses, repeated, squared_errors
from packaging.version import Version

from smolvla_reflow import Recipe, ReflowError, detach, register_loss_strategy
from smolvla_reflow.smolvla.sharing import vision_encoder
from smolvla_reflow.training.config import ReflowConfig

PER_FRAME = 3
D, K = CHUNK * WIDTH, 0.00054 * CHUNK * WIDTH  # of the pseudo-Huber loss


def test_the_command_and_a_recipe_have_one_set_of_defaults():
    assert Recipe() == ReflowConfig().recipe() == Recipe("grid:1+beta", 1, "t", 0.1, 0.0, 0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"real_data_ratio": x}, "real_data_ratio=.* is no share; give a number") for x in (-0.1, 1.1, float("nan"))),
        *(({"padding_weight": x}, "padding_weight=.* is no weight; give a number") for x in (-0.1, 1.1, float("nan"))),
        *(({"couplings_per_frame": x}, f"couplings_per_frame={x}: at least 1 is needed") for x in (0, -1)),
        ({"weighting": "hubr"}, "weighting 'hubr' is unknown; known are: none, t, huber. Did you mean 'huber'"),
    ],
)
def test_a_field_out_of_range_is_refused(fields, message):
    with pytest.raises(ReflowError, match=message):
        plain(**fields)


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 1), (0.5, 2)])
def test_recorded_samples_get_the_stock_loss(policy, teacher, batch, noise_and_time, ratio, count):
    """On one scale with the others. From LeRobot 0.5 on, their padded dimensions do not count (test_recorded_share.py)."""
    stock = losses_of(policy, batch, *noise_and_time)
    with attach_plain(policy, teacher, solver="midpoint"):
        reflow = losses_of(policy, batch, *noise_and_time)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=ratio), solver="midpoint")
    mixed = losses_of(policy, batch, *noise_and_time)
    counted = ACTION_DIM / WIDTH if Version(lerobot.__version__) >= Version("0.5.0") else 1.0
    scale = 4 / (count * counted + 4 - count)
    torch.testing.assert_close(mixed[:count], stock[:count] * counted * scale)
    torch.testing.assert_close(mixed[count:], reflow[count:] * scale)
    assert not torch.isclose(stock, reflow).any()
    loss, metrics = policy.forward(dict(batch), *noise_and_time)
    torch.testing.assert_close(loss, mixed.mean())
    assert metrics["loss"] == pytest.approx(mixed.mean().item())


@pytest.mark.parametrize("per_frame", [1, PER_FRAME])
@pytest.mark.parametrize(("strategy", "time_sampling"), [("reflow", "grid:1"), ("distill", "beta")])
def test_recorded_samples_draw_noise_of_their_own_and_smolvlas_times(
    policy, teacher, batch, asked, strategy, time_sampling, per_frame
):
    """In all of a frame's couplings."""
    recipe = plain(time_sampling=time_sampling, real_data_ratio=0.5, couplings_per_frame=per_frame)
    attach_plain(policy, teacher, recipe=recipe)
    policy.model.training_mode = strategy
    losses = losses_of(policy, batch)
    actions, noise, time = (torch.cat(calls) for calls in zip(*asked, strict=True))
    frames, count = repeated(batch, per_frame), 2 * per_frame
    recorded = policy.prepare_action(frames)
    assert torch.equal(actions[:count], recorded[:count])
    assert not torch.isclose(actions, recorded).all(dim=(1, 2))[count:].any()
    assert (time[:count] < 1).all()
    assert (time[count:] == 1).all()
    assert len(noise.flatten().unique()) == noise.numel()
    detach(policy)
    stock = by_frame(losses_of(policy, frames, noise, time))[:2]
    torch.testing.assert_close(losses[:2] / losses[:2].sum(), stock / stock.sum())


def test_a_fractional_share_holds_on_average():
    torch.manual_seed(0)
    recipe = plain(real_data_ratio=0.3)
    counts = [recipe.recorded_frames(4) for _ in range(2000)]
    assert set(counts) == {1, 2}
    assert sum(counts) / len(counts) == pytest.approx(1.2, abs=0.04)  # 4 standard errors


@pytest.mark.parametrize("train_state_proj", [False, True])
def test_a_frame_is_looked_at_once_for_all_of_its_couplings(policy, batch, train_state_proj):
    """The whole prefix is encoded once for both. If the student trains it, the teacher encodes it once, and each image
    is encoded once."""
    images = []
    vision_encoder(policy).encoder.register_forward_hook(lambda _, __, output: images.append(len(output[0])))
    attach_plain(policy, recipe=plain(couplings_per_frame=PER_FRAME), train_state_proj=train_state_proj)
    by_student, by_teacher = prefixes_encoded(policy.model), prefixes_encoded(policy.model.teacher.model)
    for step in (1, 2):
        loss_of(policy, batch).backward()
        assert images == [4] * step
        assert by_student == [4] * step * (PER_FRAME if train_state_proj else 1)
        assert by_teacher == [4] * step * train_state_proj


@pytest.mark.parametrize("per_frame", [1, PER_FRAME])
def test_a_frames_loss_is_the_mean_over_its_couplings(policy, teacher, batch, asked, registry, per_frame):
    """Each coupling has its own noise and time. The strategy shows both policies other images than the batch's."""
    found = []

    @register_loss_strategy("darkened")
    def darkened(step):
        observation = step.observation
        dark = replace(step, observation=observation._replace(images=[image - 0.5 for image in observation.images]))
        found.append(dark.coupling())
        return dark.losses(found[0])

    recipe = plain(time_sampling="beta", couplings_per_frame=per_frame)
    attach_plain(policy, teacher, strategy="darkened", recipe=recipe, solver="midpoint")
    losses = losses_of(policy, batch)
    name = "observation.images.top"
    dark = {**batch, name: batch[name] - 0.25}  # SmolVLA takes images from [0, 1] to [-1, 1]
    assert_close(found[0].actions, Flow(teacher, repeated(dark, per_frame)).midpoint(found[0].noise, 10))
    ((_, noise, time),) = asked
    assert_close(losses, by_frame(reflow_losses(policy, teacher, dark, noise, time)))
    assert len(time.unique()) == len(time) == 4 * per_frame
    assert len(noise.flatten().unique()) == noise.numel() == 4 * per_frame * CHUNK * WIDTH


@pytest.mark.parametrize("strategy", ["reflow", "distill"])
@pytest.mark.parametrize(
    ("weighting", "weighed"),
    [
        ("huber", lambda squares, time: 2 / D**0.5 * ((squares * D + K * K).sqrt() - K)),
        ("t", lambda squares, time: squares * time),
    ],
)
def test_the_gradient_is_that_of_the_weighed_loss(policy, teacher, batch, noise_and_time, strategy, weighting, weighed):
    """huber: the gradient of `2 / sqrt(d) (sqrt(S + k^2) - k)`, S of a chunk, k = 0.00054 d."""
    with attach_plain(policy, teacher, solver="midpoint"):
        squares = losses_of(policy, batch, *noise_and_time)
        expected = gradients(policy, weighed(squares, noise_and_time[1]).mean())
        unweighed = gradients(policy, loss_of(policy, batch, *noise_and_time))
    attach_plain(policy, teacher, solver="midpoint", strategy=strategy, recipe=plain(weighting=weighting))
    found = gradients(policy, loss_of(policy, batch, *noise_and_time))
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    one, other = (each["model.action_out_proj.weight"] for each in (found, unweighed))
    assert not torch.allclose(one / one.norm(), other / other.norm(), rtol=1e-2, atol=1e-3)


def test_huber_weighs_each_coupling_by_its_own_error(policy, teacher, batch, asked):
    """Several couplings of a frame are weighed one by one, before their mean is taken."""
    attach_plain(policy, teacher, recipe=plain(couplings_per_frame=PER_FRAME, weighting="huber"))
    losses, metrics = policy.train().forward(dict(batch), reduction="none")
    ((actions, noise, time),) = asked
    squares = squared_errors(policy, batch, actions, noise, time).mean(dim=(1, 2))
    assert_close(losses, by_frame(squares / (squares + K * K / D).sqrt()))
    assert metrics["velocity_mse_t9"] == pytest.approx(
        squares[time >= 0.9].mean().item(), rel=1e-3
    )  # monitored as it is


@pytest.mark.parametrize("weighting", ["none", "huber"])
def test_padded_dimensions_weigh_less(policy, teacher, batch, noise_and_time, weighting):
    """Before a line is weighed by its error. The batch has the robot's dimensions. A config may have the dimensions of
    the base that the policy was fine-tuned from."""
    feature = policy.config.output_features["action"]
    policy.config.output_features["action"] = replace(feature, shape=(ACTION_DIM - 1,))
    squares = reflow_losses(policy, teacher, batch, *noise_and_time)
    squares = torch.cat([squares[..., :ACTION_DIM], 0.25 * squares[..., ACTION_DIM:]], dim=-1).mean(dim=(1, 2))
    expected = squares if weighting == "none" else squares / (squares + K * K / D).sqrt()
    attach_plain(policy, teacher, recipe=plain(weighting=weighting, padding_weight=0.25), solver="midpoint")
    assert_close(losses_of(policy, batch, *noise_and_time), expected)
