"""A share of the couplings from scaled noise: the scales' distribution, in training, in pairs, and where it has none."""

import numpy as np
import pytest
import torch
from helpers import assert_close, attach_plain, loss_of, plain, reflow_run, reflow_train_main, refused
from oracle import Flow
from pairs_helpers import CHUNK, FRAMES, WIDTH, make_pairs, observed, pairs_flags
from scipy.stats import kstest

from smolvla_reflow import Recipe, ReflowError, attach
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.noise import ZEROS, pair_noise, pairs_noise, scaled
from smolvla_reflow.pairs.store import Pairs


def scales_of(noise: torch.Tensor, normal: torch.Tensor) -> np.ndarray:
    """The factor of each line on its own noise."""
    return ((noise * normal).sum(dim=(1, 2)) / normal.square().sum(dim=(1, 2))).numpy()


def assert_scaled(scales: np.ndarray, share: float) -> None:
    """As many at 0 and at 1 as there should be, the others uniform in between."""
    count, between = len(scales), scales[(scales > 0) & (scales < 1 - 1e-6)]
    for found, expected in (((scales == 0).mean(), share * ZEROS), (len(between) / count, share * (1 - ZEROS))):
        assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)
    if len(between):
        assert kstest(between, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_half_of_the_share_is_zero_and_half_is_uniform(share):
    noise = torch.randn(20_000, 2, 2, generator=torch.Generator().manual_seed(0))
    found = scaled(noise, share, torch.rand(20_000, generator=torch.Generator().manual_seed(1)))
    scales = scales_of(found, noise)
    assert_close(found, torch.tensor(scales)[:, None, None] * noise)
    assert_scaled(scales, share)


def test_without_a_share_noise_and_random_numbers_stay(policy, teacher, batch, asked):
    """The stream of random numbers too: the same seed trains as before."""
    noise = torch.randn(3, 2, 2)
    assert scaled(noise, 0.0, torch.rand(3)) is noise
    drawn = []
    with attach_plain(policy, teacher, recipe=plain(scaled_noise=0.0)):
        torch.manual_seed(0)
        loss_of(policy, batch)
        drawn.append(torch.rand(1))
    torch.manual_seed(0)
    expected = policy.model.sample_noise(asked[0][1].shape, torch.device("cpu"))
    assert torch.equal(asked[0][1], expected)


def test_couplings_are_the_teachers_of_the_scaled_noise(policy, teacher, batch, asked):
    with attach_plain(policy, teacher, solver="euler", recipe=plain(scaled_noise=0.8, couplings_per_frame=25)):
        torch.manual_seed(0)
        loss_of(policy, batch)
    (actions, noise, _), *_ = asked
    torch.manual_seed(0)
    normal = policy.model.sample_noise(noise.shape, torch.device("cpu"))
    scales = scales_of(noise, normal)
    assert_close(noise, torch.tensor(scales)[:, None, None] * normal)
    assert_scaled(scales, 0.8)
    with torch.no_grad():
        flow = Flow(teacher, {name: value.repeat_interleave(25, dim=0) for name, value in batch.items()})
        assert_close(actions, flow.euler(noise, teacher.config.num_steps))


def test_noise_that_the_caller_fixed_stays(policy, teacher, batch, noise_and_time, asked):
    with attach_plain(policy, teacher, recipe=plain(scaled_noise=1.0)):
        loss_of(policy, batch, *noise_and_time)
        assert torch.equal(asked[0][1], noise_and_time[0])


def test_the_import_api_draws_as_the_stock_sampler(policy, teacher, batch):
    """`generate_reflow_target` couples what inference would start from."""
    with attach_plain(policy, teacher, recipe=plain(scaled_noise=1.0)):
        images, masks = policy.prepare_images(batch)
        language = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
        torch.manual_seed(0)
        found = policy.model.generate_reflow_target(images, masks, *language, policy.prepare_state(batch)).noise
        torch.manual_seed(0)
        assert torch.equal(found, policy.model.sample_noise(found.shape, torch.device("cpu")))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range(share):
    with pytest.raises(ReflowError, match=f"scaled_noise={share} is no share; give a number from 0 to 1"):
        Recipe(scaled_noise=share)


@pytest.fixture(scope="module")
def scaled_pairs(workshop, tmp_path_factory):
    return make_pairs(workshop, tmp_path_factory.mktemp("scaled") / "pairs", scaled_noise=0.6, dtype="float32")


def test_pairs_are_scaled_by_seed_frame_and_pair(workshop, scaled_pairs):
    """Each pair's noise is a scale of what it is without a share, and its actions are the teacher's of that noise."""
    pairs = Pairs(scaled_pairs)
    wanted = [(frame, pair) for frame in range(FRAMES) for pair in range(3)]
    found = [pairs.lookup(frame, pair) for frame, pair in wanted]
    noise, actions = (torch.stack([getattr(each, name) for each in found]) for name in ("noise", "actions"))
    normal = torch.stack([pair_noise(0, frame, pair, (CHUNK, WIDTH)) for frame, pair in wanted])
    scales = scales_of(noise, normal)
    assert_scaled(scales, 0.6)
    teacher, batch = observed(workshop, frames=range(FRAMES))
    with torch.no_grad():
        flow = Flow(
            teacher, {k: v.repeat_interleave(3, dim=0) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        )
        assert_close(actions, flow.euler(noise, 10), atol=1e-4)
    # In another order, and alone, a pair's scale is the same.
    assert torch.equal(pairs_noise(0, wanted[::-1], (CHUNK, WIDTH), 0.6).flip(0), noise)


def test_many_scales_of_pairs():
    wanted = [(frame, pair) for frame in range(500) for pair in range(4)]
    noise, normal = (pairs_noise(3, wanted, (2, 2), share) for share in (0.25, 0.0))
    assert_scaled(scales_of(noise, normal), 0.25)


def test_training_reads_the_pairs_own_noise(workshop, scaled_pairs, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", steps=2)
    reflow_train_main([*flags, f"--reflow.pairs_path={scaled_pairs}"])
    said = refused(
        capsys,
        reflow_train_main,
        [
            *flags[:-1],
            f"--output_dir={tmp_path / 'other'}",
            f"--reflow.pairs_path={scaled_pairs}",
            "--reflow.scaled_noise=0.3",
        ],
    )
    assert "scaled_noise is 0.6 in the pairs and 0.3 here" in said


def test_pairs_of_another_share_are_another_set(workshop, scaled_pairs, capsys):
    flags = pairs_flags(workshop, scaled_pairs, scaled_noise=0.2, dtype="float32")
    assert "scaled_noise is 0.6 in the pairs and 0.2 here" in refused(capsys, pairs_command.main, flags)


@pytest.mark.parametrize("value", [-1, 2])
def test_pairs_refuse_a_share_out_of_range(workshop, tmp_path, capsys, value):
    flags = pairs_flags(workshop, tmp_path / "pairs", scaled_noise=value)
    assert f"--scaled_noise={value}" in refused(capsys, pairs_command.main, flags)
    assert not (tmp_path / "pairs").exists()


def test_it_is_refused_where_nothing_is_coupled(workshop, tmp_path, capsys, policy):
    flags = [*reflow_run(workshop, tmp_path / "run"), "--reflow.strategy=standard", "--reflow.scaled_noise=0.3"]
    assert "--reflow.scaled_noise=0.3 has no effect with --reflow.strategy=standard" in refused(
        capsys, reflow_train_main, flags
    )
    with pytest.raises(ReflowError, match="scaled_noise"):
        attach(policy, strategy="standard", recipe=Recipe(scaled_noise=0.3))
