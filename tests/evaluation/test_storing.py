"""What is stored for plain LeRobot: the number of steps, and the weight of real-time chunking, by hand and by LeRobot."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import change_config, eval_flags, eval_main, load_frames, make_batch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import RTCAttentionSchedule
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.checkpoint.read import read_config
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.storing import rtc_note, write_num_steps

RTC = RTCConfig(enabled=True, max_guidance_weight=10.0, execution_horizon=10)


def by_hand(weight: float, n: int, share: float) -> list[float]:
    """What each of n Euler steps of a straight flow leaves of an error, guided by `share` of W.

    v = (x - a) / t does not depend on where guidance has moved x, so that each step leaves 1 - w W / n.
    """
    times = [1 - k / n for k in range(n)]
    ws = [weight, *(min(weight, t / (1 - t) * (t**2 + (1 - t) ** 2) / t**2) for t in times[1:])]
    return [1 - w * share / n for w in ws]


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
    expected = torch.tensor([math.prod(by_hand(weight, n, share)) for share in shares], dtype=torch.float64)
    torch.testing.assert_close(guided_flow(weight, n), expected, rtol=1e-5, atol=1e-6)


def prefix_error(policy: SmolVLAPolicy, batch: dict, guided: bool = True) -> float:
    """How far stock LeRobot's chunk is off an earlier one in its first two actions, the frozen ones."""
    config = policy.config
    generator = torch.Generator().manual_seed(0)
    before, noise = torch.randn(2, 4, config.chunk_size, config.max_action_dim, generator=generator)
    left_over = before[..., : config.action_feature.shape[0]]
    given = {"prev_chunk_left_over": left_over, "inference_delay": 2} if guided else {}
    chunk = policy.predict_action_chunk(dict(batch), noise=noise, **given)
    return (chunk[:, :2] - left_over[:, :2]).square().mean().sqrt().item()


@pytest.mark.parametrize("schedule", RTCAttentionSchedule)
@pytest.mark.parametrize("weight", [0.5, 1.0, 1.5, 5.0, 10.0])
def test_at_one_step_any_network_leaves_one_minus_the_weight(policy, schedule, weight):
    """Nine times the error without guidance for a weight of 10, none for 1."""
    policy.config.num_steps = 1
    unguided = prefix_error(policy, make_batch(4), guided=False)
    policy.config.rtc_config = replace(RTC, max_guidance_weight=weight, prefix_attention_schedule=schedule)
    policy.init_rtc_processor()
    assert prefix_error(policy, make_batch(4)) / unguided == pytest.approx(abs(1 - weight), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_weight_to_store_never_goes_past_the_chunk_before_and_keeps_the_prefix(n):
    """No step leaves a negative share of an error, and with a larger weight the first step does."""
    assert min(by_hand(n, n, 1.0)) > -1e-12
    assert by_hand(1.1 * n, n, 1.0)[0] < 0
    assert guided_flow(float(n), n)[:2].abs().max() < 1e-6


def test_the_note():
    said = rtc_note(RTC, 2)
    assert "Real-time chunking: a max_guidance_weight of 10 in config.json is too large for num_steps=2." in said
    assert said.endswith("--inference.rtc.max_guidance_weight=2.")
    assert rtc_note(replace(RTC, max_guidance_weight=1.5), 1).endswith("--inference.rtc.max_guidance_weight=1.")
    assert rtc_note(RTC, None) is None
    assert rtc_note(RTC, 10) is None


SAVED = {"enabled": True, "prefix_attention_schedule": "EXP", "max_guidance_weight": 10.0, "execution_horizon": 4}


@pytest.mark.parametrize(
    ("rtc_config", "num_steps", "stored"),
    [
        (SAVED, 1, {**SAVED, "max_guidance_weight": 1.0}),
        (SAVED, 2, {**SAVED, "max_guidance_weight": 2.0}),
        ({**SAVED, "max_guidance_weight": 1.5}, 2, {**SAVED, "max_guidance_weight": 1.5}),
        (SAVED, 10, SAVED),
        ({"enabled": True}, 1, {"enabled": True, "max_guidance_weight": 1.0}),
        ({**SAVED, "max_guidance_weight": 1.5}, 1, {**SAVED, "max_guidance_weight": 1.0}),
        ({**SAVED, "max_guidance_weight": 1.0}, 1, {**SAVED, "max_guidance_weight": 1.0}),
        ({**SAVED, "max_guidance_weight": 0.5}, 1, {**SAVED, "max_guidance_weight": 0.5}),
        ({**SAVED, "enabled": False}, 1, {**SAVED, "enabled": False}),
        (None, 1, None),
    ],
)
def test_noted_and_stored_beside_the_number_of_steps_and_plain_lerobot_loads_it(
    checkpoint, rtc_config, num_steps, stored
):
    before = change_config(checkpoint, rtc_config=rtc_config)
    note = rtc_note(read_config(checkpoint).rtc_config, num_steps)
    assert (note is not None) == (rtc_config != stored)
    assert write_num_steps(checkpoint, num_steps) == checkpoint / "config.json"
    after = json.loads((checkpoint / "config.json").read_text())
    assert after == {**before, "num_steps": num_steps, "rtc_config": stored}
    assert list(after) == list(before)
    assert not list(checkpoint.glob("*.partial"))
    config = SmolVLAPolicy.from_pretrained(checkpoint).config
    assert config.num_steps == num_steps
    loaded = config.rtc_config and (config.rtc_config.max_guidance_weight, config.rtc_config.enabled)
    assert loaded == (stored and (stored["max_guidance_weight"], stored["enabled"]))


def test_plain_lerobot_keeps_the_prefix_with_what_is_stored(workshop, checkpoint):
    """As stored before, one step throws it off."""
    dataset = DatasetConfig(REPO_ID, root=str(workshop / "dataset"))
    frames = next(load_frames(dataset, [3, 20, 30, 41], chunk_size=6, batch_size=4))

    def error() -> float:
        policy = SmolVLAPolicy.from_pretrained(checkpoint).eval()
        preprocessor, _ = make_pre_post_processors(policy.config, str(checkpoint))
        return prefix_error(policy, preprocessor({k: v for k, v in frames.items() if not k.startswith("action")}))

    change_config(checkpoint, rtc_config=SAVED, num_steps=1)
    assert error() > 5
    write_num_steps(checkpoint, 1)
    assert error() < 1e-5


@pytest.mark.parametrize(("weight", "stored"), [(1.0, 3.0), (0.5, 0.5), (2.0, 2.0)])
def test_a_weight_that_was_stored_with_fewer_steps_follows_them(checkpoint, weight, stored):
    change_config(checkpoint, rtc_config={**SAVED, "max_guidance_weight": weight}, num_steps=1)
    write_num_steps(checkpoint, 3)
    assert read_config(checkpoint).rtc_config.max_guidance_weight == stored


def test_a_file_that_cannot_be_written(checkpoint):
    before = (checkpoint / "config.json").read_bytes()
    (checkpoint / "config.json.partial").mkdir()
    with pytest.raises(ReflowError, match=r"While writing .*config\.json: IsADirectoryError"):
        write_num_steps(checkpoint, 1)
    assert (checkpoint / "config.json").read_bytes() == before


def test_the_command_says_it_and_stores_it(workshop, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("smolvla_reflow.evaluation.decision.FEWEST_FRAMES", 2)
    monkeypatch.setattr("smolvla_reflow.evaluation.decision.FEWEST_EPISODES", 2)
    change_config(checkpoint, rtc_config=SAVED)
    changes = {"policy__path": checkpoint, "num_steps": "[1]", "num_frames": 8, "energy_margin": 100}
    (said,) = eval_main([*eval_flags(workshop, tmp_path / "r", **changes), "--write_num_steps"])["notes"]
    assert said.startswith("Real-time chunking")
    assert said in capsys.readouterr().out
    stored = json.loads((checkpoint / "config.json").read_text())
    assert (stored["num_steps"], stored["rtc_config"]["max_guidance_weight"]) == (1, 1.0)
