"""Statistics and features of dataset and teacher, for every way SmolVLA can normalise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs.types import NormalizationMode

from smolvla_reflow import ReflowError
from smolvla_reflow.preflight import STATISTICS, check_features, check_statistics

NAMES = ("mean", "std", "min", "max", "q01", "q10", "q90", "q99")


def teacher_and_stats(make_config, mode):
    rng = np.random.default_rng(0)
    stats = {
        feature: {name: rng.uniform(1, 2, 3) for name in NAMES} for feature in ("action", "observation.state")
    }
    saved = {
        f"{feature}.{name}": torch.as_tensor(value, dtype=torch.float32)
        for feature, values in stats.items()
        for name, value in values.items()
    }
    config = make_config(
        normalization_mapping={"STATE": mode, "ACTION": mode, "VISUAL": NormalizationMode.IDENTITY}
    )
    return SimpleNamespace(source="T", config=config, statistics=lambda: saved), stats


@pytest.mark.parametrize("mode", list(NormalizationMode))
def test_exactly_the_statistics_in_use_must_agree(make_config, mode):
    teacher, stats = teacher_and_stats(make_config, mode)
    check_statistics(teacher, stats)  # float32 rounding is no difference
    for feature in stats:
        for name in NAMES:
            value = stats[feature][name]
            stats[feature][name] = value * np.array([1.0, 1.1, 1.0])
            if name in STATISTICS[mode]:
                with pytest.raises(ReflowError, match=rf"'{feature}\.{name}' differs by 0\.0\d+ relative"):
                    check_statistics(teacher, stats)
            else:
                check_statistics(teacher, stats)
            stats[feature][name] = value


def test_a_renamed_state_is_refused(make_config):
    """LeRobot would train with that state unnormalised."""
    teacher, stats = teacher_and_stats(make_config, NormalizationMode.MEAN_STD)
    stats["observation.joints"] = stats.pop("observation.state")
    with pytest.raises(ReflowError, match="The dataset has no statistics 'observation.state.mean'"):
        check_statistics(teacher, stats)


def test_cameras_may_be_renamed_and_empty_ones_missing(make_config):
    config = make_config(empty_cameras=1)
    config.validate_features()
    teacher = SimpleNamespace(config=config)
    features = {
        "observation.state": {"shape": (3,)},
        "action": {"shape": (2,)},
        "observation.images.front": {"shape": (64, 64, 3)},
    }
    check_features(teacher, features, {"observation.images.front": "observation.images.top"})
    with pytest.raises(ReflowError, match=r"needs 'observation.images.top'.*--rename_map"):
        check_features(teacher, features, {})
