"""The demo: its task is solvable and two-way, its parts work, and the whole runs from one command."""

import json

import numpy as np
import pytest
from helpers import refused
from PIL import Image

from smolvla_reflow import ReflowError
from smolvla_reflow.commands import demo
from smolvla_reflow.demo import run as demo_run
from smolvla_reflow.demo import task
from smolvla_reflow.demo.environment import DrivePast
from smolvla_reflow.demo.flags import evaluation_flags, one_rectified_flow_flags, reflow_flags


def follow(scene: task.Scene, waypoints) -> tuple[list[np.ndarray], dict]:
    """Follow waypoints in the environment; the positions on the way and the last info."""
    env = DrivePast(scene.start_y, scene.obstacle_y)
    observation, info = env.reset()
    path = [observation["agent_pos"]]
    for waypoint in waypoints:
        observation, reward, terminated, truncated, info = env.step(waypoint.astype(np.float32))
        path.append(observation["agent_pos"])
        assert reward == info["is_success"]
        assert not truncated
        if terminated:
            return path, info
    return path, info


def test_experts_get_past_on_either_side_and_their_average_hits_the_obstacle():
    for scene in task.draw_scenes(100, seed=3):
        ways = {side: task.expert_path(scene, side) for side in (-1, 1)}
        for side, way in ways.items():
            path, info = follow(scene, way[1:])
            assert info["is_success"]
            assert np.sign(path[3][1] - scene.obstacle_y) == side
        path, info = follow(scene, sum(ways.values())[1:] / 2)
        assert not info["is_success"]
        assert len(path) < 5  # it ended at the obstacle


def test_a_step_ends_where_it_may_and_sees_what_lies_on_it():
    far = task.move(np.zeros(2), np.array([3.0, 4.0]), obstacle_y=5.0)
    np.testing.assert_allclose(far.position, [task.MAX_STEP * 0.6, task.MAX_STEP * 0.8])
    assert not far.hit
    # The obstacle's nearest point to this step is inside it, its ends are both outside.
    through = task.move(np.array([0.3, 0.0]), np.array([0.6, 0.0]), obstacle_y=task.OBSTACLE_RADIUS - 0.01)
    assert through.hit
    assert not task.move(np.array([0.3, 0.0]), np.array([0.6, 0.0]), obstacle_y=task.OBSTACLE_RADIUS + 0.01).hit
    # It is a segment, not a line: what lies ahead of its end is not hit.
    assert not task.move(np.array([0.0, 0.0]), np.array([0.3, 0.0]), obstacle_y=0.0).hit


def test_standing_still_and_leaving_sideways_are_no_success():
    scene = task.Scene(0.0, 0.0)
    assert not follow(scene, np.zeros((20, 2)))[1]["is_success"]
    assert not follow(scene, [np.array([0.1, 5.0])] * 4 + [np.array([2.0, 5.0])] * 20)[1]["is_success"]


def test_the_environment_shows_what_the_dataset_shows():
    scene = task.draw_scenes(1, seed=7)[0]
    env = DrivePast()
    observation, _ = env.reset(seed=7)
    np.testing.assert_array_equal(observation["agent_pos"], [0.0, scene.start_y])
    image = task.render(np.array([0.0, scene.start_y]), scene.obstacle_y)
    np.testing.assert_array_equal(observation["pixels"]["top"], image)
    env.reset()
    assert env.scene != scene  # an episode that nobody seeded is another one
    assert DrivePast(0.1, -0.2).reset(seed=7)[0]["agent_pos"][1] == 0.1


def test_dataset_holds_what_the_experts_did(workshop):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(task.REPO_ID, root=workshop / "dataset")
    assert (dataset.num_episodes, len(dataset)) == (8, 8 * task.EPISODE_STEPS)
    scenes = task.draw_scenes(8, seed=0)
    first = dataset[0]
    assert first["observation.state"][1].item() == pytest.approx(scenes[0].start_y, abs=1e-6)
    next_state = dataset[1]["observation.state"].numpy()
    np.testing.assert_allclose(first["action"].numpy(), next_state, atol=1e-6)
    assert first["task"] == task.TASK
    image = (first[task.CAMERA].permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(image, task.render(np.array([0.0, scenes[0].start_y]), scenes[0].obstacle_y))


@pytest.mark.slow
def test_the_whole_demo_in_short(tmp_path, monkeypatch, capsys):
    """The command itself, every stage of it, with trainings too short to learn anything."""
    monkeypatch.setattr(demo_run, "DEMONSTRATIONS", 4)
    monkeypatch.setattr(demo_run, "evaluation_flags", lambda folder: evaluation_flags(folder, episodes=6, frames=2))
    monkeypatch.setattr(demo_run, "PICTURED", 3)
    monkeypatch.setattr(demo_run, "one_rectified_flow_flags", lambda folder: one_rectified_flow_flags(folder, steps=3))
    monkeypatch.setattr(demo_run, "reflow_flags", lambda folder: reflow_flags(folder, steps=2))
    folder = tmp_path / "demo"
    demo.main([f"--output_dir={folder}"])

    report = json.loads((folder / "evaluation" / "report.json").read_text())
    cells = [(row["policy"], row["num_steps"]) for row in report["rows"]]
    assert cells == [(policy, n) for policy in ("teacher", "student") for n in (1, 2, 5, 10)]
    assert all(0 <= row["success"]["rate"] <= 1 and row["success"]["episodes"] == 6 for row in report["rows"])
    latency = {(row["policy"], row["num_steps"]): row["latency_ms_p50"] for row in report["rows"]}
    assert latency["student", 10] > latency["student", 1]
    picture = np.asarray(Image.open(folder / "paths.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    output = capsys.readouterr().out
    assert "$ lerobot-train --policy.type=smolvla" in output
    assert "$ smolvla-reflow-train --reflow.teacher_path=" in output
    assert "$ smolvla-reflow-eval --policy.path=" in output
    assert output.count("teacher ") >= 4
    assert "exists already; name a new folder" in refused(capsys, demo.main, [f"--output_dir={folder}"])
    assert "--seed=-1: at least 0 is needed" in refused(capsys, demo.main, ["--seed=-1"])


@pytest.mark.slow
def test_a_failing_training_is_quoted(tmp_path):
    flags = ["--steps=1", "--dataset.repo_id=a/b", "--reflow.teacher_path=nowhere"]
    with pytest.raises(ReflowError, match=r"smolvla-reflow-train failed: .*There is no checkpoint at nowhere"):
        demo_run.run_training("smolvla-reflow-train", flags, tmp_path / "log")
