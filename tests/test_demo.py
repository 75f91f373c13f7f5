"""The demo: its task is solvable and two-way, its parts work, and the whole runs from one command."""

import json

import numpy as np
import pytest
from PIL import Image

from smolvla_reflow.commands import demo
from smolvla_reflow.demo import task
from smolvla_reflow.demo.recipe import one_rectified_flow_flags, reflow_flags


def experts(scenes, side):
    paths = [task.expert_path(s, o, side) for s, o in zip(scenes.start_y, scenes.obstacle_y, strict=True)]
    return np.stack(paths)


def follow(paths, replan_every):
    """A driver that reads waypoints off given paths."""
    calls = iter(range(100))

    def waypoints(positions, images):
        start = next(calls) * replan_every + 1
        columns = np.clip(np.arange(start, start + replan_every), 0, task.EPISODE_STEPS)
        return paths[:, columns]

    return waypoints


@pytest.mark.parametrize("side", [-1, 1])
def test_experts_get_past_on_either_side(side):
    scenes = task.draw_scenes(100, seed=3)
    drives = task.drive(scenes, follow(experts(scenes, side), 2), replan_every=2)
    assert drives.success.all()
    assert (np.sign(drives.paths[:, 3, 1] - scenes.obstacle_y) == side).all()


def test_averaging_the_two_ways_hits_the_obstacle():
    scenes = task.draw_scenes(100, seed=3)
    middle = (experts(scenes, -1) + experts(scenes, 1)) / 2
    drives = task.drive(scenes, follow(middle, 2), replan_every=2)
    assert drives.hit.all()
    assert not drives.success.any()


def test_standing_still_is_no_success():
    scenes = task.draw_scenes(5, seed=3)
    drives = task.drive(scenes, lambda positions, images: np.repeat(positions[:, None], 2, axis=1), replan_every=2)
    assert not drives.hit.any()
    assert not drives.success.any()


def test_the_obstacle_is_visible_only_in_the_image():
    here = np.zeros((2, 2))
    images = task.render(here, np.array([-0.2, 0.2]))
    assert images.shape == (2, task.IMAGE_SIZE, task.IMAGE_SIZE, 3)
    assert images.dtype == np.uint8
    assert (images[0] != images[1]).any()
    np.testing.assert_array_equal(images[0], images[1][::-1])  # mirrored about y = 0


def test_dataset_holds_what_the_experts_did(workshop):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(task.REPO_ID, root=workshop / "dataset")
    assert (dataset.num_episodes, len(dataset)) == (8, 8 * task.EPISODE_STEPS)
    scenes = task.draw_scenes(8, seed=0)
    first = dataset[0]
    assert first["observation.state"][1].item() == pytest.approx(scenes.start_y[0], abs=1e-6)
    next_state = dataset[1]["observation.state"].numpy()
    np.testing.assert_allclose(first["action"].numpy(), next_state, atol=1e-6)
    assert first["task"] == task.TASK
    image = (first[task.CAMERA].permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(image, task.render(np.array([[0, scenes.start_y[0]]]), scenes.obstacle_y[:1])[0])


def test_both_trainings_read_the_same_data(tmp_path):
    teacher, student = one_rectified_flow_flags(tmp_path), reflow_flags(tmp_path)
    for name in ("dataset.root", "dataset.repo_id", "batch_size"):
        assert [f for f in teacher if f.startswith(f"--{name}=")] == [f for f in student if f.startswith(f"--{name}=")]


def test_the_whole_demo_in_short(tmp_path, monkeypatch, capsys):
    """The command itself, every stage of it, with trainings too short to learn anything."""
    monkeypatch.setattr(demo, "DEMONSTRATIONS", 4)
    monkeypatch.setattr(demo, "EPISODES", 6)
    monkeypatch.setattr(demo, "PICTURED", 3)
    monkeypatch.setattr(demo, "one_rectified_flow_flags", lambda folder: one_rectified_flow_flags(folder, steps=3))
    monkeypatch.setattr(demo, "reflow_flags", lambda folder: reflow_flags(folder, steps=2))
    folder = tmp_path / "demo"
    demo.main([f"--output_dir={folder}"])

    report = json.loads((folder / "report.json").read_text())
    cells = [(row["policy"], row["num_steps"]) for row in report["rows"]]
    assert cells == [(policy, n) for policy in ("teacher", "student") for n in (1, 2, 5, 10)]
    assert all(0 <= row["success_rate"] <= 1 and row["latency_ms"] > 0 for row in report["rows"])
    latency = {(row["policy"], row["num_steps"]): row["latency_ms"] for row in report["rows"]}
    assert latency["student", 10] > latency["student", 1]
    picture = np.asarray(Image.open(folder / "paths.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    output = capsys.readouterr().out
    assert "$ lerobot-train --policy.type=smolvla" in output
    assert "$ smolvla-reflow-train --reflow.teacher_path=" in output
    assert output.count("teacher ") >= 4

    with pytest.raises(SystemExit) as exit:
        demo.main([f"--output_dir={folder}"])
    assert exit.value.code == 2
    assert "exists already; name a new folder" in capsys.readouterr().err


def test_a_failing_training_is_quoted(tmp_path):
    flags = ["--steps=1", "--dataset.repo_id=a/b", "--reflow.teacher_path=nowhere"]
    with pytest.raises(Exception, match=r"smolvla-reflow-train failed: .*There is no checkpoint at nowhere"):
        demo.train("smolvla-reflow-train", flags, tmp_path / "log")
