"""The whole chain on a checkpoint made the way people make theirs: train, resume, pairs, eval, next round, stock load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import edit_step
from helpers import as_flags, reflow_train_main, refused
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from people import RENAME_MAP, REPO_ID, ROBOT_DIM, dataset_flags, edit_json, fine_tune
from safetensors.torch import load_file

from smolvla_reflow.commands import eval as reflow_eval
from smolvla_reflow.commands import pairs as reflow_pairs
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.pairs.store import Pairs

FEW_PAIRS = {"couplings_per_frame": 2, "num_workers": 0, "dtype": "float32"}
SHORT_EVAL = {"num_steps": "[1,2]", "num_frames": 3, "num_noises": 2, "reference_steps": 4}


def reflow_flags(people, run: Path, **changes: Any) -> list[str]:
    given = {"reflow__teacher_path": people.teacher, "output_dir": run, "rename_map": None, "steps": 3}
    return dataset_flags(people.dataset, **{**given, **changes})


def pairs_flags(people, folder: Path, **changes: Any) -> list[str]:
    return as_flags({**where(people, folder), **FEW_PAIRS, "reflow.teacher_path": people.teacher}, **changes)


def where(people, folder: Path) -> dict[str, Any]:
    return {"dataset.repo_id": REPO_ID, "dataset.root": people.dataset, "output_dir": folder, "policy.device": "cpu"}


def stock_chunk(checkpoint: Path, root: Path, frame: int, noise: torch.Tensor) -> torch.Tensor:
    """The normalised chunk that plain LeRobot gives for one frame of a dataset: stock policy, its own processors."""
    policy = SmolVLAPolicy.from_pretrained(checkpoint)
    before, _ = make_pre_post_processors(
        policy.config, str(checkpoint), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    item = LeRobotDataset(REPO_ID, root=root)[frame]
    batch = {k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in item.items() if not k.startswith("action")}
    return policy.predict_action_chunk(before(batch), noise=noise[None])[0]


@pytest.fixture(scope="module")
def first_round(people, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("people_2rf") / "run"
    reflow_train_main(reflow_flags(people, run))
    return run


@pytest.fixture
def start(people, tmp_path) -> Path:
    """A copy of the teacher, to be changed."""
    return Path(shutil.copytree(people.teacher, tmp_path / "start"))


def test_what_the_fixture_is_like(people):
    """Its config still says what the base's said, as LeRobot leaves it; only the statistics know the robot."""
    config = json.loads((people.teacher / "config.json").read_text())
    assert config["input_features"]["observation.state"]["shape"] == [6]
    assert [name for name in config["input_features"] if "images" in name] == [
        f"observation.images.camera{i}" for i in (1, 2, 3)
    ]
    assert config["repo_id"] == "lerobot/smolvla_base"
    before, _ = make_pre_post_processors(None, str(people.teacher))
    assert before.steps[-1].state_dict()["observation.state.mean"].shape == (ROBOT_DIM,)


def test_train_resume_and_the_next_round(people, first_round, tmp_path):
    student = first_round / LAST
    weights, before = load_file(student / "model.safetensors"), load_file(people.teacher / "model.safetensors")
    assert weights.keys() == before.keys()
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    chunk = stock_chunk(student, people.dataset, 3, torch.randn(4, 8))
    assert chunk.shape == (4, ROBOT_DIM)
    assert chunk.isfinite().all()
    reflow_train_main([f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=5"])
    assert (first_round / "checkpoints" / "000005").is_dir()
    reflow_train_main(reflow_flags(people, tmp_path / "3rf", reflow__teacher_path=student))
    assert (tmp_path / "3rf" / LAST / "model.safetensors").is_file()


def test_pairs_are_what_stock_inference_of_the_teacher_gives(people, tmp_path):
    reflow_pairs.main(pairs_flags(people, tmp_path / "pairs", reflow__solver="euler"))
    pairs = Pairs(tmp_path / "pairs")
    for frame, pair in ((0, 0), (17, 1), (40, 0)):
        stored = pairs.lookup(frame, pair)
        expected = stock_chunk(people.teacher, people.dataset, frame, stored.noise)
        torch.testing.assert_close(stored.actions[:, :ROBOT_DIM], expected, rtol=1e-4, atol=1e-5)
    reflow_train_main(reflow_flags(people, tmp_path / "2rf", reflow__pairs_path=tmp_path / "pairs"))


def test_evaluation(people, first_round, tmp_path):
    given = {"policy.path": first_round / LAST, "teacher_path": people.teacher, **where(people, tmp_path / "report")}
    reflow_eval.main(as_flags({**given, **SHORT_EVAL}))
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert len(rows[0]["action_mae_per_dim"]) == ROBOT_DIM
    assert all(row["flow_rmse"] < 100 for row in rows)  # no dimension is measured in units of rounding noise


def test_input_features_of_the_dataset_as_lerobots_guide_to_peft_has_it(people, tmp_path, capsys):
    """The student then has the dataset's own names, so the teacher has to have them too."""
    null = {"policy__input_features": "null", "policy__output_features": "null"}
    run = tmp_path / "1rf"
    teacher = fine_tune(people.base, people.dataset, run, rename_map=None, steps=1, **null)
    lora = {"peft__method_type": "LORA", "peft__r": 2}
    flags = reflow_flags(people, tmp_path / "2rf", reflow__teacher_path=teacher, steps=1, **null, **lora)
    reflow_train_main(flags)
    assert (tmp_path / "2rf" / LAST / "adapter_model.safetensors").is_file()

    renamed = reflow_flags(people, tmp_path / "no", steps=1, **null, rename_map=json.dumps(RENAME_MAP))
    line = refused(capsys, reflow_train_main, renamed)
    assert "observation.images.front, observation.images.wrist, and the batches have no such names" in line
    reflow_train_main(reflow_flags(people, tmp_path / "own_names", steps=1, **null))  # its teacher renames for itself


def test_pairs_of_other_cameras_are_others(people, tmp_path, capsys):
    """Swapped, they would be targets for images that the teacher has not seen."""
    reflow_pairs.main(pairs_flags(people, tmp_path / "pairs"))
    front, wrist = RENAME_MAP
    swapped = json.dumps({front: RENAME_MAP[wrist], wrist: RENAME_MAP[front]})
    line = refused(capsys, reflow_pairs.main, pairs_flags(people, tmp_path / "pairs", rename_map=swapped))
    assert "holds other pairs: rename_map is" in line
    flags = reflow_flags(people, tmp_path / "run", rename_map=swapped, reflow__pairs_path=tmp_path / "pairs")
    assert "are not this run's: rename_map is" in refused(capsys, reflow_train_main, flags)
    typed = json.dumps(RENAME_MAP)  # the teacher's own, in words
    reflow_pairs.main(pairs_flags(people, tmp_path / "pairs", rename_map=typed))
    reflow_train_main(reflow_flags(people, tmp_path / "run", rename_map=typed, reflow__pairs_path=tmp_path / "pairs"))


def test_a_student_in_another_order_of_cameras(people, start, tmp_path):
    """The teacher keeps its own (tests/method/test_cameras.py); the student's is what its config says."""
    features = json.loads((start / "config.json").read_text())["input_features"]
    edit_json(start / "config.json", input_features=dict(reversed(features.items())))
    run = tmp_path / "run"
    reflow_train_main(reflow_flags(people, run, steps=1, policy__path=start))
    saved = json.loads((run / LAST / "config.json").read_text())["input_features"]
    assert list(saved) == list(reversed(features))


def test_another_way_of_reading_instructions_is_refused(people, start, tmp_path, capsys):
    """The batch is tokenised once, by the student's processors, and the teacher would see the same words cut short."""
    edit_step(start, "tokenizer_processor", lambda step: step["config"].update(max_length=5))
    line = refused(capsys, reflow_train_main, reflow_flags(people, tmp_path / "run", policy__path=start))
    assert "Student and teacher tokenize the instruction differently: max_length is 24" in line
    assert not (tmp_path / "run").exists()
