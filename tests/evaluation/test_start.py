"""The noise that a client starts from: zeros and one draw, on frames, in the simulator, and in the report's words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import driven_flags, eval_flags, eval_main, reflow_run, refused, write_smooth_workshop
from helpers import reflow_train_main as train_student
from lerobot.configs.default import EvalConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from oracle import Flow

from smolvla_reflow.demo.environment import DrivePastConfig
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.start import constant_noise, warning
from smolvla_reflow.evaluation.success import Episodes, Success

FRAMES = [0, 9, 19, 28, 38, 47]


@pytest.fixture(scope="module")
def smooth(workshop, tmp_path_factory) -> Path:
    return write_smooth_workshop(workshop, tmp_path_factory.mktemp("smooth"))


@pytest.fixture(scope="module")
def student(smooth, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("student") / "2rf"
    train_student(reflow_run(smooth, run, steps=6))
    return run / LAST


def noise_of(start: str, frames: int) -> torch.Tensor:
    """What a client passes in, written out."""
    if start == "zeros":
        return torch.zeros(frames, 6, 4)
    draw = np.random.RandomState(int(start)).randn(1, 6, 4).astype(np.float32)  # tether 0.12.0, smolvla_onnx_server.py
    return torch.tensor(draw).repeat(frames, 1, 1)


@pytest.mark.parametrize("start", ["zeros", "7"])
def test_flow_error_is_that_of_the_clients_noise(smooth, student, tmp_path, start):
    """Stock sampler given the noise, against the teacher's fine solution of the same noise by the oracle."""
    against = {"policy__path": student, "teacher_path": smooth / "1rf" / LAST, "noise": start}
    report = eval_main(eval_flags(smooth, tmp_path, **against))
    dataset = LeRobotDataset(REPO_ID, root=smooth / "dataset", delta_timestamps={"action": [i / 10 for i in range(6)]})
    raw = torch.utils.data.default_collate([dataset[i] for i in FRAMES])
    std, noise = dataset.meta.stats["action"]["std"], noise_of(start, len(FRAMES))

    def loaded(path: Path):
        policy = SmolVLAPolicy.from_pretrained(path).eval()
        before, after = make_pre_post_processors(policy.config, str(path))
        return policy, before(dict(raw)), lambda x: torch.stack([after(x[:, i]) for i in range(6)], dim=1).numpy()

    teacher, batch, in_units = loaded(smooth / "1rf" / LAST)
    with torch.no_grad():
        taught = in_units(Flow(teacher, batch).midpoint(noise, 200)[..., :2])
    policy, batch, in_units = loaded(student)
    name = {"zeros": "student from zeros", "7": "student from seed 7"}[start]
    for n in (1, 2, 10):
        policy.config.num_steps = n
        off = (in_units(policy.predict_action_chunk(batch, noise=noise)) - taught) / std
        (row,) = [row for row in report["rows"] if (row["policy"], row["num_steps"]) == (name, n)]
        assert row["flow_rmse"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-3)
        assert row["spread_ratio"] == pytest.approx(0, abs=1e-6)
        assert row["energy_distance"] is None
    assert {row["policy"] for row in report["rows"]} == {"teacher", "student", name}
    # One chunk for each frame is no distribution, so without a simulator nothing is recommended.
    assert report["recommended_num_steps"] is None
    assert "name a simulator" in report["recommendation"]
    assert json.loads((tmp_path / "report.json").read_text())["made_with"]["noise"] == start


@pytest.mark.parametrize("start", ["zeros", "7"])
def test_drives_are_the_stock_policys_given_that_noise(workshop, measured, start, monkeypatch):
    settings = EvalConfig(n_episodes=6, batch_size=6, use_async_envs=False)
    easy = DrivePastConfig(start_y=0.05, obstacle_y=0.3)
    found = drive(replace(measured, start=start), easy, settings, 1, seed=3)
    assert "sample_noise" not in vars(measured.policy.model)
    # Stock: every call of select_action is handed the noise.
    select = SmolVLAPolicy.select_action
    monkeypatch.setattr(
        SmolVLAPolicy, "select_action", lambda policy, batch: select(policy, batch, noise=noise_of(start, 6))
    )
    assert drive(measured, easy, settings, 1, seed=3) == found


def test_the_bar_starts_from_normal_noise(workshop, tmp_path):
    """The policy alone: its rows from zeros beside those of a report that was not asked."""
    plain = eval_main(driven_flags(workshop, tmp_path / "plain"))
    asked = eval_main(driven_flags(workshop, tmp_path / "asked", noise="zeros"))
    timed = ("latency_ms_p50", "latency_ms_p95", "speedup")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in each["rows"]] for each in (plain, asked)]
    assert rows[0] == rows[1][: len(rows[0])]
    assert {row["policy"] for row in rows[1][len(rows[0]) :]} == {"policy from zeros"}
    assert asked["decision"]["bar"] == ["policy", 10]
    assert asked["decision"]["policy"] == "policy from zeros"


def row(policy, num_steps, flow_rmse, rate=None, reward=0.0):
    episodes = None if rate is None else Episodes([k < rate for k in range(100)], [reward] * 100)
    success = None if episodes is None else Success.count({"task/0": episodes})
    return {"policy": policy, "num_steps": num_steps, "flow_rmse": flow_rmse, "success": success}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [row("s", 1, 0.1), row("s", 2, 0.1), row("z", 1, 0.16), row("z", 2, 0.14)],
            "at 1 step the flow error is 0.160",
        ),
        ([row("s", 1, 0.1, 94), row("z", 1, 0.9, 90)], None),  # the simulator knows better
        ([row("s", 1, 0.1, 94), row("z", 1, 0.1, 88)], "at 1 step success is 88.0% instead of 94.0%"),
        (
            [row("s", 2, 0.1, 10, 0.8), row("z", 2, 0.1, 10, 0.76)],
            "at 2 steps the best reward is 0.760 instead of 0.800",
        ),
    ],
)
def test_a_report_warns_of_numbers_of_steps_that_lose(rows, said):
    found = warning(rows, "z", "s", {"success": 0.05, "best_reward": 0.03})
    assert (found is None) == (said is None)
    assert said is None or (said in found and "2 steps the flow" not in found and "Do not run the z" in found)


def test_one_draw_is_the_same_for_every_chunk():
    noise = constant_noise("3", (5, 4, 2))
    assert noise.std() > 0.5
    assert torch.equal(noise, noise[:1].expand(5, 4, 2))
    assert torch.equal(noise[:2], constant_noise("3", (2, 4, 2)))


@pytest.mark.parametrize("value", ["zero", "-1", "1.5", "4294967296"])
def test_a_noise_that_is_none(workshop, tmp_path, capsys, value):
    said = refused(capsys, eval_main, eval_flags(workshop, tmp_path / "r", noise=value))
    assert f"--noise={value} is unknown" in said
