"""Dimensions that never move, whose standard deviation LeRobot aggregates to rounding noise: min and max decide."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ACTION_DIM, STATE_DIM, reflow_train_main
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import TransitionKey, create_transition
from people import REPO_ID, dataset_flags, write_robot_dataset

from smolvla_reflow import ReflowError
from smolvla_reflow.smolvla.normalization import space_maps
from smolvla_reflow.smolvla.statistics import moving_deviations, never_moves

# What LeRobot 0.4.4 and 0.6.1 aggregate of an action that is always 100.3: in 4 episodes of 12 frames, and in 7 of 33.
FOUR_EPISODES = {"min": 100.30000305175781, "max": 100.30000305175781, "mean": 100.29999542, "std": 0.05412658773}
SEVEN_EPISODES = {"min": 100.30000305175781, "max": 100.30000305175781, "mean": 100.30002594, "std": 0.0}
RAW = np.float32(100.3)
MOVES = {"min": -1.0, "max": 1.0, "mean": 0.1, "std": 0.5}


def stats(state, action):
    """Statistics whose last dimensions are given, and whose others move."""
    return {
        feature: {name: np.array([MOVES[name]] * (width - 1) + [last[name]], np.float32) for name in MOVES}
        for feature, width, last in (("observation.state", STATE_DIM, state), ("action", ACTION_DIM, action))
    }


@pytest.fixture
def teacher(make_config):
    """A checkpoint that is nothing but its statistics."""

    def make(saved):
        flat = {f"{feature}.{name}": torch.from_numpy(v) for feature, of in saved.items() for name, v in of.items()}
        return SimpleNamespace(source="T", config=make_config(), statistics=lambda: flat)

    return make


def by_lerobot(config, of, feature, raw):
    """What LeRobot's own normaliser makes of one raw vector of this feature."""
    before, _ = make_smolvla_pre_post_processors(config, of)
    value = torch.as_tensor(raw)
    if feature == "action":
        return before.steps[-1](create_transition(action=value))[TransitionKey.ACTION]
    return before.steps[-1](create_transition(observation={feature: value}))[TransitionKey.OBSERVATION][feature]


@pytest.mark.parametrize(
    ("own", "dataset"), [(FOUR_EPISODES, SEVEN_EPISODES), (SEVEN_EPISODES, FOUR_EPISODES)], ids=["4 to 7", "7 to 4"]
)
def test_both_sides_see_the_constant_as_lerobot_shows_it_to_them(teacher, own, dataset):
    saved, current = stats(own, own), stats(dataset, dataset)
    source = teacher(saved)
    config, maps = source.config, space_maps(source, current)
    raw = np.array([0.2] * (STATE_DIM - 1) + [RAW], np.float32)
    here, there = (by_lerobot(config, of, "observation.state", raw) for of in (current, saved))
    assert (here - there).abs().max() > 1000  # so wrong would it be to hand it over as it is
    torch.testing.assert_close(maps.state(torch.nn.functional.pad(here, (0, 6 - STATE_DIM)))[:STATE_DIM], there)

    raw = np.array([0.2] * (ACTION_DIM - 1) + [RAW], np.float32)
    here, there = (by_lerobot(config, of, "action", raw) for of in (current, saved))
    jittered = there.clone()
    jittered[-1] += 0.05  # a teacher does not give its constant to the last digit
    for given in (there, jittered):
        torch.testing.assert_close(maps.actions(torch.nn.functional.pad(given, (0, 6 - ACTION_DIM)))[:ACTION_DIM], here)


def test_the_same_noise_on_both_sides_needs_no_map(teacher):
    assert space_maps(teacher(stats(FOUR_EPISODES, FOUR_EPISODES)), stats(FOUR_EPISODES, FOUR_EPISODES)) is None


def test_noise_does_not_make_a_constant_move(teacher):
    """A deviation of 0.054 would pass for one that moves, and the teacher has never seen that."""
    with pytest.raises(ReflowError, match="'observation.state' dimension 2 is .nearly. constant in one and not"):
        space_maps(teacher(stats(FOUR_EPISODES, MOVES)), stats(MOVES, MOVES))
    with pytest.raises(ReflowError, match="'action' dimension 1 is .nearly. constant in one and not"):
        space_maps(teacher(stats(MOVES, MOVES)), stats(MOVES, FOUR_EPISODES))


def test_a_state_that_stands_still_where_the_teacher_has_seen_it_move(teacher):
    """The teacher sees it as in stock inference."""
    still = {**FOUR_EPISODES, "min": 0.3, "max": 0.3, "mean": 0.29999998}
    source, current = teacher(stats(MOVES, MOVES)), stats(still, MOVES)
    maps = space_maps(source, current)
    raw = np.array([0.2] * (STATE_DIM - 1) + [0.3], np.float32)
    here, there = (by_lerobot(source.config, of, "observation.state", raw) for of in (current, stats(MOVES, MOVES)))
    torch.testing.assert_close(maps.state(torch.nn.functional.pad(here, (0, 6 - STATE_DIM)))[:STATE_DIM], there)


@pytest.mark.parametrize("feature", ["observation.state", "action"])
def test_another_constant_is_refused(teacher, feature):
    elsewhere = {**FOUR_EPISODES, "min": 99.0, "max": 99.0, "mean": 99.0}
    other = {"observation.state": (elsewhere, FOUR_EPISODES), "action": (FOUR_EPISODES, elsewhere)}[feature]
    with pytest.raises(ReflowError, match=f"'{feature}' dimension . is constant in both, but at different values"):
        space_maps(teacher(stats(FOUR_EPISODES, FOUR_EPISODES)), stats(*other))


def test_what_counts_as_constant():
    numbers = {"min": [0.3, 0.0, -1.0], "max": [0.3, 1.0, 1.0], "mean": [0.3, 0.0, 0.0], "std": [3e-4, 0.0, 0.5]}
    assert never_moves(numbers, 3).tolist() == [True, True, False]
    assert moving_deviations(numbers).tolist() == [0.0, 0.0, 0.5]
    assert never_moves({"mean": [0.0], "std": [1e-12]}, 1).tolist() == [False]  # a checkpoint without min and max


def test_a_second_dataset_with_the_same_still_gripper(people, tmp_path):
    """As LeRobot records and aggregates it: other deviations of what never moves, and the run comes through."""
    second = write_robot_dataset(tmp_path / "second", episodes=8, frames=50, seed=5)
    noise = [LeRobotDatasetMetadata(REPO_ID, root=root).stats["action"]["std"][-1] for root in (people.dataset, second)]
    assert noise[0] != noise[1]
    assert max(noise) > 0
    reflow_train_main(dataset_flags(second, reflow__teacher_path=people.teacher, output_dir=tmp_path / "run", steps=1))


def test_a_checkpoint_without_minimum_and_maximum_on_its_own_dataset(teacher):
    """As LeRobot's converter makes one of an old checkpoint: the deviation alone, and it is the same one."""
    current = stats(FOUR_EPISODES, FOUR_EPISODES)
    bare = {feature: {name: of[name] for name in ("mean", "std")} for feature, of in current.items()}
    for saved, dataset in ((bare, current), (current, bare)):
        maps = space_maps(teacher(saved), dataset)
        assert maps is None or all((affine.change() < 1e-3).all() for affine in (maps.state, maps.actions))
