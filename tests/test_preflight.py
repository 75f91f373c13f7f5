"""A dataset's features against the teacher's."""

from types import SimpleNamespace

import pytest

from smolvla_reflow import ReflowError
from smolvla_reflow.smolvla.features import check_features


def test_cameras_may_be_renamed_and_empty_ones_missing(make_config):
    config = make_config(empty_cameras=1)
    config.validate_features()
    teacher = SimpleNamespace(source="teacher", config=config)
    features = {
        "observation.state": {"shape": (3,)},
        "action": {"shape": (2,)},
        "observation.images.front": {"shape": (64, 64, 3)},
    }
    check_features(teacher, features, {"observation.images.front": "observation.images.top"})
    with pytest.raises(ReflowError, match=r"needs 'observation.images.top'.*--rename_map"):
        check_features(teacher, features, {})
