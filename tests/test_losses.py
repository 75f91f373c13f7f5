"""Each loss against its formula written out per sample, and its gradient against a derivation by hand."""

import math

import pytest
import torch

from smolvla_reflow import Recipe, ReflowError, attach
from smolvla_reflow.losses import get_loss

ERRORS = torch.tensor([[[0.5, 1.0], [2.0, 0.1]], [[1e-3, 2e-3], [0.0, 1e-3]]])
HUBER_C = 0.00054  # Song & Dhariwal: c = 0.00054 sqrt(d), for the norm over all d entries


def squared(errors):
    return errors.square()


def test_mse_is_the_stock_loss():
    assert torch.equal(get_loss("mse")(squared(ERRORS)), squared(ERRORS))


def test_pseudo_huber_is_the_papers():
    """The paper's sqrt(|e|^2 + c^2 d) - c sqrt(d), over sqrt(d): the norm of one entry."""
    expected = []
    for sample in ERRORS.tolist():
        entries = [e for row in sample for e in row]
        d = len(entries)
        c = HUBER_C * math.sqrt(d)
        expected.append((math.sqrt(sum(e * e for e in entries) + c * c) - c) / math.sqrt(d))
    losses = get_loss("pseudo_huber")(squared(ERRORS))
    assert losses.shape == ERRORS.shape
    torch.testing.assert_close(losses.mean(dim=(1, 2)), torch.tensor(expected))


def test_normalized_gives_every_sample_the_gradient_of_its_log():
    errors = ERRORS.clone().requires_grad_()
    get_loss("normalized")(squared(errors)).mean().backward()
    by_log = ERRORS.clone().requires_grad_()
    sum(squared(sample).mean().log() for sample in by_log).div(len(by_log)).backward()
    torch.testing.assert_close(errors.grad, by_log.grad, rtol=1e-4, atol=1e-6)


def test_a_perfect_sample_has_finite_gradients():
    for name in ("mse", "pseudo_huber", "normalized"):
        errors = torch.zeros(2, 3, 2, requires_grad=True)
        get_loss(name)(squared(errors)).mean().backward()
        assert torch.isfinite(errors.grad).all()


def test_unknown_names_list_the_known():
    with pytest.raises(ReflowError, match=r"loss 'hubber' is unknown; known are mse, pseudo_huber, normalized"):
        get_loss("hubber")


@pytest.mark.parametrize("loss", ["mse", "pseudo_huber", "normalized"])
def test_the_policys_loss_is_the_mean_over_samples(policy, teacher, batch, noise_and_time, loss):
    noise, time = noise_and_time
    attachment = attach(policy, teacher, recipe=Recipe(loss=loss))
    batch_loss, metrics = policy.train().forward(dict(batch), noise=noise, time=time)
    each, _ = policy.forward(dict(batch), noise=noise, time=time, reduction="none")
    attachment.detach()
    attach(policy, teacher, recipe=Recipe(loss="mse"))
    plain, _ = policy.forward(dict(batch), noise=noise, time=time, reduction="none")
    expected = {
        "mse": plain,
        "pseudo_huber": (plain + HUBER_C**2).sqrt() - HUBER_C,
        "normalized": torch.ones_like(plain),
    }[loss]
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batch_loss, expected.mean(), rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(batch_loss.item())
