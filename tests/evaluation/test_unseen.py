"""The frames of an evaluation: episodes that the student was not trained on, where there are any, and said either way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from helpers import eval_flags, eval_main, reflow_run, reflow_train_main
from lerobot.configs.default import DatasetConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata, can_hold_out
from smolvla_reflow.dataset.opening import open_dataset
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID, write_dataset
from smolvla_reflow.evaluation import decision
from smolvla_reflow.evaluation.frames import Seen, trained_episodes
from smolvla_reflow.training.hold_out import FEWEST, MOST, SMALLEST_DATASET

EPISODES = 50


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A dataset that is large enough to hold episodes out of."""
    folder = tmp_path_factory.mktemp("large") / "dataset"
    write_dataset(folder, EPISODES, seed=3)
    return folder


@pytest.fixture(scope="module")
def trained(workshop, large, tmp_path_factory):
    """Students of this dataset, trained by default, on all of its episodes, and on some that the user named."""
    folder = tmp_path_factory.mktemp("students")
    named = {"default": {}, "all": {"reflow__measure_episodes": "[]"}, "some": {"dataset__episodes": "[0,1,2,3]"}}
    for name, changes in named.items():
        reflow_train_main(reflow_run(workshop, folder / name, steps=1, dataset__root=large, **changes))
    return {name: folder / name / LAST for name in named}


def evaluate(workshop, large, output_dir, student, **changes) -> dict:
    small = {"num_frames": 12, "batch_size": 12, "num_noises": 2, "reference_steps": 2, "num_steps": "[1]"}
    against = {"policy__path": student, "teacher_path": workshop / "1rf" / LAST, "dataset__root": large}
    return eval_main(eval_flags(workshop, output_dir, **{**small, **against, **changes}))


def measured_episodes(monkeypatch) -> list[int]:
    """The episodes of the frames that are measured from now on."""
    seen, stock = [], decision.by_cell

    def noted(table):
        seen[:] = sorted({*table["episode"]})
        return stock(table)

    monkeypatch.setattr(decision, "by_cell", noted)
    return seen


def test_the_default_holds_out_episodes_and_measures_on_them(workshop, large, trained, tmp_path, monkeypatch, capsys):
    seen = measured_episodes(monkeypatch)
    report = evaluate(workshop, large, tmp_path / "r", trained["default"])
    noted = json.loads((trained["default"] / "train_config.json").read_text())
    held = noted["reflow"]["measure_episodes"]
    assert held == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert noted["dataset"]["episodes"] == sorted({*range(EPISODES)} - {*held})
    assert seen == held
    assert report["seen"] == {"frames": 12, "episodes": 10, "trained_on": {"teacher": None, "student": 0}}
    said = "Distances are measured on 12 frames of 10 episodes that the student was not trained on."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "r/report.md").read_text()


def test_where_every_frame_was_trained_on_report_and_picture_say_so(
    workshop, large, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(decision, "FEWEST_FRAMES", 12)
    seen = measured_episodes(monkeypatch)
    report = evaluate(workshop, large, tmp_path / "all", trained["all"], energy_margin=100)
    assert len(seen) == 12
    assert report["seen"]["trained_on"]["student"] == 12
    assert report["recommendation"].startswith("Recommended for frames seen in training: num_steps=1, ")
    said = "on 12 frames of 12 episodes, and the student was trained on all of them: on new observations it may need"
    assert said in capsys.readouterr().out
    unseen = evaluate(workshop, large, tmp_path / "unseen", trained["default"], energy_margin=100)
    assert unseen["recommendation"].startswith("Recommended: num_steps=1, ")
    titles = [matplotlib.image.imread(tmp_path / name / "report.png")[:40] for name in ("all", "unseen")]
    assert (titles[0] != titles[1]).any()


def test_the_user_chooses(workshop, large, trained, tmp_path, monkeypatch):
    """Episodes that were left out of the training are unseen, and episodes that are named are measured on."""
    seen = measured_episodes(monkeypatch)
    report = evaluate(workshop, large, tmp_path / "some", trained["some"])
    assert min(seen) == 4
    assert report["seen"]["trained_on"] == {"teacher": None, "student": 0}
    report = evaluate(workshop, large, tmp_path / "named", trained["some"], dataset__episodes="[2,3,4]")
    assert seen == [2, 3, 4]
    assert report["seen"]["trained_on"]["student"] == 2


def test_a_dataset_of_another_name_may_be_a_copy(workshop, large, trained, tmp_path, capsys):
    """With other statistics, as a merged copy has them; nothing tells if the training episodes are in it."""
    copy = tmp_path / "merged"
    shutil.copytree(large, copy)
    stats = copy / "meta/stats.json"
    changed = json.loads(stats.read_text())
    changed["action"]["mean"] = [x + 1 for x in changed["action"]["mean"]]
    stats.write_text(json.dumps(changed))
    for name, said in {"me/merged": 1, REPO_ID: 0}.items():
        folder = tmp_path / name.replace("/", "_")
        changes = {"dataset__repo_id": name, "dataset__root": copy}
        evaluate(workshop, large, folder, trained["all"], **changes)
        warning = f"was trained on {REPO_ID}, so all episodes of me/merged count as not trained on. If they hold"
        assert capsys.readouterr().out.count(warning) == 2 * said  # at once, and in the report
        assert (folder / "report.md").read_text().count(warning) == said


def test_the_teacher_has_seen_its_own_frames(workshop, tmp_path, capsys):
    report = eval_main(eval_flags(workshop, tmp_path / "r", teacher_path=workshop / "1rf" / LAST, num_steps="[1]"))
    assert report["seen"] == {"frames": 6, "episodes": 6, "trained_on": {"teacher": 6, "student": 6}}
    assert "The teacher was trained on all of them." in capsys.readouterr().out


@pytest.fixture
def known(workshop, tmp_path):
    """The episodes of the workshop's dataset that its 1-RF was trained on, after changes to its files."""

    def episodes(dataset: dict | None = None, stats: bool = False, repo_id: str = REPO_ID):
        folder = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "checkpoint", dirs_exist_ok=True))
        file = folder / "train_config.json"
        noted = json.loads(file.read_text())
        if dataset is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**noted, "dataset": {**noted["dataset"], **dataset}}))
        metadata = LeRobotDatasetMetadata(REPO_ID, root=workshop / "dataset")
        if stats:
            metadata.stats["action"]["mean"] = metadata.stats["action"]["mean"] + 1
        found = trained_episodes(
            open_checkpoint(folder), DatasetConfig(repo_id, root=str(workshop / "dataset")), metadata
        )
        return None if found is None else sorted(found)

    return episodes


def test_the_episodes_of_a_checkpoint(known):
    assert known({}) == [*range(8)]
    assert known({"episodes": [1, 5]}) == [1, 5]
    assert known({"episodes": [1, 5]}, repo_id="me/copy") == [1, 5]  # the same statistics, so the same dataset
    assert known({"repo_id": "me/another"}, stats=True) == []
    assert known({"episodes": [1, 5]}, stats=True) is None  # changed since, so the numbers may have
    assert known(None) is None


@pytest.mark.skipif(not can_hold_out(DatasetConfig(REPO_ID)), reason="LeRobot holds nothing out before 0.6")
def test_the_episodes_that_lerobot_held_out(known, workshop):
    dataset = DatasetConfig(REPO_ID, root=str(workshop / "dataset"))
    held_out = open_dataset(replace(dataset, eval_split=0.25), held_out=True).episodes
    assert known({"eval_split": 0.25}) == sorted({*range(8)} - {*held_out})


def test_what_is_said_of_unknown_episodes():
    said = Seen(40, 12, {"teacher": None, "round 1": 5, "student": None}).in_words()
    assert said.startswith(
        "Distances are measured on 40 frames of 12 episodes. The student's checkpoint does not say if"
    )
    assert said.endswith("The round 1 was trained on 5 of them.")


def test_a_held_out_set_is_enough_for_a_recommendation():
    assert FEWEST >= decision.FEWEST_EPISODES
    assert SMALLEST_DATASET >= FEWEST
    assert MOST >= FEWEST


def test_an_episode_list_opens_the_same_frames_as_the_whole(large):
    """Training by default names its episodes: every frame of theirs is there once, and no other."""
    whole = LeRobotDataset(REPO_ID, root=large)
    some = open_dataset(DatasetConfig(REPO_ID, root=str(large), episodes=[1, 7, 49]))
    assert [some[i]["index"].item() for i in range(len(some))] == [
        i for i in range(len(whole)) if whole.hf_dataset[i]["episode_index"].item() in (1, 7, 49)
    ]
