"""A dataset's features against the teacher's: what LeRobot takes is taken, and its own message passed on."""

import pytest
import torch
from helpers import ACTION_DIM, STATE_DIM
from lerobot.configs.types import FeatureType, PolicyFeature

from smolvla_reflow import ReflowError
from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.smolvla.features import cameras_seen, fitted

FRONT, TOP, WRIST = (f"observation.images.{name}" for name in ("front", "top", "wrist"))


def visual(*names):
    return {name: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in names}


def features(*cameras, state=STATE_DIM, action=ACTION_DIM):
    return {
        "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        "action": PolicyFeature(FeatureType.ACTION, (action,)),
        **visual(*cameras),
    }


@pytest.fixture
def checkpoint(make_config, monkeypatch, tmp_path):
    """A teacher of three state and two action dimensions, whose config has another robot's widths."""
    widths = {"observation.state.mean": torch.zeros(STATE_DIM), "action.mean": torch.zeros(ACTION_DIM)}
    monkeypatch.setattr(Checkpoint, "statistics", lambda self: widths)
    monkeypatch.setattr(Checkpoint, "processor_steps", lambda self, processor: [])

    def make(*cameras, **overrides):
        inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (6,)), **visual(*cameras)}
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
        config = make_config(**{"input_features": inputs, "output_features": outputs, **overrides})
        config.validate_features()
        return Checkpoint(source="T", folder=tmp_path, config=config)

    return make


def test_the_statistics_know_the_width_and_the_config_is_not_asked(checkpoint):
    found = fitted(checkpoint(TOP), features(TOP), {})
    assert found.config.output_features["action"].shape == (ACTION_DIM,)
    with pytest.raises(ReflowError, match=r"'action' has shape \(6,\) in the dataset, and T was trained on 2"):
        fitted(checkpoint(TOP), features(TOP, action=6), {})


@pytest.mark.parametrize("empty_cameras", [0, 1])
def test_some_of_the_cameras_do_and_so_do_more(checkpoint, empty_cameras):
    fitted(checkpoint(TOP, WRIST, empty_cameras=empty_cameras), features(TOP), {})
    fitted(checkpoint(TOP), features(TOP, WRIST), {})


def test_cameras_may_be_renamed(checkpoint):
    fitted(checkpoint(TOP, WRIST), features(FRONT), {FRONT: TOP})
    with pytest.raises(ReflowError, match=f"T needs one of the cameras {TOP}, {WRIST}, and .* has {FRONT};.*--rename_"):
        fitted(checkpoint(TOP, WRIST), features(FRONT), {})


def test_what_lerobot_refuses_is_refused_in_its_words(checkpoint):
    with pytest.raises(ReflowError, match=r"Feature mismatch .*wrist.*front.*--rename_map='{\"observation"):
        fitted(checkpoint(TOP, WRIST), features(TOP, FRONT), {})
    fitted(checkpoint(TOP, WRIST), features(TOP, FRONT), {FRONT: FRONT})  # a map, and LeRobot leaves it to the user


def test_a_config_without_features_gets_the_datasets_as_in_lerobot(checkpoint):
    found = fitted(checkpoint(input_features=None, output_features=None), features(WRIST, TOP), {})
    assert list(found.config.image_features) == [WRIST, TOP]


def test_a_state_under_another_name(checkpoint):
    given = features(TOP)
    given["observation.joints"] = given.pop("observation.state")
    with pytest.raises(ReflowError, match="needs 'observation.state', which the dataset lacks"):
        fitted(checkpoint(TOP), given, {})
    fitted(checkpoint(TOP), given, {"observation.joints": "observation.state"})


@pytest.mark.parametrize("empty_cameras", [0, 1, 2])
@pytest.mark.parametrize("there", [(TOP,), (WRIST, TOP), (FRONT, TOP, WRIST)])
def test_cameras_seen_is_what_lerobot_prepares(make_policy, empty_cameras, there):
    policy = make_policy(input_features={**features(WRIST, TOP)}, empty_cameras=empty_cameras)
    policy.config.validate_features()
    batch = {name: torch.full((1, 3, 32, 32), 0.1 * i) for i, name in enumerate(there)}
    images, masks = policy.prepare_images(batch)
    seen = cameras_seen(policy.config, batch)
    assert len(seen) == len(images)
    for name, image, mask in zip(seen, images, masks, strict=True):
        assert bool(mask) is bool(name)
        if name:
            torch.testing.assert_close(image, batch[name] * 2 - 1)
