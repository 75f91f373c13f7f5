"""What is stored for plain LeRobot: the number of steps, and the weight of real-time chunking, by hand and by LeRobot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import eval_flags, load_frames, make_batch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import RTCAttentionSchedule
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.storing import capped, rtc_note, write_num_steps

RTC = RTCConfig(enabled=True, max_guidance_weight=10.0, execution_horizon=10)


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


def prefix_error(policy: SmolVLAPolicy, batch: dict, guided: bool = True) -> float:
    """How far stock LeRobot's chunk is off an earlier one in its first two actions, the frozen ones."""
    config = policy.config
    before, noise = torch.randn(
        2, 4, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(0)
    )
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


@pytest.mark.parametrize(
    ("weight", "n", "expected"), [(10.0, 1, 1.0), (1.5, 1, 1.0), (1.0, 1, None), (0.5, 1, None), (10.0, 2, None)]
)
def test_capped(weight, n, expected):
    rtc = replace(RTC, max_guidance_weight=weight)
    assert capped(rtc, n) == expected
    assert capped(replace(rtc, enabled=False), n) is None
    assert capped(None, n) is None


def test_the_note():
    for recommended in (1, None):
        said = rtc_note(RTC, recommended)
        assert said.startswith(
            "Real-time chunking: the max_guidance_weight of 10 in config.json is too large for 1 step."
        )
        assert "9 times as far from the chunk before" in said
        assert said.endswith("--inference.rtc.max_guidance_weight=1. Two steps keep them with the weight as it is.")
    assert rtc_note(replace(RTC, max_guidance_weight=1.5), 1).endswith("--inference.rtc.max_guidance_weight=1.")
    assert rtc_note(RTC, 2) is None
    assert rtc_note(replace(RTC, max_guidance_weight=1.0), 1) is None
    assert rtc_note(None, 1) is None


@pytest.fixture
def copied(workshop, tmp_path) -> Path:
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "copied"))


def with_rtc(checkpoint: Path, rtc_config: dict | None) -> dict:
    """Give a checkpoint's config.json this rtc_config; returns all its fields."""
    path = checkpoint / "config.json"
    fields = {**json.loads(path.read_text()), "rtc_config": rtc_config}
    path.write_text(json.dumps(fields))
    return fields


SAVED = {"enabled": True, "prefix_attention_schedule": "EXP", "max_guidance_weight": 10.0, "execution_horizon": 4}


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


def test_plain_lerobot_keeps_the_prefix_with_what_is_stored(workshop, copied):
    """As stored before, one step throws it off."""
    dataset = DatasetConfig(REPO_ID, root=str(workshop / "dataset"))
    frames = next(load_frames(dataset, [3, 20, 30, 41], chunk_size=6, batch_size=4))

    def error() -> float:
        policy = SmolVLAPolicy.from_pretrained(copied).eval()
        preprocessor, _ = make_pre_post_processors(policy.config, str(copied))
        return prefix_error(policy, preprocessor({k: v for k, v in frames.items() if not k.startswith("action")}))

    fields = with_rtc(copied, SAVED)
    (copied / "config.json").write_text(json.dumps({**fields, "num_steps": 1}))
    assert error() > 5
    write_num_steps(copied, 1)
    assert error() < 1e-5


def test_a_file_that_cannot_be_written(copied):
    before = (copied / "config.json").read_bytes()
    (copied / "config.json.partial").mkdir()
    with pytest.raises(ReflowError, match=r"While writing .*config\.json: IsADirectoryError"):
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
