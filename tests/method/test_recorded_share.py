"""Recorded actions in a reflow batch: every entry that counts weighs the same, by d loss / d losses."""

import lerobot
import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, attach_plain, loss_of, losses_of, make_batch, plain
from packaging.version import Version

from smolvla_reflow import Recipe, Step, attach

BATCH = 8
LEAVES_OUT_PADDING = Version(lerobot.__version__) >= Version("0.5.0")  # LeRobot's loss on recorded actions


@pytest.fixture
def batch():
    """Padded steps in every second frame, so that they are among the recorded rows and among the others."""
    made = make_batch(BATCH)
    made["action_is_pad"] = torch.zeros(BATCH, CHUNK, dtype=torch.bool)
    made["action_is_pad"][::2, -2:] = True
    return made


def weights(policy, batch, of=None):
    """The loss of a step (or of each frame, for the gradient of frame `of`), its gradient to the student's squared
    errors, the errors with the recorded rows first, and the metrics."""
    leaves, squared_errors = [], Step.squared_errors

    def leaf(*asked):
        leaves.append(squared_errors(*asked).detach().requires_grad_())
        return leaves[-1]

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "squared_errors", leaf)
        loss, metrics = policy.train().forward(dict(batch), reduction="mean" if of is None else "none")
    (loss if of is None else loss[of]).backward()
    return loss.detach(), torch.cat([leaf.grad for leaf in leaves]), torch.cat(leaves).detach(), metrics


def counted(batch, recorded):
    """Entries that count, (BATCH, CHUNK, WIDTH): all of the couplings', and the real ones of the first `recorded` rows."""
    counts = torch.ones(BATCH, CHUNK, WIDTH)
    if LEAVES_OUT_PADDING:
        counts[:recorded] *= ~batch["action_is_pad"][:recorded, :, None]
        counts[:recorded, :, ACTION_DIM:] = 0
    return counts


@pytest.mark.parametrize(
    ("ratio", "recorded", "per_frame"),
    [(0.0, 0, 1), (0.001, 0, 1), (0.25, 2, 1), (0.5, 4, 1), (0.875, 7, 1), (0.25, 2, 3)],
)
def test_every_entry_that_counts_weighs_the_same(policy, teacher, batch, ratio, recorded, per_frame):
    """The couplings of a frame share its weight, and couplings alone have the plain mean, bitwise. A fraction of a frame
    is rounded down."""
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=ratio, couplings_per_frame=per_frame))
    loss, gradient, losses, metrics = weights(policy, batch)
    counts = counted(batch, recorded)
    expected = (counts / counts.sum() / per_frame).repeat_interleave(per_frame, dim=0)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, (expected * losses).sum())
    assert recorded or torch.equal(loss, losses.mean())
    assert metrics["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("frame", [0, 1, BATCH - 2, BATCH - 1])
def test_so_does_it_in_one_loss_per_frame(policy, teacher, batch, frame):
    """Padded or not, on recorded actions or not."""
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.25))
    by_frame, gradient, losses, _ = weights(policy, batch, of=frame)
    counts = counted(batch, 2)
    expected = torch.zeros(BATCH, CHUNK, WIDTH)
    expected[frame] = counts[frame] * BATCH / counts.sum()
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(by_frame, (counts * losses).sum(dim=(1, 2)) * BATCH / counts.sum())


@pytest.mark.parametrize("padding_weight", [1.0, 0.1])
@pytest.mark.parametrize("weighting", ["none", "t", "huber"])
def test_the_recorded_share_of_the_gradient_is_the_ratio(policy, teacher, batch, weighting, padding_weight):
    """On the robot's own dimensions; and on the padded dimensions, if LeRobot counts the padding of recorded actions.
    Weights of the couplings leave the share as it is, and recorded actions have none."""
    batch["action_is_pad"][:] = False
    recipe = Recipe(weighting=weighting, padding_weight=padding_weight, real_data_ratio=0.25, couplings_per_frame=3)
    attach(policy, teacher, recipe=recipe)
    _, gradient, _, _ = weights(policy, batch)
    by_row = gradient.unflatten(0, (BATCH, 3))
    own = by_row[..., :ACTION_DIM].sum(dim=(1, 2, 3))
    torch.testing.assert_close(own[:2].sum() / own.sum(), torch.tensor(0.25))
    torch.testing.assert_close(own[0], own[1])
    assert (len(own[2:].unique()) > 1) is (weighting != "none")
    padded = by_row[..., ACTION_DIM:].sum(dim=(1, 2, 3))
    share = 0.0 if LEAVES_OUT_PADDING else 0.25
    torch.testing.assert_close(padded[:2].sum() / padded.sum(), torch.tensor(share))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "settings", [{"recipe": plain(real_data_ratio=1.0)}, {"strategy": "standard"}], ids=["ratio 1", "standard"]
)
def test_recorded_actions_alone_are_lerobots_own_loss(policy, teacher, batch, settings, reduction):
    """With its metrics: against stock LeRobot on the same noise and times. Standard training is stock, bitwise."""
    noise, time = torch.randn(BATCH, CHUNK, WIDTH), torch.rand(BATCH)
    stock, stock_metrics = policy.train().forward(dict(batch), noise, time, reduction)
    attach_plain(policy, teacher, **settings)
    loss, metrics = policy.forward(dict(batch), noise, time, reduction)
    torch.testing.assert_close(loss, stock)
    assert metrics == pytest.approx(stock_metrics)
    if "strategy" in settings:
        assert torch.equal(loss, stock)
        assert metrics == stock_metrics


def test_an_uncounted_entry_may_hold_anything(policy, teacher, batch, monkeypatch):
    """NaN in the errors of recorded actions, where LeRobot does not count them."""
    squared_errors = Step.squared_errors

    def broken(step, coupling, times):
        errors = squared_errors(step, coupling, times)
        return errors.masked_fill(counted(batch, 2)[:2] == 0, torch.nan) if coupling.recorded else errors

    monkeypatch.setattr(Step, "squared_errors", broken)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.25))
    assert torch.isfinite(losses_of(policy, batch)).all()


def test_a_loss_may_be_asked_for_without_gradient(policy, teacher, batch):
    """In train mode, by a loop of one's own."""
    noise, time = torch.randn(BATCH, CHUNK, WIDTH), torch.rand(BATCH)
    attach_plain(policy, teacher, recipe=plain(real_data_ratio=0.5), solver="midpoint")
    with torch.no_grad():
        without = loss_of(policy, batch, noise, time)
    loss = loss_of(policy, batch, noise, time)
    assert torch.equal(without, loss)
    assert loss.requires_grad
