"""Shared vision features, where the prefix is not shared: each image is encoded once per step, and nothing else changes."""

import contextlib
import copy

import pytest
import torch
from helpers import make_batch
from lerobot.configs.types import FeatureType, PolicyFeature

from smolvla_reflow import Recipe, Step, attach, detach
from smolvla_reflow.smolvla.vision import vision_encoder

CAMERAS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture
def two_cameras(make_config):
    features = dict(make_config().input_features)
    features[CAMERAS[1]] = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    return {"input_features": features}


@pytest.fixture
def batch():
    batch = make_batch(4)
    return {**batch, CAMERAS[1]: batch[CAMERAS[0]].flip(0)}


def with_other_head(make_policy, policy, **overrides):
    """A teacher that differs from the policy in the action expert alone."""
    teacher = make_policy(seed=0, **overrides)
    teacher.load_state_dict(policy.state_dict())
    with torch.no_grad():
        teacher.model.action_out_proj.weight.mul_(1.1)
    return teacher


def encoded_images(*policies):
    """Count the images that go through the layers of these policies' vision encoders."""
    counts = []
    for policy in policies:
        vision_encoder(policy).encoder.register_forward_hook(lambda *_: counts.append(1))
    return counts


FROZEN = {}
CONNECTOR_TRAINED = {"train_expert_only": False, "freeze_vision_encoder": True}


@pytest.mark.parametrize("overrides", [FROZEN, CONNECTOR_TRAINED], ids=["frozen", "connector trained"])
def test_each_image_is_encoded_once_per_step(make_policy, two_cameras, batch, overrides):
    policy = make_policy(seed=0, **two_cameras, **overrides)
    attach(policy, with_other_head(make_policy, policy, **two_cameras, **overrides), train_state_proj=True)
    counts = encoded_images(policy, policy.model.teacher)
    policy.train()
    for step in (1, 2, 3):
        policy.forward(dict(batch))[0].backward()
        assert len(counts) == len(CAMERAS) * step


@pytest.mark.parametrize("overrides", [FROZEN, CONNECTOR_TRAINED], ids=["frozen", "connector trained"])
def test_loss_and_gradient_are_bitwise_those_without_sharing(
    make_policy, two_cameras, batch, noise_and_time, nothing_shared, overrides
):
    noise, time = noise_and_time
    results = []
    for shared in (True, False):
        policy = make_policy(seed=0, **two_cameras, **overrides)
        with contextlib.nullcontext() if shared else nothing_shared():
            teacher = with_other_head(make_policy, policy, **two_cameras, **overrides)
            attach(policy, teacher, train_state_proj=True)
        counts = encoded_images(policy, policy.model.teacher)
        loss, _ = policy.train().forward(dict(batch), noise=noise, time=time)
        loss.backward()
        assert len(counts) == len(CAMERAS) * (1 if shared else 2)
        results.append((loss, {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) > 10
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_a_trained_encoder_is_not_shared(make_policy, two_cameras, batch):
    overrides = {**two_cameras, "train_expert_only": False, "freeze_vision_encoder": False}
    policy = make_policy(seed=0, **overrides)
    attachment = attach(policy)
    assert attachment.sharing.features is None
    counts = encoded_images(policy, policy.model.teacher)
    policy.train().forward(dict(batch))[0].backward()
    assert len(counts) == 2 * len(CAMERAS)
    assert any(p.grad is not None and p.grad.any() for p in vision_encoder(policy).parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_without_a_teacher_it_is_shared_among_a_frames_couplings_alone(make_policy, two_cameras, frozen):
    """There is nobody else to share it with; and trained, it is asked for each of them."""
    policy = make_policy(seed=0, **two_cameras, train_expert_only=frozen, freeze_vision_encoder=frozen)
    for per_frame, shared in ((1, False), (2, frozen)):
        with attach(policy, pairs=lambda *_, **__: None, recipe=Recipe(couplings_per_frame=per_frame)) as attachment:
            assert (attachment.sharing.features is not None) is shared


def test_an_encoder_in_train_mode_is_asked_each_time(make_policy, two_cameras, batch):
    """It may drop out."""
    policy = make_policy(seed=0, **two_cameras)
    assert attach(policy, train_state_proj=True).sharing.features is not None
    counts = encoded_images(policy, policy.model.teacher)
    policy.train()
    vision_encoder(policy).train()
    policy.forward(dict(batch))
    assert len(counts) == 2 * len(CAMERAS)


def test_a_differing_encoder_is_not_shared(make_policy, two_cameras, batch):
    policy = make_policy(seed=0, **two_cameras)
    teacher = with_other_head(make_policy, policy, **two_cameras)
    with torch.no_grad():
        next(vision_encoder(teacher).parameters()).add_(0.1)
    assert attach(policy, teacher).sharing.features is None
    counts = encoded_images(policy, policy.model.teacher)
    policy.train().forward(dict(batch))
    assert len(counts) == 2 * len(CAMERAS)


def test_a_backbone_in_bfloat16_is_shared(make_policy, two_cameras, batch):
    """LeRobot loads the pretrained backbone in bfloat16, so that it converts the images on the way in."""
    policy = make_policy(seed=0, **two_cameras)
    vision_encoder(policy).to(torch.bfloat16)
    policy.model.vlm_with_expert.get_vlm_model().connector.to(torch.bfloat16)
    attach(policy)
    counts = encoded_images(policy, policy.model.teacher)
    policy.train().forward(dict(batch))[0].backward()
    assert len(counts) == len(CAMERAS)


def test_lora_students_share_unless_the_adapter_is_in_the_encoder(make_policy, two_cameras, batch):
    from peft import LoraConfig, get_peft_model

    for target, shared in ((r".*lm_expert\..*\.q_proj", True), (r".*vision_model\..*\.q_proj", False)):
        policy = make_policy(seed=0, **two_cameras)
        wrapped = get_peft_model(policy, LoraConfig(target_modules=target))
        assert (attach(wrapped).sharing.features is not None) is shared
        counts = encoded_images(policy, policy.model.teacher)
        wrapped.train().forward(dict(batch))[0].backward()
        assert len(counts) == len(CAMERAS) * (1 if shared else 2)


def test_features_last_for_one_step(make_policy, two_cameras, batch, noise_and_time):
    """Neither the next step, nor the sampler, nor the stock loss sees the features of an earlier image."""
    noise, time = noise_and_time
    policy = make_policy(seed=0, **two_cameras)
    attachment = attach(policy, recipe=Recipe(couplings_per_frame=2), train_state_proj=True)
    policy.train()
    policy.forward(dict(batch))
    assert attachment.sharing.features.seen is None
    first, _ = policy.forward(dict(batch), noise=noise, time=time)
    batch[CAMERAS[0]].zero_()  # the same tensor, another picture
    second, _ = policy.forward(dict(batch), noise=noise, time=time)
    assert first != second
    policy.eval()
    sampled, stock_loss = (
        policy.predict_action_chunk(dict(batch), noise=noise),
        policy.forward(dict(batch), noise, time),
    )
    detach(policy)
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise), sampled)
    assert torch.equal(policy.forward(dict(batch), noise, time)[0], stock_loss[0])


def test_an_error_in_a_step_forgets_its_features(policy, batch, monkeypatch):
    attachment = attach(policy)
    policy.train()
    with monkeypatch.context() as patch:
        patch.setattr(Step, "squared_errors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.forward(dict(batch))
    assert attachment.sharing.features.seen is None


def test_detach_leaves_the_encoder_as_it_was(policy):
    encoder = vision_encoder(policy)
    before = [copy.copy(vars(encoder)), dict(encoder._forward_hooks), dict(encoder._modules)]
    attach(policy)
    assert "forward" in vars(encoder)
    detach(policy)
    assert [vars(encoder), encoder._forward_hooks, encoder._modules] == before
