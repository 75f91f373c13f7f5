"""Real-time chunking at few steps: LeRobot's guidance by hand, what is measured of a policy, and what is stored."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ACTION_DIM, CHUNK, WIDTH, eval_flags, load_frames, make_batch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import FeatureType, PolicyFeature, RTCAttentionSchedule
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.policy import MeasuredPolicy, load_measured_policy
from smolvla_reflow.evaluation.real_time_chunking import (
    PrefixError,
    capped,
    chunking,
    is_enabled,
    measure_chunking,
    note,
)
from smolvla_reflow.evaluation.storing import write_num_steps
from smolvla_reflow.noise import pair_noise

RTC = RTCConfig(enabled=True, max_guidance_weight=10.0, execution_horizon=10)


@pytest.fixture(scope="module")
def frames(workshop):
    """A raw batch of three frames of the demo's dataset."""
    dataset = DatasetConfig(REPO_ID, root=str(workshop / "dataset"))
    return next(load_frames(dataset, [3, 20, 41], chunk_size=6, batch_size=3))


@pytest.fixture(scope="module")
def measured(workshop):
    return load_measured_policy("policy", open_checkpoint(str(workshop / "1rf" / LAST)), "cpu", {})


def bare(policy: SmolVLAPolicy) -> MeasuredPolicy:
    """A policy whose batches are preprocessed already."""
    return MeasuredPolicy("policy", policy, dict, lambda x: x, None, policy.config.num_steps)


def bare_batch(size: int = 4) -> dict:
    return {**make_batch(size), "index": torch.arange(size)}


# --- LeRobot's guidance, by hand ------------------------------------------------------------------------------


def by_hand(weight: float, n: int, share: float) -> float:
    """What n Euler steps of a straight flow leave of an error, guided by `share` of W.

    v = (x - a) / t does not depend on where guidance has moved x, so that each step leaves 1 - w W / n.
    """
    left = 1.0
    for k in range(n):
        t = 1 - k / n
        w = weight if k == 0 else min(weight, t / (1 - t) * (t**2 + (1 - t) ** 2) / t**2)
        left *= 1 - w * share / n
    return left


def guided_flow(weight: float, n: int) -> torch.Tensor:
    """What LeRobot's processor leaves of the errors of a chunk of 8, two frozen, then a linear W; v is constant."""
    processor = RTCProcessor(replace(RTC, max_guidance_weight=weight, execution_horizon=6))
    noise, slope, before = torch.randn(3, 1, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noise
    for k in range(n):
        v = processor.denoise_step(x, before, 2, 1 - k / n, lambda x: slope)
        x = x - v / n
    return ((x - before) / (noise - slope - before)).mean(dim=(0, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 5.0, 10.0])
def test_each_step_leaves_its_share_of_the_error(weight, n):
    shares = [1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0]
    expected = torch.tensor([by_hand(weight, n, share) for share in shares], dtype=torch.float64)
    torch.testing.assert_close(guided_flow(weight, n), expected, rtol=1e-5, atol=1e-6)


# --- what is measured -----------------------------------------------------------------------------------------


def test_the_errors_are_those_of_stock_lerobot(workshop, measured, frames):
    """Checkpoint, processors, guidance and sampler of LeRobot, and a root mean square written out."""
    path = workshop / "1rf" / LAST
    policy = SmolVLAPolicy.from_pretrained(path).eval()
    preprocessor, _ = make_pre_post_processors(policy.config, str(path))
    observation = preprocessor({k: v for k, v in frames.items() if not k.startswith("action")})
    first, second = (
        torch.stack([pair_noise(7, frame, k, (6, 4)) for frame in frames["index"].tolist()]) for k in (0, 1)
    )

    def rms(weight, n, noise=second, **given):
        policy.config.num_steps = n
        policy.config.rtc_config = None if weight is None else RTCConfig(enabled=True, max_guidance_weight=weight)
        policy.init_rtc_processor()
        return policy.predict_action_chunk(dict(observation), noise=noise, **given)

    found = measure_chunking(measured, RTC, frames, [2, 1, 3, 1], seed=7)
    assert [each.num_steps for each in found] == [1, 2, 3]
    for each in found:
        n = each.num_steps
        left_over = rms(None, n, first)[:, 1:]
        given = {"prev_chunk_left_over": left_over, "inference_delay": 1}
        chunks = rms(None, n), rms(10.0, n, **given), rms(1.0 if n == 1 else 10.0, n, **given)
        expected = [math.sqrt(((chunk[:, 0] - left_over[:, 0]) ** 2).mean().item()) for chunk in chunks]
        assert [each.unguided, each.guided, each.capped] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert each.max_guidance_weight == 10.0


def test_one_step_multiplies_the_error_and_two_land(measured, frames):
    """At one step a weight of 10 makes it worse than no guidance, nine times; what is stored instead does not."""
    one, two, three, ten = measure_chunking(measured, RTC, frames, [1, 2, 3, 10], seed=0)
    assert min(each.unguided for each in (one, two, three, ten)) > 0.1  # or there would be nothing to keep
    assert one.guided == pytest.approx(9 * one.unguided, rel=1e-4)
    assert one.capped < 1e-5
    assert two.capped == two.guided < 1e-5
    assert three.capped == three.guided < three.unguided / 4
    assert ten.capped == ten.guided < ten.unguided / 10


@pytest.mark.parametrize("schedule", RTCAttentionSchedule)
@pytest.mark.parametrize("weight", [0.5, 1.0, 1.5, 5.0, 10.0])
def test_at_one_step_any_network_leaves_one_minus_the_weight(policy, schedule, weight):
    rtc = RTCConfig(enabled=True, max_guidance_weight=weight, prefix_attention_schedule=schedule)
    (found,) = measure_chunking(bare(policy), rtc, bare_batch(), [1], seed=0)
    assert found.guided / found.unguided == pytest.approx(abs(1 - weight), abs=1e-4)
    assert found.capped / found.unguided == pytest.approx(1 - min(weight, 1), abs=1e-4)


@pytest.mark.parametrize(("chunk_size", "horizon", "frozen"), [(CHUNK, 10, 1), (30, 10, 3), (30, 2, 2), (1, 10, 1)])
def test_how_many_actions_are_frozen(make_policy, monkeypatch, chunk_size, horizon, frozen):
    policy = make_policy(chunk_size=chunk_size, n_action_steps=chunk_size)
    calls, predict = [], policy.predict_action_chunk

    def spy(batch, noise, **given):
        calls.append(given)
        return predict(batch, noise, **given)

    monkeypatch.setattr(policy, "predict_action_chunk", spy)
    (found,) = measure_chunking(bare(policy), replace(RTC, execution_horizon=horizon), bare_batch(), [1], seed=0)
    guided = [given for given in calls if given]
    assert [given["inference_delay"] for given in guided] == [frozen, frozen]
    run = 0 if chunk_size == 1 else frozen
    assert guided[0]["prev_chunk_left_over"].shape == (4, chunk_size - run, ACTION_DIM)
    assert found.guided == pytest.approx(9 * found.unguided, rel=1e-3)


def test_aloha_sees_the_same_state_in_every_chunk(make_policy):
    """LeRobot converts it in place."""
    arms = {"observation.state": PolicyFeature(FeatureType.STATE, (14,))}
    camera = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
    policy = make_policy(
        adapt_to_pi_aloha=True,
        input_features={**arms, **camera},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
        max_state_dim=16,
        max_action_dim=16,
    )
    state = torch.rand(4, 14)
    batch = {**bare_batch(), "observation.state": state.clone()}
    measure_chunking(bare(policy), RTC, batch, [1], seed=0)
    assert torch.equal(batch["observation.state"], state)


def test_the_policy_is_what_it_was(policy):
    before = dict(vars(policy)), dict(vars(policy.model)), dict(vars(policy.config))
    measure_chunking(bare(policy), RTC, bare_batch(), [1, 3], seed=0)
    with chunking(policy, RTC):
        assert policy.config.rtc_config is RTC
        assert policy.rtc_processor is policy.model.rtc_processor is not None
        assert policy.rtc_processor.rtc_config is RTC
    with pytest.raises(ZeroDivisionError), chunking(policy, RTC):
        raise ZeroDivisionError
    for module, known in zip((policy, policy.model, policy.config), before, strict=True):
        after = {k: v for k, v in vars(module).items() if k != "_queues"}  # LeRobot's, of the latest observation
        assert after == {k: v for k, v in known.items() if k != "_queues"}
    chunk = policy.predict_action_chunk(make_batch(4), noise=torch.zeros(4, CHUNK, WIDTH))
    assert chunk.shape == (4, CHUNK, ACTION_DIM)


# --- what is said and stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "n", "expected"), [(10.0, 1, 1.0), (1.5, 1, 1.0), (0.5, 1, 0.5), (10.0, 2, 10.0), (10.0, 10, 10.0)]
)
def test_capped(weight, n, expected):
    assert capped(replace(RTC, max_guidance_weight=weight), n) == expected


def test_is_enabled():
    assert is_enabled(RTC)
    assert not is_enabled(replace(RTC, enabled=False))
    assert not is_enabled(None)


def test_the_note():
    found = [PrefixError(1, 10.0, 0.5, 4.5, 0.01), PrefixError(2, 10.0, 0.52, 0.02, 0.02)]
    measured = (
        "Real-time chunking: with the max_guidance_weight of 10 in config.json, the actions that run while a chunk is "
        "made are off the chunk before by 4.50 / 0.02 (root mean square, normalised) at 1 / 2 steps, without guidance "
        "by 0.50 / 0.52."
    )
    assert note(found, num_steps=2) == measured
    for recommended in (1, None):
        said = note(found, recommended)
        assert said.startswith(measured)
        assert "At 1 step a weight above 1 goes past them; capped at 1" in said
        assert "it leaves 0.01." in said
        assert "needs --inference.rtc.max_guidance_weight=1. Two steps keep them" in said
    assert note([PrefixError(1, 1.5, 0.5, 0.25, 0.01)], 1).endswith("--inference.rtc.max_guidance_weight=1.")
    assert "goes past" not in note([PrefixError(1, 1.0, 0.5, 0.01, 0.01)], 1)
    assert "goes past" not in note(found[1:])


@pytest.fixture
def copied(workshop, tmp_path) -> Path:
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "copied"))


def with_rtc(checkpoint: Path, rtc_config: dict | None) -> dict:
    """Give a checkpoint's config.json this rtc_config; returns all its fields."""
    path = checkpoint / "config.json"
    fields = {**json.loads(path.read_text()), "rtc_config": rtc_config}
    path.write_text(json.dumps(fields))
    return fields


SAVED = {
    "enabled": True,
    "prefix_attention_schedule": "EXP",
    "max_guidance_weight": 10.0,
    "execution_horizon": 4,
    "debug": False,
    "debug_maxlen": 100,
}


@pytest.mark.parametrize(
    ("rtc_config", "num_steps", "stored"),
    [
        (SAVED, 1, {**SAVED, "max_guidance_weight": 1.0}),
        (SAVED, 2, SAVED),
        ({"enabled": True}, 1, {"enabled": True, "max_guidance_weight": 1.0}),
        ({**SAVED, "max_guidance_weight": 0.5}, 1, {**SAVED, "max_guidance_weight": 0.5}),
        ({**SAVED, "enabled": False}, 1, {**SAVED, "enabled": False}),
        (None, 1, None),
    ],
)
def test_stored_beside_the_number_of_steps_and_plain_lerobot_loads_it(copied, rtc_config, num_steps, stored):
    before = with_rtc(copied, rtc_config)
    assert write_num_steps(copied, num_steps) == copied / "config.json"
    after = json.loads((copied / "config.json").read_text())
    assert after == {**before, "num_steps": num_steps, "rtc_config": stored}
    assert list(after) == list(before)
    assert not list(copied.glob("*.partial"))
    policy = SmolVLAPolicy.from_pretrained(copied)
    assert policy.config.num_steps == num_steps
    loaded = policy.config.rtc_config
    if stored is None:
        assert loaded is None
    else:
        assert loaded.max_guidance_weight == stored["max_guidance_weight"]
        assert loaded.enabled == stored["enabled"]


def test_plain_lerobot_keeps_the_prefix_with_what_is_stored(copied, frames):
    """As stored before, one step throws it off."""

    def error() -> float:
        policy = SmolVLAPolicy.from_pretrained(copied).eval()
        preprocessor, _ = make_pre_post_processors(policy.config, str(copied))
        observation = preprocessor({k: v for k, v in frames.items() if not k.startswith("action")})
        before, noise = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
        given = {"prev_chunk_left_over": before[:, :5, :2], "inference_delay": 2}
        chunk = policy.predict_action_chunk(dict(observation), noise=noise, **given)
        return (chunk[:, :2] - before[:, :2, :2]).square().mean().sqrt().item()

    fields = with_rtc(copied, SAVED)
    (copied / "config.json").write_text(json.dumps({**fields, "num_steps": 1}))
    assert error() > 5
    write_num_steps(copied, 1)
    assert error() < 1e-5


def test_a_file_that_cannot_be_written(copied):
    before = (copied / "config.json").read_bytes()
    (copied / "config.json.partial").mkdir()
    with pytest.raises(ReflowError, match=r"config\.json cannot be written"):
        write_num_steps(copied, 1)
    assert (copied / "config.json").read_bytes() == before


def test_the_command_says_it_and_stores_it(workshop, copied, tmp_path, capsys):
    with_rtc(copied, SAVED)
    flags = eval_flags(workshop, tmp_path / "r", policy__path=copied, num_steps="[1]", num_frames=2, energy_margin=100)
    eval_command.main([*flags, "--write_num_steps"])
    (said,) = json.loads((tmp_path / "r" / "report.json").read_text())["notes"]
    assert said.startswith("Real-time chunking")
    assert said in capsys.readouterr().out
    stored = json.loads((copied / "config.json").read_text())
    assert (stored["num_steps"], stored["rtc_config"]["max_guidance_weight"]) == (1, 1.0)


def test_a_checkpoint_without_it_is_not_measured_so(workshop, tmp_path):
    eval_command.main(eval_flags(workshop, tmp_path / "r", num_steps="[1]", num_frames=2))
    assert json.loads((tmp_path / "r" / "report.json").read_text())["notes"] == []
