"""Distributions of t, against the stock sampler and stock training; and training sees them."""

import pytest
import torch
from helpers import loss_of
from scipy import stats

from smolvla_reflow import Recipe, ReflowError, attach
from smolvla_reflow.times import KNOWN, TimeSampling


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_grid_is_what_the_sampler_visits(steps, make_policy, batch):
    """Against the times that the stock sampler hands to the velocity."""
    policy, visited = make_policy(num_steps=steps), []
    denoise_step = policy.model.denoise_step

    def note(x_t, timestep, **given):
        visited.append(timestep.flatten()[0].item())
        return denoise_step(x_t=x_t, timestep=timestep, **given)

    policy.model.denoise_step = note
    policy.predict_action_chunk(dict(batch))
    torch.manual_seed(0)
    times = TimeSampling(f"grid:{steps}").draw(1000 * steps, torch.device("cpu"), stock=None)
    values, counts = times.unique(return_counts=True)
    assert counts.sum() == 1000 * steps
    torch.testing.assert_close(values, torch.tensor(sorted(visited)), atol=1e-5, rtol=0)
    assert all(stats.binomtest(count, 1000 * steps, 1 / steps).pvalue > 1e-4 for count in counts.tolist())


def test_a_mixture_has_equal_shares():
    torch.manual_seed(0)
    times = TimeSampling("grid:1+beta+beta").draw(9000, torch.device("cpu"), lambda n, device: torch.zeros(n))
    assert stats.binomtest(int((times == 1).sum()), 9000, 1 / 3).pvalue > 1e-3


@pytest.mark.parametrize(
    "name", ["", "bete", "grid", "grid:0", "grid:-1", "grid:x", "beta+", "beta+nothing", "uniform"]
)
def test_unknown_names_list_the_known(name):
    with pytest.raises(ReflowError, match=r"time_sampling '.*' is unknown; known are: " + ", ".join(KNOWN)):
        TimeSampling(name)


@pytest.mark.parametrize(
    ("options", "times"), [({"recipe": Recipe(time_sampling="grid:2")}, {0.5, 1.0}), ({"strategy": "distill"}, {1.0})]
)
def test_training_sees_these_times(policy, teacher, batch, options, times, asked):
    attach(policy, teacher, **options)
    for _ in range(8):
        loss_of(policy, batch)
    assert {t for _, _, of_step in asked for t in of_step.tolist()} == times
