"""`examples/own_loop.py` as a user runs it, and what stock LeRobot makes of the student that it saves."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"


def test_a_loop_of_ones_own(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, root = workshop / "1rf" / LAST, tmp_path / "student", workshop / "dataset"
    flags = {"teacher": teacher, "repo_id": REPO_ID, "root": root, "output_dir": student, "steps": 3, "batch_size": 8}
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *(f"--{name}={value}" for name, value in flags.items())])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    # The same files, fields and tensors as LeRobot's own checkpoint has (which also has the training's configuration).
    files = {path.name for path in teacher.iterdir()} - {"train_config.json"}
    assert {path.name for path in student.iterdir()} == files
    configs = [json.loads((folder / "config.json").read_text()) for folder in (student, teacher)]
    assert configs[0].keys() == configs[1].keys()
    trained, before = (load_file(folder / "model.safetensors") for folder in (student, teacher))
    assert {n: (t.shape, t.dtype) for n, t in trained.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())

    policy = SmolVLAPolicy.from_pretrained(student).eval()
    policy.config.num_steps = 2
    preprocessor, postprocessor = make_pre_post_processors(policy.config, str(student))
    frame = LeRobotDataset(REPO_ID, root=root)[0]
    observation = preprocessor({name: value for name, value in frame.items() if not name.startswith("action")})
    action = postprocessor(policy.select_action(observation))
    assert action.shape == (1, 2)
    assert torch.isfinite(action).all()
