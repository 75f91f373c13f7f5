"""Recorded actions in a reflow batch: their samples get stock LeRobot's loss, the others the reflow loss."""

import pytest
import torch

from smolvla_reflow import Recipe, ReflowError, attach


def per_sample(policy, batch, noise, time):
    return policy.train().forward(dict(batch), noise=noise, time=time, reduction="none")[0]


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 1), (0.5, 2), (1.0, 4)])
@pytest.mark.parametrize("loss", ["mse", "pseudo_huber"])
def test_recorded_samples_get_the_stock_loss(policy, teacher, batch, noise_and_time, ratio, count, loss):
    """The batch has padded steps and dimensions, which LeRobot's versions treat differently: theirs holds."""
    noise, time = noise_and_time
    stock = per_sample(policy, batch, noise, time)
    with attach(policy, teacher, recipe=Recipe(loss=loss)):
        reflow = per_sample(policy, batch, noise, time)
    attach(policy, teacher, recipe=Recipe(loss=loss, real_data_ratio=ratio))
    mixed = per_sample(policy, batch, noise, time)
    torch.testing.assert_close(mixed[:count], stock[:count])
    torch.testing.assert_close(mixed[count:], reflow[count:])
    assert not torch.isclose(stock, reflow).any()
    loss, metrics = policy.forward(dict(batch), noise=noise, time=time)
    torch.testing.assert_close(loss, mixed.mean())
    assert metrics["loss"] == pytest.approx(mixed.mean().item())


@pytest.mark.parametrize(("strategy", "time_sampling"), [("reflow", "grid:1"), ("distill", "beta")])
def test_recorded_samples_draw_noise_of_their_own_and_smolvlas_times(policy, teacher, batch, strategy, time_sampling):
    attach(policy, teacher, strategy=strategy, recipe=Recipe(time_sampling=time_sampling, real_data_ratio=0.5))
    seen, forward_standard = [], policy.model.forward_standard

    def note(*args):
        seen.append(args[-3:])
        return forward_standard(*args)

    policy.model.forward_standard = note
    policy.train().forward(dict(batch))
    ((actions, noise, time),) = seen
    recorded = policy.prepare_action(batch)
    assert torch.equal(actions[:2], recorded[:2])
    assert not torch.isclose(actions[2:], recorded[2:]).all(dim=(1, 2)).any()
    assert (time[:2] < 1).all()
    assert (time[2:] == 1).all()
    assert len(noise.flatten().unique()) == noise.numel()


def test_a_fractional_share_holds_on_average():
    torch.manual_seed(0)
    recipe = Recipe(real_data_ratio=0.3)
    counts = [recipe.recorded(4, torch.device("cpu")).sum().item() for _ in range(2000)]
    assert set(counts) == {1, 2}
    assert sum(counts) / len(counts) == pytest.approx(1.2, abs=0.04)  # 4 standard errors


def test_validation_and_other_strategies_are_left_alone(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    stock, _ = policy.eval().forward(dict(batch), noise=noise, time=time)
    attach(policy, teacher, strategy="standard", recipe=Recipe(real_data_ratio=0.5))
    assert torch.equal(policy.eval().forward(dict(batch), noise=noise, time=time)[0], stock)
    assert torch.equal(policy.train().forward(dict(batch), noise=noise, time=time)[0], stock)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(ratio):
    with pytest.raises(ReflowError, match=r"real_data_ratio=.* is no share; give a number from 0 to 1"):
        Recipe(real_data_ratio=ratio)
