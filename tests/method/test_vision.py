"""Shared vision features, where the prefix is not shared: each image is encoded once per step, and nothing else changes."""

import pytest
import torch
from helpers import assert_equal, gradients, let_each_encode_for_itself, loss_of, make_batch
from lerobot.configs.types import FeatureType, PolicyFeature
from peft import LoraConfig, get_peft_model

from smolvla_reflow import Recipe, Step, attach, detach
from smolvla_reflow.smolvla.sharing import vision_encoder

CAMERAS = ("observation.images.top", "observation.images.wrist")


FROZEN = {}
CONNECTOR_TRAINED = {"train_expert_only": False, "freeze_vision_encoder": True}
TRAINED = {"train_expert_only": False, "freeze_vision_encoder": False}


@pytest.fixture
def make_policy(make_policy, make_config):
    """A policy with two cameras."""
    features = {**make_config().input_features, CAMERAS[1]: PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
    return lambda **overrides: make_policy(seed=0, input_features=features, **overrides)


@pytest.fixture
def batch():
    batch = make_batch(4)
    return {**batch, CAMERAS[1]: batch[CAMERAS[0]].flip(0)}


@pytest.fixture
def with_other_head(make_policy):
    """A function that makes a teacher like a policy, but for the action expert."""

    def make(policy, **overrides):
        teacher = make_policy(**overrides)
        teacher.load_state_dict(policy.state_dict())
        teacher.model.action_out_proj.weight.data.mul_(1.1)
        return teacher

    return make


def encoded_images(*policies):
    """Count the images that go through the layers of these policies' vision encoders."""
    counts = []
    for policy in policies:
        vision_encoder(policy).encoder.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("overrides", [FROZEN, CONNECTOR_TRAINED], ids=["frozen", "connector trained"])
def test_each_image_is_encoded_once_per_step_and_no_bit_is_changed_by_that(
    make_policy, with_other_head, batch, noise_and_time, monkeypatch, overrides
):
    results = []
    for shared in (True, False):
        if not shared:
            let_each_encode_for_itself(monkeypatch)
        policy = make_policy(**overrides)
        attach(policy, with_other_head(policy, **overrides), train_state_proj=True)
        counts = encoded_images(policy, policy.model.teacher)
        for step in (1, 2):
            loss = loss_of(policy, batch, *noise_and_time)
            found = gradients(policy, loss)
            assert len(counts) == len(CAMERAS) * step * (1 if shared else 2)
        results.append({"loss": loss, **found})
    assert len(results[0]) > 10
    assert_equal(*results)


@pytest.mark.parametrize("differs", [True, False], ids=["differing", "trained"])
def test_an_encoder_that_is_trained_or_differs_is_not_shared(make_policy, with_other_head, batch, differs):
    policy = make_policy(**(FROZEN if differs else TRAINED))
    teacher = with_other_head(policy) if differs else None
    if differs:
        next(vision_encoder(teacher).parameters()).data.add_(0.1)
    assert attach(policy, teacher).sharing.dtype is None
    counts = encoded_images(policy, policy.model.teacher)
    found = gradients(policy, loss_of(policy, batch))
    assert len(counts) == 2 * len(CAMERAS)
    assert differs or any(gradient.any() for name, gradient in found.items() if "vision_model" in name)


@pytest.mark.parametrize("frozen", [True, False])
def test_without_a_teacher_it_is_shared_among_a_frames_couplings_alone(make_policy, frozen):
    """A single coupling has nobody to share it with, and a trained encoder is asked for each coupling."""
    policy = make_policy(**(FROZEN if frozen else TRAINED))
    for per_frame, shared in ((1, False), (2, frozen)):
        with attach(policy, pairs=lambda *_, **__: None, recipe=Recipe(couplings_per_frame=per_frame)) as attachment:
            assert (attachment.sharing.dtype is not None) is shared


def test_an_encoder_in_train_mode_is_asked_each_time(make_policy, batch):
    """It may drop out."""
    policy = make_policy()
    assert attach(policy, train_state_proj=True).sharing.dtype is not None
    counts = encoded_images(policy, policy.model.teacher)
    policy.train()
    vision_encoder(policy).train()
    policy.forward(dict(batch))
    assert len(counts) == 2 * len(CAMERAS)


def test_a_backbone_in_bfloat16_is_shared(make_policy, batch):
    """LeRobot loads the pretrained backbone in bfloat16, and converts the images on the way in."""
    policy = make_policy()
    vision_encoder(policy).to(torch.bfloat16)
    policy.model.vlm_with_expert.get_vlm_model().connector.to(torch.bfloat16)
    attach(policy)
    counts = encoded_images(policy, policy.model.teacher)
    loss_of(policy, batch).backward()
    assert len(counts) == len(CAMERAS)


@pytest.mark.parametrize(
    ("target", "shared"), [(r".*lm_expert\..*\.q_proj", True), (r".*vision_model\..*\.q_proj", False)]
)
def test_lora_students_share_unless_the_adapter_is_in_the_encoder(make_policy, batch, target, shared):
    policy = make_policy()
    wrapped = get_peft_model(policy, LoraConfig(target_modules=target))
    assert (attach(wrapped).sharing.dtype is not None) is shared
    counts = encoded_images(policy, policy.model.teacher)
    loss_of(wrapped, batch).backward()
    assert len(counts) == len(CAMERAS) * (1 if shared else 2)


def test_features_last_for_one_step(make_policy, batch, noise_and_time, monkeypatch):
    """The next step, a step after an error, the sampler and the stock loss all encode their own images."""
    noise, time = noise_and_time
    policy = make_policy()
    attachment = attach(policy, recipe=Recipe(couplings_per_frame=2), train_state_proj=True)
    loss_of(policy, batch)
    assert attachment.sharing.seen is None
    with monkeypatch.context() as patch:
        patch.setattr(Step, "squared_errors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(policy, batch)
    assert attachment.sharing.seen is None
    first = loss_of(policy, batch, noise, time)
    batch[CAMERAS[0]].zero_()  # the same tensor, another picture
    assert loss_of(policy, batch, noise, time) != first

    def by_stock():
        policy.eval()
        return policy.predict_action_chunk(dict(batch), noise=noise), policy.forward(dict(batch), noise, time)[0]

    attached = by_stock()
    detach(policy)
    assert_equal(attached, by_stock())
