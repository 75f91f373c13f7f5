"""A teacher and a dataset with different statistics: the same couplings in robot units, in every mode."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ACTION_DIM, STATE_DIM
from lerobot.configs.types import NormalizationMode
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

from smolvla_reflow import ReflowError, attach, register_loss_strategy
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.smolvla.normalization import space_maps
from smolvla_reflow.smolvla.observation import observe

RAW_STATE = torch.randn(4, STATE_DIM, generator=torch.Generator().manual_seed(7))
WIDTHS = {"action": ACTION_DIM, "observation.state": STATE_DIM}
MEAN_STD = NormalizationMode.MEAN_STD
IN_USE = {  # by LeRobot's normaliser
    MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.IDENTITY: (),
}


def draw_stats(seed=0, scale=1.0):
    """Statistics as LeRobot's metadata holds them; lower ones below higher ones."""
    rng = np.random.default_rng(seed)
    stats = {}
    for feature, width in WIDTHS.items():
        low, high = np.sort(rng.uniform(-3, 3, (2, width)), axis=0) + np.array([[0.0], [1.0]])
        inner = {"q01": low + 0.01, "q10": low + 0.1, "q90": high - 0.1, "q99": high - 0.01}
        stats[feature] = {"mean": low, "std": high - low, "min": low, "max": high, **inner}
    return {f: {name: scale * value for name, value in of.items()} for f, of in stats.items()}


def numbers(stats, feature, mode):
    """(a, b) such that `normalised = (x - a) / b`, written out from the definition of each mode."""
    low, high = (torch.as_tensor(stats[feature][name], dtype=torch.float32) for name in IN_USE[mode])
    return (low, high) if mode is MEAN_STD else ((low + high) / 2, (high - low) / 2)


def mapping(mode):
    return {"STATE": mode, "ACTION": mode, "VISUAL": NormalizationMode.IDENTITY}


@pytest.fixture
def save_teacher(make_policy, teacher, tmp_path):
    """A checkpoint with the weights of `teacher`, normalised in one mode by these statistics."""

    def save(mode, stats):
        policy = make_policy(normalization_mapping=mapping(mode))
        policy.load_state_dict(teacher.state_dict())
        policy.save_pretrained(tmp_path / "teacher")
        preprocessor, _ = make_smolvla_pre_post_processors(policy.config, stats)
        preprocessor.save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return save


def couplings_in_robot_units(policy, batch, stats, mode, noise):
    """What an attached policy, trained in the space of `stats`, is taught for a state of the robot."""
    a, b = numbers(stats, "observation.state", mode)
    batch = {**batch, "observation.state": (RAW_STATE - a) / b}
    coupling = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise)
    assert torch.equal(coupling.noise, noise)
    a, b = numbers(stats, "action", mode)
    return coupling.actions[..., :ACTION_DIM] * b + a, coupling.actions[..., ACTION_DIM:]


@pytest.mark.parametrize("mode", [mode for mode in IN_USE if IN_USE[mode]])
@pytest.mark.parametrize("other", [draw_stats(scale=1.1), draw_stats(seed=1)], ids=["10 %", "another dataset"])
def test_couplings_do_not_depend_on_the_dataset(make_policy, save_teacher, batch, noise, caplog, mode, other):
    own, results = draw_stats(), {}
    folder = save_teacher(mode, own)
    for name, stats in (("own", own), ("other", other)):
        policy = make_policy(seed=0, normalization_mapping=mapping(mode))
        with caplog.at_level("INFO"), attach(policy, folder, dataset_stats=stats) as attachment:
            assert (attachment.source.space is None) is (name == "own")
            results[name] = couplings_in_robot_units(policy, batch, stats, mode, noise)
    torch.testing.assert_close(results["other"], results["own"], rtol=1e-4, atol=1e-4)  # padded ones: as they are
    (line,) = [record.message for record in caplog.records if "statistics" in record.message]
    assert "most in '" in line


def test_ignoring_the_difference_would_be_seen(policy, save_teacher, batch, noise):
    """The test above can fail: without the map the couplings are off by far more than its tolerance."""
    own, other = draw_stats(), draw_stats(scale=1.1)
    with attach(policy, save_teacher(MEAN_STD, own)):
        right = couplings_in_robot_units(policy, batch, own, MEAN_STD, noise)[0]
        wrong = couplings_in_robot_units(policy, batch, other, MEAN_STD, noise)[0]
    assert (right - wrong).abs().max() > 0.1


def test_the_teacher_is_asked_as_plain_lerobot_would_ask_it(policy, save_teacher, batch, noise):
    """Stock preprocessor, stock sampler, stock postprocessor of the teacher's checkpoint as the oracle."""
    own, other = draw_stats(), draw_stats(seed=1)
    folder = save_teacher(MEAN_STD, own)
    stock = type(policy).from_pretrained(folder)
    preprocessor, postprocessor = make_smolvla_pre_post_processors(stock.config, own)
    normalised = preprocessor({"observation.state": RAW_STATE, "task": ["x"] * 4})["observation.state"]
    chunk = stock.predict_action_chunk({**batch, "observation.state": normalised}, noise=noise)
    expected = torch.stack([postprocessor(chunk[:, i]) for i in range(chunk.shape[1])], dim=1)

    attach(policy, folder, solver="euler", dataset_stats=other)
    actions, _ = couplings_in_robot_units(policy, batch, other, MEAN_STD, noise)
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", list(IN_USE))
def test_exactly_the_statistics_in_use_matter(make_config, mode):
    own, unused = draw_stats(), {"mean": [None, "a"], "std": [[1.0], [1.0, 2.0]]}
    teacher = fake_checkpoint(make_config, own, mode)
    assert space_maps(teacher, {**own, "observation.tactile": unused}) is None  # rounding to float32 is no difference
    for feature in own:
        for name in own[feature]:
            other = {**own, feature: {**own[feature], name: own[feature][name] + 0.1}}
            assert (space_maps(teacher, other) is None) is (name not in IN_USE[mode])


def fake_checkpoint(make_config, stats, mode=MEAN_STD, **overrides):
    flat = {
        f"{feature}.{name}": torch.as_tensor(value, dtype=torch.float32)
        for feature, of in stats.items()
        for name, value in of.items()
    }
    config = make_config(normalization_mapping=mapping(mode), **overrides)
    return SimpleNamespace(source="T", config=config, statistics=lambda: flat)


def test_a_dimension_that_never_moves_in_either_is_left_alone(make_config):
    own, other = draw_stats(), draw_stats(scale=1.1)
    for of in (own["action"], own["observation.state"], other["action"], other["observation.state"]):
        of["std"][0], of["mean"][0] = 0.0, 5.0
    change = space_maps(fake_checkpoint(make_config, own), other)
    for affine in (change.state, change.actions):
        assert (affine.scale[0], affine.shift[0]) == (1.0, 0.0)
        assert affine.scale[1] != 1.0


@pytest.mark.parametrize("moves_by", [0.0, 1e-4])
@pytest.mark.parametrize(("feature", "side"), [("action", "dataset"), ("observation.state", "teacher")])
def test_a_dimension_that_moves_in_one_alone_is_refused(make_config, feature, side, moves_by):
    own, other = draw_stats(), draw_stats()
    {"dataset": other, "teacher": own}[side][feature]["std"][1] = moves_by
    with pytest.raises(ReflowError, match=f"'{feature}' dimension 1 is .nearly. constant in one"):
        space_maps(fake_checkpoint(make_config, own), other)


def test_what_lacks_statistics_is_refused(make_config):
    own = draw_stats()
    teacher, without = (fake_checkpoint(make_config, of) for of in (own, {"action": own["action"]}))
    renamed = {"action": own["action"], "observation.joints": own["observation.state"]}
    wide = {**own, "action": {name: np.append(v, 1.0) for name, v in own["action"].items()}}
    for checkpoint, dataset, message in (
        (teacher, renamed, "The dataset has no statistics 'observation.state.mean'.*converted"),
        (teacher, wide, "'action' has 3 dimensions in the dataset and 2 in the .* teacher T"),
        (without, own, "The checkpoint T has no saved statistics 'observation.state.mean'"),
    ):
        with pytest.raises(ReflowError, match=message):
            space_maps(checkpoint, dataset)


def test_images_are_not_mapped(make_config):
    camera, std = "observation.images.top", np.full((3, 1, 1), 0.2)
    own, other = ({**draw_stats(), camera: {"mean": np.full((3, 1, 1), x), "std": std}} for x in (0.5, 0.4))
    teacher = fake_checkpoint(make_config, own)
    assert space_maps(teacher, other) is None  # nor normalised, in the stock configuration
    teacher.config.normalization_mapping["VISUAL"] = MEAN_STD
    assert space_maps(teacher, own) is None
    for stats in (other, draw_stats()):
        with pytest.raises(ReflowError, match=r"images were normalised by other statistics: '.*top.mean'"):
            space_maps(teacher, stats)


def test_a_bent_space_is_not_mapped(make_config):
    """adapt_to_pi_aloha transforms normalised values in ways that are not affine."""
    teacher = fake_checkpoint(make_config, draw_stats(), adapt_to_pi_aloha=True)
    assert space_maps(teacher, draw_stats()) is None
    with pytest.raises(ReflowError, match="adapt_to_pi_aloha=true bends"):
        space_maps(teacher, draw_stats(scale=1.1))


def test_statistics_need_a_teacher_that_saved_its_own(policy, teacher, save_teacher):
    with pytest.raises(ReflowError, match="dataset_stats needs a teacher given as a checkpoint"):
        attach(policy, teacher, dataset_stats=draw_stats())
    folder = save_teacher(MEAN_STD, draw_stats())
    assert attach(policy, open_checkpoint(folder), dataset_stats=draw_stats()).source.space is None


def test_a_velocity_of_another_space_is_refused(policy, save_teacher, batch, registry):
    """Couplings are mapped, a velocity at some x of the student's space is not."""
    folder = save_teacher(MEAN_STD, draw_stats())

    @register_loss_strategy("asking")
    def asking(step):
        coupling = step.coupling()
        step.teacher_velocity(coupling.noise, torch.ones(4))
        return step.losses(coupling)

    with attach(policy, folder, strategy="asking", dataset_stats=draw_stats()):
        policy.train().forward(dict(batch))
    attach(policy, folder, strategy="asking", dataset_stats=draw_stats(scale=1.1))
    with pytest.raises(ReflowError, match="velocity is defined in its own normalised space, which is not that of"):
        policy.train().forward(dict(batch))
