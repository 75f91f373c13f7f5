"""Dimensions that never move: LeRobot aggregates their standard deviation to rounding noise, so min and max decide."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ACTION_DIM, STATE_DIM, WIDTH, reflow_train_main
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import TransitionKey, create_transition
from people import REPO_ID, dataset_flags, write_robot_dataset
from torch.nn.functional import pad

from smolvla_reflow import ReflowError
from smolvla_reflow.smolvla.normalization import space_maps
from smolvla_reflow.smolvla.statistics import moving_deviations, never_moves

# LeRobot 0.4.4 and 0.6.1 aggregate these of an action that is always 100.3: in 4 episodes of 12 frames, and in 7 of 33.
FOUR_EPISODES = {"min": 100.30000305175781, "max": 100.30000305175781, "mean": 100.29999542, "std": 0.05412658773}
SEVEN_EPISODES = {"min": 100.30000305175781, "max": 100.30000305175781, "mean": 100.30002594, "std": 0.0}
RAW = 100.3
MOVES = {"min": -1.0, "max": 1.0, "mean": 0.1, "std": 0.5}


def stats(state, action):
    """Statistics whose last dimensions are given, and whose others move."""
    return {
        feature: {name: np.array([MOVES[name]] * (width - 1) + [last[name]], np.float32) for name in MOVES}
        for feature, width, last in (("observation.state", STATE_DIM, state), ("action", ACTION_DIM, action))
    }


@pytest.fixture
def teacher(make_config):
    """A checkpoint that has nothing but its statistics."""

    def make(saved):
        flat = {f"{feature}.{name}": torch.from_numpy(v) for feature, of in saved.items() for name, v in of.items()}
        return SimpleNamespace(source="T", config=make_config(), statistics=lambda: flat)

    return make


def by_lerobot(config, of, feature, last):
    """LeRobot's own normalised vector of a feature whose last raw dimension is given."""
    width = ACTION_DIM if feature == "action" else STATE_DIM
    raw = torch.tensor([0.2] * (width - 1) + [last])
    normalizer = make_smolvla_pre_post_processors(config, of)[0].steps[-1]
    if feature == "action":
        return normalizer(create_transition(action=raw))[TransitionKey.ACTION]
    return normalizer(create_transition(observation={feature: raw}))[TransitionKey.OBSERVATION][feature]


def mapped(affine, x):
    return affine(pad(x, (0, WIDTH - len(x))))[: len(x)]


@pytest.mark.parametrize(
    ("own", "dataset"), [(FOUR_EPISODES, SEVEN_EPISODES), (SEVEN_EPISODES, FOUR_EPISODES)], ids=["4 to 7", "7 to 4"]
)
def test_both_sides_see_the_constant_as_lerobot_shows_it_to_them(teacher, own, dataset):
    saved, current = stats(own, own), stats(dataset, dataset)
    source = teacher(saved)
    maps = space_maps(source, current)
    by_student, by_teacher = (by_lerobot(source.config, of, "observation.state", RAW) for of in (current, saved))
    assert (by_student - by_teacher).abs().max() > 1000  # the error without a map
    torch.testing.assert_close(mapped(maps.state, by_student), by_teacher)
    by_student, by_teacher = (by_lerobot(source.config, of, "action", RAW) for of in (current, saved))
    inexact = by_teacher.clone()
    inexact[-1] += 0.05  # a teacher does not give its constant to the last digit
    for given in (by_teacher, inexact):
        torch.testing.assert_close(mapped(maps.actions, given), by_student)


def test_a_state_that_stands_still_is_shown_to_a_teacher_that_has_seen_it_move(teacher):
    """As in stock inference."""
    still = {**FOUR_EPISODES, "min": 0.3, "max": 0.3, "mean": 0.29999998}
    saved, current = stats(MOVES, MOVES), stats(still, MOVES)
    source = teacher(saved)
    by_student, by_teacher = (by_lerobot(source.config, of, "observation.state", 0.3) for of in (current, saved))
    torch.testing.assert_close(mapped(space_maps(source, current).state, by_student), by_teacher)


ELSEWHERE = {**FOUR_EPISODES, "min": 99.0, "max": 99.0, "mean": 99.0}
BOTH = (FOUR_EPISODES, FOUR_EPISODES)


@pytest.mark.parametrize(
    ("own", "dataset", "message"),
    [
        ((FOUR_EPISODES, MOVES), (MOVES, MOVES), "'observation.state' dimension 2 is .nearly. constant in"),
        ((MOVES, MOVES), (MOVES, FOUR_EPISODES), "'action' dimension 1 is .nearly. constant in"),
        (BOTH, (ELSEWHERE, FOUR_EPISODES), "'observation.state' dimension . is constant in both, but at different"),
        (BOTH, (FOUR_EPISODES, ELSEWHERE), "'action' dimension . is constant in both, but at different values"),
    ],
)
def test_what_no_map_can_bridge_is_refused(teacher, own, dataset, message):
    """A deviation of 0.054 would pass for a dimension that moves, and the teacher has never seen that."""
    with pytest.raises(ReflowError, match=message):
        space_maps(teacher(stats(*own)), stats(*dataset))


def test_what_counts_as_constant():
    numbers = {"min": [0.3, 0.0, -1.0], "max": [0.3, 1.0, 1.0], "mean": [0.3, 0.0, 0.0], "std": [3e-4, 0.0, 0.5]}
    assert never_moves(numbers, 3).tolist() == [True, True, False]
    assert moving_deviations(numbers).tolist() == [0.0, 0.0, 0.5]
    assert never_moves({"mean": [0.0], "std": [1e-12]}, 1).tolist() == [False]  # a checkpoint without min and max


def test_a_second_dataset_with_the_same_still_gripper(people, tmp_path):
    """As LeRobot records and aggregates it: the dimension that never moves has another deviation, and the run works."""
    second = write_robot_dataset(tmp_path / "second", episodes=8, frames=50, seed=5)
    noise = [LeRobotDatasetMetadata(REPO_ID, root=root).stats["action"]["std"][-1] for root in (people.dataset, second)]
    assert noise[0] != noise[1]
    assert max(noise) > 0
    reflow_train_main(dataset_flags(second, reflow__teacher_path=people.teacher, output_dir=tmp_path / "run", steps=1))


def test_a_checkpoint_needs_no_map_on_its_own_dataset(teacher):
    """Also without minimum and maximum: LeRobot's converter of old checkpoints keeps only mean and deviation."""
    current = stats(FOUR_EPISODES, FOUR_EPISODES)
    assert space_maps(teacher(current), current) is None
    bare = {feature: {name: of[name] for name in ("mean", "std")} for feature, of in current.items()}
    for saved, dataset in ((bare, current), (current, bare)):
        maps = space_maps(teacher(saved), dataset)
        assert maps is None or all((affine.change() < 1e-3).all() for affine in (maps.state, maps.actions))
