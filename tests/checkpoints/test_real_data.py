"""A short version of reflowing a SmolVLA on a real robot recording, where that recording is at hand."""

from pathlib import Path

import pytest
import torch
from helpers import lerobot_train_main, reflow_train_main
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import LAST

RECORDING = Path(__file__).parents[3] / "shared" / "data" / "g1_small"


@pytest.mark.skipif(
    not RECORDING.is_dir(),
    reason=f"the recording {RECORDING} is not here (tests/test_command.py trains on the demo's dataset)",
)
def test_humanoid_with_26_action_dimensions(tmp_path):
    backbone = write_backbone(tmp_path / "backbone", image_size=64)
    shared = [
        "--dataset.repo_id=local/g1",
        f"--dataset.root={RECORDING}",
        "--policy.device=cpu",
        "--batch_size=4",
        "--num_workers=0",
        "--steps=3",
    ]
    lerobot_train_main(
        [
            *shared,
            "--policy.type=smolvla",
            f"--policy.vlm_model_name={backbone}",
            "--policy.load_vlm_weights=false",
            "--policy.num_vlm_layers=2",
            "--policy.chunk_size=16",
            "--policy.n_action_steps=16",
            "--policy.resize_imgs_with_padding=[64,64]",
            "--policy.push_to_hub=false",
            f"--output_dir={tmp_path / '1rf'}",
        ]
    )
    reflow_train_main([*shared, f"--reflow.teacher_path={tmp_path / '1rf' / LAST}", f"--output_dir={tmp_path / '2rf'}"])
    student = SmolVLAPolicy.from_pretrained(tmp_path / "2rf" / LAST)
    teacher = SmolVLAPolicy.from_pretrained(tmp_path / "1rf" / LAST)
    assert student.config.action_feature.shape == (26,)
    weights, start = student.state_dict(), teacher.state_dict()
    assert weights.keys() == start.keys()
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
