"""Recorded actions in a reflow batch: every entry that counts weighs the same, by d loss / d losses."""

import lerobot
import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, attach_plain, make_batch, plain
from packaging.version import Version

from smolvla_reflow import Recipe, Step, attach, register_loss_strategy

BATCH = 8
LEAVES_OUT_PADDING = Version(lerobot.__version__) >= Version("0.5.0")  # LeRobot's loss on recorded actions


@pytest.fixture(params=[False, True], ids=["one prefix", "own prefix"])
def own_prefix(request):
    return request.param


@pytest.fixture
def batch():
    """Padded steps in every second frame, so that they are among the recorded rows and among the others."""
    made = make_batch(BATCH)
    made["action_is_pad"] = torch.zeros(BATCH, CHUNK, dtype=torch.bool)
    made["action_is_pad"][::2, -2:] = True
    return made


def weights(policy, batch, reduction="mean", of=None):
    """The loss of a training step, its gradient to the student's squared errors, and these; recorded rows first."""
    leaves, squared_errors = [], Step.squared_errors

    def leaf(*asked):
        leaves.append(squared_errors(*asked).detach().requires_grad_())
        return leaves[-1]

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "squared_errors", leaf)
        loss, metrics = policy.train().forward(dict(batch), reduction=reduction)
    (loss.sum() if of is None else loss[of]).backward()
    return loss.detach(), torch.cat([leaf.grad for leaf in leaves]), torch.cat(leaves).detach(), metrics


def counted(batch, recorded):
    """Entries that count, (BATCH, CHUNK, WIDTH): all of a coupling's, and what is real of the first `recorded` rows."""
    counts = torch.ones(BATCH, CHUNK, WIDTH)
    if LEAVES_OUT_PADDING:
        counts[:recorded] *= ~batch["action_is_pad"][:recorded, :, None]
        counts[:recorded, :, ACTION_DIM:] = 0
    return counts


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.875])
def test_every_entry_that_counts_weighs_the_same(policy, teacher, batch, ratio):
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=ratio))
    loss, gradient, losses, metrics = weights(policy, batch)
    counts = counted(batch, int(ratio * BATCH))
    torch.testing.assert_close(gradient, counts / counts.sum())
    torch.testing.assert_close(loss, (counts * losses).sum() / counts.sum())
    assert metrics["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("frame", [0, 1, BATCH - 2, BATCH - 1])
def test_so_does_it_in_one_loss_per_frame(policy, teacher, batch, frame):
    """Padded or not, on recorded actions or not."""
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.25))
    by_frame, gradient, losses, _ = weights(policy, batch, "none", of=frame)
    counts = counted(batch, 2)
    expected = torch.zeros(BATCH, CHUNK, WIDTH)
    expected[frame] = counts[frame] * BATCH / counts.sum()
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(by_frame, (counts * losses).sum(dim=(1, 2)) * BATCH / counts.sum())
    torch.testing.assert_close(by_frame.mean(), (counts * losses).sum() / counts.sum())


def test_the_recorded_share_of_the_gradient_is_the_ratio(policy, teacher, batch):
    """On the robot's own dimensions, without padded steps: what the user asked for, on any LeRobot."""
    batch["action_is_pad"][:] = False
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.25))
    _, gradient, _, _ = weights(policy, batch)
    own = gradient[..., :ACTION_DIM].sum(dim=(1, 2))
    torch.testing.assert_close(own[:2].sum() / own.sum(), torch.tensor(0.25))


@pytest.mark.parametrize("padding_weight", [1.0, 0.1])
@pytest.mark.parametrize("weighting", ["t", "huber"])
def test_weights_leave_the_share_as_it_is(policy, teacher, batch, weighting, padding_weight):
    """On the robot's own dimensions, and on the padded ones where LeRobot counts those of recorded actions."""
    batch["action_is_pad"][:] = False
    recipe = Recipe(weighting=weighting, padding_weight=padding_weight, real_data_ratio=0.25, couplings_per_frame=3)
    attach(policy, teacher, recipe=recipe)
    _, gradient, _, _ = weights(policy, batch)
    by_row = gradient.unflatten(0, (BATCH, 3))
    own = by_row[..., :ACTION_DIM].sum(dim=(1, 2, 3))
    torch.testing.assert_close(own[:2].sum() / own.sum(), torch.tensor(0.25))
    assert len(own[2:].unique()) > 1  # they are weighed
    padded = by_row[..., ACTION_DIM:].sum(dim=(1, 2, 3))
    share = 0.0 if LEAVES_OUT_PADDING else 0.25
    torch.testing.assert_close(padded[:2].sum() / padded.sum(), torch.tensor(share))


@pytest.mark.parametrize("ratio", [0.0, 0.001])
def test_a_batch_of_couplings_alone_is_the_plain_mean(policy, teacher, batch, ratio):
    """Also where a fraction of a frame is rounded down to none."""
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=ratio))
    loss, gradient, losses, _ = weights(policy, batch)
    assert torch.equal(loss, losses.mean())
    torch.testing.assert_close(gradient, torch.full_like(losses, 1 / losses.numel()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "settings", [{"recipe": plain(real_data_ratio=1.0)}, {"strategy": "standard"}], ids=["ratio 1", "standard"]
)
def test_recorded_actions_alone_are_lerobots_own_loss(policy, teacher, batch, settings, reduction):
    """With its metrics: against stock LeRobot on the same noise and times. Standard training is that, bitwise."""
    noise, time = torch.randn(BATCH, CHUNK, WIDTH), torch.rand(BATCH)
    stock, stock_metrics = policy.train().forward(dict(batch), noise=noise, time=time, reduction=reduction)
    attach_plain(policy, teacher, **settings)
    loss, metrics = policy.train().forward(dict(batch), noise=noise, time=time, reduction=reduction)
    if "strategy" in settings:
        assert torch.equal(loss, stock)
        assert metrics == stock_metrics
    torch.testing.assert_close(loss, stock)
    assert metrics == pytest.approx(stock_metrics)


def test_the_couplings_of_a_frame_share_its_weight(policy, teacher, batch):
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.25, couplings_per_frame=3))
    _, gradient, _, _ = weights(policy, batch)
    counts = counted(batch, 2)
    torch.testing.assert_close(gradient, (counts / counts.sum() / 3).repeat_interleave(3, dim=0))


def test_an_uncounted_entry_may_hold_anything(policy, teacher, batch, registry):
    """A loss of one's own, NaN where no recorded action exists."""

    @register_loss_strategy("on_recorded", couples=False)
    def on_recorded(step):
        return torch.where(counted(batch, BATCH) == 1, 2.0, torch.nan).requires_grad_()

    attach_plain(policy, teacher, strategy="on_recorded")
    loss, _ = policy.train().forward(dict(batch))
    by_frame, _ = policy.forward(dict(batch), reduction="none")
    assert [loss.item(), by_frame.mean().item()] == pytest.approx([2.0, 2.0])


def test_it_needs_no_gradient_to_be_known(policy, teacher, batch):
    """In one's own loop a loss in train mode may be asked for without gradient."""
    noise, time = torch.randn(BATCH, CHUNK, WIDTH), torch.rand(BATCH)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5), solver="midpoint")
    with torch.no_grad():
        without, _ = policy.train().forward(dict(batch), noise=noise, time=time)
    loss, _ = policy.forward(dict(batch), noise=noise, time=time)
    assert torch.equal(without, loss)
    assert loss.requires_grad
