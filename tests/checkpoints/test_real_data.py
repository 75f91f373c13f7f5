"""A short version of reflowing a SmolVLA on a real robot recording, where that recording is at hand."""

from pathlib import Path

import pytest
import torch
from helpers import as_flags, lerobot_train_main, reflow_train_main
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import LAST

RECORDING = Path(__file__).parents[3] / "shared" / "data" / "g1_small"
SHORT = {"dataset.repo_id": "local/g1", "dataset.root": RECORDING, "policy.device": "cpu", "batch_size": 4}
SMALL = {"load_vlm_weights": "false", "num_vlm_layers": 2, "chunk_size": 16, "n_action_steps": 16}


@pytest.mark.skipif(
    not RECORDING.is_dir(),
    reason=f"the recording {RECORDING} is not here (tests/training/test_command.py trains on the demo's dataset)",
)
def test_humanoid_with_26_action_dimensions(tmp_path):
    short = {**SHORT, "num_workers": 0, "steps": 3}
    policy = {**SMALL, "vlm_model_name": write_backbone(tmp_path / "backbone", image_size=64), "type": "smolvla"}
    policy |= {"resize_imgs_with_padding": "[64,64]", "push_to_hub": "false"}
    policy = {f"policy.{name}": value for name, value in policy.items()}
    lerobot_train_main(as_flags({**short, **policy, "output_dir": tmp_path / "1rf"}))
    reflow_train_main(
        as_flags({**short, "reflow.teacher_path": tmp_path / "1rf" / LAST, "output_dir": tmp_path / "2rf"})
    )
    student, teacher = (SmolVLAPolicy.from_pretrained(tmp_path / run / LAST) for run in ("2rf", "1rf"))
    assert student.config.action_feature.shape == (26,)
    weights, start = student.state_dict(), teacher.state_dict()
    assert weights.keys() == start.keys()
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
