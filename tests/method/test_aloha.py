"""`adapt_to_pi_aloha`: two arms in units of their own, through pairs and evaluation as through stock inference."""

import json

import pytest
import torch
from helpers import as_flags, reflow_train_main
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from people import REPO_ID, dataset_flags, edit_json, fine_tune, write_base, write_robot_dataset

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import eval as reflow_eval
from smolvla_reflow.commands import pairs as reflow_pairs
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.smolvla.normalization import robot_units

ARMS = 14


@pytest.fixture(scope="module")
def aloha(backbone, tmp_path_factory):
    """A dataset of two arms, and a teacher fine-tuned on it, whose fourteen dimensions are bent as pi bends Aloha's."""
    folder = tmp_path_factory.mktemp("aloha")
    base = write_base(folder / "base", backbone, max_state_dim=16, max_action_dim=16)
    root = write_robot_dataset(folder / "dataset", dim=ARMS)
    teacher = fine_tune(base, root, folder / "run", steps=2)
    edit_json(teacher / "config.json", adapt_to_pi_aloha=True)  # with which LeRobot runs a policy, but trains none
    return root, teacher


@pytest.fixture
def stock(aloha):
    """The teacher in plain LeRobot, its postprocessor, and two frames as its own preprocessor shows them to it."""
    root, teacher = aloha
    policy = SmolVLAPolicy.from_pretrained(teacher)
    before, after = make_pre_post_processors(policy.config, str(teacher))
    dataset = LeRobotDataset(REPO_ID, root=root)
    raw = torch.utils.data.default_collate([dataset[i] for i in (3, 30)])
    return policy, {k: v for k, v in before(raw).items() if k != "action"}, after


def test_robot_units_are_those_of_stock_inference(aloha, stock):
    policy, batch, after = stock
    noise = torch.randn(2, 4, 16)
    chunk = policy.predict_action_chunk({k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}, noise)
    expected = torch.stack([after(chunk[:, i]) for i in range(4)], dim=1)
    batch["observation.state"] = policy._pi_aloha_decode_state(batch["observation.state"].clone())
    images, masks = policy.prepare_images(batch)
    words = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    with torch.no_grad():
        full = policy.model.sample_actions(images, masks, *words, policy.prepare_state(batch), noise=noise)
    units = robot_units(open_checkpoint(aloha[1]), policy)
    torch.testing.assert_close(units(full[..., :ARMS]), expected, rtol=1e-4, atol=1e-4)


def test_pairs_evaluation_and_training(aloha, stock, tmp_path):
    root, teacher = aloha
    where = {"dataset.repo_id": REPO_ID, "dataset.root": root, "policy.device": "cpu"}
    made = {"couplings_per_frame": 1, "dtype": "float32", "num_workers": 0, "reflow.solver": "euler"}
    reflow_pairs.main(as_flags({**where, **made, "reflow.teacher_path": teacher, "output_dir": tmp_path / "pairs"}))
    policy, batch, _ = stock
    pairs = Pairs(tmp_path / "pairs")
    noise = torch.stack([pairs.lookup(frame, 0).noise for frame in (3, 30)])
    expected = policy.predict_action_chunk(batch, noise)  # in Aloha's units, into which pairs have to be converted
    stored = torch.stack([pairs.lookup(frame, 0).actions for frame in (3, 30)])[..., :ARMS]
    torch.testing.assert_close(policy._pi_aloha_encode_actions(stored), expected, rtol=1e-4, atol=1e-4)

    measured = {"num_frames": 2, "num_noises": 2, "num_steps": "[1]", "reference_steps": 2}
    reflow_eval.main(as_flags({**where, **measured, "policy.path": teacher, "output_dir": tmp_path / "report"}))
    (row, *_) = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert len(row["action_mae_per_dim"]) == ARMS

    run = {"reflow__teacher_path": teacher, "output_dir": tmp_path / "run", "rename_map": None, "steps": 2}
    reflow_train_main(dataset_flags(root, **run, reflow__real_data_ratio=0.5))
    assert (tmp_path / "run" / LAST / "model.safetensors").is_file()
