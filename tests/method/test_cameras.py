"""The teacher sees a batch as stock inference of its own checkpoint would: its cameras, in its order, its empty ones."""

import pytest
import torch
from helpers import ACTION_DIM, CHUNK, STATE_DIM, WIDTH, attach_plain, make_batch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.processor import TransitionKey
from lerobot.processor.converters import batch_to_transition

from smolvla_reflow import ReflowError, Solver, attach
from smolvla_reflow.checkpoint.read import PREPROCESSOR_NAME, Checkpoint
from smolvla_reflow.smolvla.features import check_students_cameras, fitted
from smolvla_reflow.smolvla.observation import observe, recorded_actions
from smolvla_reflow.teacher import FrozenTeacher

TOP, WRIST, SIDE = (f"observation.images.{name}" for name in ("top", "wrist", "side"))


def inputs(*cameras):
    return {
        "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        **{name: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in cameras},
    }


@pytest.fixture
def batch_of():
    """A batch with these cameras, each with images of its own."""

    def make(*cameras):
        batch = make_batch(3)
        top = batch.pop(TOP)
        pictures = {TOP: top, WRIST: top.flip(-1), SIDE: top.flip(-2)}
        return {**batch, **{name: pictures[name] for name in cameras}}

    return make


@pytest.fixture
def two(make_policy):
    """A teacher with other cameras in its config than its student: the same weights, other features."""

    def build(cameras, empty):
        policy = make_policy(seed=0, input_features=inputs(*cameras), empty_cameras=empty)
        policy.config.validate_features()
        return policy

    return lambda teachers, students, empty=(0, 0): (build(teachers, empty[0]), build(students, empty[1]))


def prepared(policy, batch):
    return observe(policy, batch), recorded_actions(policy, batch)


def step_of(attachment, student, batch, noise=None):
    return attachment.step(*prepared(student, batch), noise=noise, time=None, batch=batch, strategy="reflow")


CASES = {  # cameras of the teacher, of the student, of the batch; empty ones of teacher and student
    "another order": ((TOP, WRIST), (WRIST, TOP), (TOP, WRIST), (0, 0)),
    "one that was never there": ((SIDE, TOP, WRIST), (TOP, WRIST), (WRIST, TOP), (0, 0)),
    "one that the student leaves out": ((TOP, WRIST), (TOP,), (TOP, WRIST), (0, 0)),
    "an empty one": ((TOP,), (TOP,), (TOP,), (1, 0)),
    "an empty one of the student": ((TOP, WRIST), (TOP, SIDE), (TOP,), (0, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_couplings_are_those_of_stock_inference(two, batch_of, case):
    teachers, students, there, empty = CASES[case]
    teacher, student = two(teachers, students, empty)
    batch, noise = batch_of(*there), torch.randn(3, CHUNK, WIDTH)
    without_actions = {name: value for name, value in batch.items() if not name.startswith("action")}
    expected, seen_by_student = (p.predict_action_chunk(dict(without_actions), noise=noise) for p in (teacher, student))
    if case in ("another order", "one that the student leaves out"):
        assert (expected - seen_by_student).abs().max() > 1e-4  # so that giving it the student's images would show

    step = step_of(attach(student, teacher, solver="euler"), student, batch, noise)
    torch.testing.assert_close(step.coupling().actions[..., :ACTION_DIM], expected, rtol=1e-5, atol=1e-6)


def test_the_forward_pass_uses_them(two, batch_of):
    """The loss of a reflow pass, against stock's loss on the couplings of the teacher's own stock inference."""
    teacher, student = two((TOP, WRIST), (WRIST, TOP))
    batch, noise, time = batch_of(TOP, WRIST), torch.randn(3, CHUNK, WIDTH), torch.rand(3)
    full = teacher.model.sample_actions(*observe(teacher, batch), noise=noise)
    expected = student.model.forward(*observe(student, batch), full, noise, time).mean()
    attach_plain(student, teacher, solver="euler")
    loss, _ = student.train().forward(batch, noise=noise, time=time)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("students", "alike"), [((TOP, WRIST), True), ((WRIST, TOP), False), ((TOP,), False)])
def test_the_log_says_how_often_the_prefix_is_encoded(two, caplog, students, alike):
    teacher, student = two((TOP, WRIST), students)
    with caplog.at_level("INFO"), attach(student, teacher):
        assert ("encoded once for teacher and student, and" in caplog.text) is alike
        assert ("(for each of them if they see other images, or in another order)" in caplog.text) is not alike


def test_images_without_names_do_only_where_the_cameras_agree(two, batch_of):
    teacher, student = two((TOP, WRIST), (WRIST, TOP))
    observation, actions = prepared(student, batch_of(TOP, WRIST))
    attach(student, teacher)
    with pytest.raises(ReflowError, match="list different cameras.*policy.forward"):
        student.model.generate_reflow_target(*observation)
    with pytest.raises(ReflowError, match="list different cameras"):
        student.train().model.forward(*observation, actions)


def test_images_are_encoded_once_where_the_cameras_agree(two, batch_of):
    teacher, student = two((SIDE, TOP), (TOP,))
    assert step_of(attach(student, teacher), student, batch_of(TOP)).teachers_observation is None


def test_a_batch_with_the_datasets_own_names_is_renamed_for_the_teacher(two, batch_of):
    """`--policy.input_features=null` gives the student those, and the teacher knows them by its saved rename map."""
    teacher, student = two((TOP, WRIST), (SIDE,))
    teacher.requires_grad_(False)
    noise, batch = torch.randn(3, CHUNK, WIDTH), batch_of(SIDE)
    expected = teacher.model.sample_actions(*observe(teacher, {**batch, TOP: batch[SIDE]}), noise=noise)
    source = FrozenTeacher(teacher, Solver("euler"), rename_map={SIDE: TOP})
    observation = source.observe(batch, student, observe(student, batch))
    assert torch.equal(source(observation, frames=None, noise=noise, per_frame=1).actions, expected)

    swapped = FrozenTeacher(teacher, Solver("euler"), rename_map={TOP: WRIST, WRIST: TOP})
    batch = batch_of(TOP, WRIST)  # in the teacher's names already
    seen = observe(teacher, batch)
    assert swapped.observe(batch, teacher, seen) is seen


def test_a_camera_that_lerobot_drops_is_named(make_config, batch_of, tmp_path, caplog):
    """Its name lacks the prefix. Dropped silently, it would leave a policy of two cameras with one."""
    batch = batch_of(TOP)
    assert "front" not in batch_to_transition({**batch, "front": batch[TOP]})[TransitionKey.OBSERVATION]

    def fit(*cameras):
        features = {**inputs(*cameras), "action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))}
        config = make_config(input_features=inputs(*cameras))
        check_students_cameras(config, features, {})
        fitted(Checkpoint("T", tmp_path, config, processors={PREPROCESSOR_NAME: []}), features, {})

    fit(TOP, WRIST)
    assert not caplog.records
    fit(TOP, "front")
    assert "LeRobot drops front of the dataset" in caplog.text
    with pytest.raises(ReflowError, match="student has the cameras front, and the batches have no such names"):
        fit("front")
