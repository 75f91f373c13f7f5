"""Datasets as people have them: what is silently wrong is refused, what LeRobot trains on is taken."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from editing import COMMANDS, DATA, EPISODES, Change, column, cut, edited, gone, info, rows, stats
from helpers import assert_can_be_run, eval_flags, load_frames, reflow_run, reflow_train_main, refused
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pairs_helpers import pairs_flags

from smolvla_reflow import ReflowError, compat
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.dataset.frames import load_batches
from smolvla_reflow.dataset.opening import chosen_episodes, frame_ranges, open_dataset, open_metadata
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import CAMERA, FPS, REPO_ID


def from_lerobot_with(flag: str) -> pytest.MarkDecorator:
    known = flag in {field.name for field in fields(DatasetConfig)}
    return pytest.mark.skipif(not known, reason=f"this LeRobot has no --dataset.{flag}")


def tree(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


ANEW = ".*augment_dataset_quantile_stats --repo-id=smolvla-reflow/demo --root="
NOT_FINITE = "'action' holds NaN or infinity.*'std' in meta/stats.json.*--operation.type=delete_episodes"
SILENT = {
    "no statistics": (gone("meta/stats.json"), "'observation.state' has no 'mean'" + ANEW),
    "statistics of no action": (stats(lambda s: s.pop("action")), "'action' has no 'mean'" + ANEW),
    "statistics of no state": (stats(lambda s: s.pop("observation.state")), "'observation.state' has no" + ANEW),
    "no deviation": (stats(lambda s: s["action"].pop("std")), "'action' has no 'std'" + ANEW),
    "too wide": (stats(lambda s: s["action"].update(std=[1.0] * 3)), r"shape \(3,\), and .*has \(2,\)" + ANEW),
    "not finite": (stats(lambda s: s["action"].update(std=[math.nan, 1.0])), NOT_FINITE),
    "too many frames": (info(total_frames=50), "says 8 episodes and 50 frames, and meta/episodes lists 8 and 48.*corr"),
    "too few frames": (info(total_frames=47), "8 episodes and 47 frames.*correct meta/info.json"),
    "too few episodes": (info(total_episodes=7), "7 episodes and 48 frames.*correct meta/info.json"),
    "short table": (rows(EPISODES, 0, 7), "meta/episodes lists 7 and 42.*copy the dataset again"),
    "a gap": (column(EPISODES, "dataset_to_index", lambda stops: [*stops[:-1], 47][::-1]), "do not follow each other"),
    "another order": (column(EPISODES, "episode_index", lambda episodes: episodes[::-1]), "do not follow each other"),
}
LOUD = {  # LeRobot says what is wrong; the sentence says what was being done, and quotes LeRobot
    "no tasks": (gone("meta/tasks.parquet"), "While opening.*FileNotFoundError.*tasks.parquet.*, and then Offline"),
    "too deep": (lambda root: shutil.move(root / "meta", root / REPO_ID / "meta"), f"mean --dataset.root=.*{REPO_ID}."),
    "format v2.1": (info(codebase_version="v2.1"), "is in 2.1 format.*convert_dataset_v21_to_v30 --repo-id="),
    "format v2.0": (info(codebase_version="v2.0"), "Discord.*format is v2.0, and this LeRobot reads v3"),
}
CUT_DATA = (cut(DATA), "While (opening --dataset.root=|training).*Parquet magic bytes not found")


@pytest.mark.parametrize("name", [*SILENT, *LOUD])
def test_what_is_wrong_is_one_sentence(dataset, name):
    spoil, says = {**SILENT, **LOUD}[name]
    spoil(dataset)
    before = tree(dataset)
    with pytest.raises(ReflowError, match=says) as error:
        open_metadata(DatasetConfig(REPO_ID, root=str(dataset)))
    assert "\n" not in str(error.value)
    assert tree(dataset) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("spoil", "says"), [SILENT["too many frames"], LOUD["format v2.1"], CUT_DATA])
def test_every_command_says_so_before_it_writes_anything(workshop, dataset, tmp_path, capsys, command, spoil, says):
    spoil(dataset)
    before = tree(tmp_path)
    main, flags = COMMANDS[command]
    assert re.search(says, refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=dataset)))
    assert tree(tmp_path) == before


def test_quantiles_are_asked_for_where_a_policy_needs_them(dataset, make_config):
    stats(lambda s: [s["action"].pop(name) for name in ("q01", "q99")])(dataset)
    where = DatasetConfig(REPO_ID, root=str(dataset))
    mapping = {"VISUAL": NormalizationMode.IDENTITY, "STATE": NormalizationMode.MEAN_STD}
    open_metadata(where, make_config(normalization_mapping={**mapping, "ACTION": NormalizationMode.MEAN_STD}))
    with pytest.raises(ReflowError, match=r"'action' has no 'q01'.*augment_dataset_quantile_stats"):
        open_metadata(where, make_config(normalization_mapping={**mapping, "ACTION": NormalizationMode.QUANTILES}))


def test_the_commands_that_mend_a_dataset_exist(tmp_path):
    assert_can_be_run(compat.statistics_command("me/x", tmp_path))
    assert_can_be_run(compat.conversion_command("me/x", tmp_path))


@pytest.mark.parametrize("revision", [None, "main"])
def test_what_is_nowhere_leaves_no_folder_behind(tmp_path, revision):
    with pytest.raises(ReflowError, match="There is no LeRobotDataset at --dataset.root="):
        open_metadata(DatasetConfig(REPO_ID, root=str(tmp_path / "nowhere"), revision=revision))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["pairs", "eval"])
def test_settings_that_change_the_recorded_frames(workshop, tmp_path, capsys, command):
    main, flags = COMMANDS[command]
    streamed = flags(workshop, tmp_path / "out", dataset__streaming=True)
    assert "and the dataset is downloaded" in refused(capsys, main, streamed)
    augmented = flags(workshop, tmp_path / "out", dataset__image_transforms__enable=True)
    assert "images as they were recorded; leave" in refused(capsys, main, augmented)


def two_data_files(*pointers: int) -> Change:
    """Frames 24 to 47 in a second data file, and a table whose episodes point to these numbers of files."""
    second = DATA.replace("file-000", "file-001")
    changes = (rows(DATA, 24, 48, second), rows(DATA, 0, 24), column(EPISODES, "data/file_index", lambda _: pointers))
    return lambda root: [change(root) for change in changes]


UNREAD = {
    "nothing unusual": lambda root: None,
    "pointers one episode late at a roll-over": two_data_files(0, 0, 0, 0, 0, 1, 1, 1),
    "pointers to the first file": two_data_files(*[0] * 8),
    "pointers to files that are not there": two_data_files(*[7] * 8),
    "a wrong length": column(EPISODES, "length", lambda lengths: [5, *lengths[1:]]),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_lerobot_does_not_read_is_not_looked_at(workshop, dataset, tmp_path, name):
    UNREAD[name](dataset)
    where = DatasetConfig(REPO_ID, root=str(dataset))
    assert_frames_of_plain_lerobot(where, range(0, 48, 5))
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__root=dataset, steps=1))


def assert_frames_of_plain_lerobot(where: DatasetConfig, frames: Sequence[int]) -> None:
    """Each with the chunk recorded from it on, cut at the end of its episode."""
    plain = LeRobotDataset(REPO_ID, root=where.root, delta_timestamps={"action": [k / FPS for k in range(6)]})
    batches = list(load_frames(where, frames, chunk_size=6, batch_size=3))
    assert [len(batch["index"]) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    for name in ("index", "action", "action_is_pad", "observation.state", CAMERA):
        loaded, expected = torch.cat([batch[name] for batch in batches]), torch.stack([plain[i][name] for i in frames])
        assert torch.equal(loaded.reshape(expected.shape), expected)


def test_fewer_frames_than_a_chunk_are_trained_on(workshop, dataset, tmp_path, capsys):
    """LeRobot pads the chunk."""
    rows(DATA, 0, 3)(dataset)
    rows(EPISODES, 0, 1)(dataset)
    column(EPISODES, "dataset_to_index", lambda stops: [3])(dataset)
    info(total_frames=3, total_episodes=1)(dataset)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__root=dataset, steps=1))
    assert (tmp_path / "run/checkpoints/last").exists()
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "no", dataset__episodes="[]"))
    assert "hold 0 frames" in line


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A dataset like the workshop's with a video as its camera: three episodes, each lighter from frame to frame."""
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    features = {"observation.state": vector, "action": vector, CAMERA: camera}
    made = LeRobotDataset.create(REPO_ID, fps=FPS, root=tmp_path / "video", features=features, use_videos=True)
    rng = np.random.default_rng(0)
    for k in range(24):
        state, action = rng.normal(size=(2, 2)).astype(np.float32)
        image = np.full((64, 64, 3), 25 * (k % 8), np.uint8)
        made.add_frame({"observation.state": state, "action": action, CAMERA: image, "task": "drive past"})
        if k % 8 == 7:
            made.save_episode()
    made.finalize()
    return tmp_path / "video"


@pytest.mark.parametrize("command", COMMANDS)
def test_timestamps_a_little_off(workshop, video, tmp_path, capsys, command):
    column(DATA, "timestamp", lambda times: [t + 0.03 for t in times])(video)
    main, flags = COMMANDS[command]
    named = {"dataset__root": video, "dataset__video_backend": "pyav"}
    line = refused(capsys, main, flags(workshop, tmp_path / "out", **named))
    assert re.search(r"violate the tolerance.*--tolerance_s, now 0\.0001 seconds", line)
    assert not (tmp_path / "out").exists()
    main(flags(workshop, tmp_path / "out", **named, tolerance_s=0.05))
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_decoder_that_is_not_there(video, num_workers):
    where = DatasetConfig(REPO_ID, root=str(video), video_backend="betamax")
    with pytest.raises(ReflowError, match=r"While reading frame 0.*\(episode 0\).*betamax.*--dataset.video_backend"):
        next(load_batches(open_dataset(where), [[0]], num_workers))


def test_images_arrive_as_training_sees_them(video):
    """Between 0 and 1, whatever LeRobot loads them as."""
    dataset = open_dataset(DatasetConfig(REPO_ID, root=str(video), video_backend="pyav"))
    batch = next(load_batches(dataset, [[3, 15]]))
    assert batch[CAMERA].dtype == torch.float32
    expected = torch.tensor([75 / 255, 175 / 255])
    torch.testing.assert_close(batch[CAMERA].flatten(1).mean(1), expected, atol=0.02, rtol=0)
    assert batch["index"].tolist() == [3, 15]


@from_lerobot_with("eval_split")
def test_pairs_are_made_of_what_is_trained_on_and_the_report_of_what_is_not(workshop, tmp_path):
    where = DatasetConfig(REPO_ID, root=str(workshop / "dataset"), eval_split=0.25)
    assert chosen_episodes(open_metadata(where), where) == [0, 1, 2, 3, 4, 5]
    assert chosen_episodes(open_metadata(where), where, held_out=True) == [6, 7]
    split = {"dataset__eval_split": 0.25}
    pairs_command.main(pairs_flags(workshop, tmp_path / "pairs", **split))
    assert json.loads((tmp_path / "pairs/manifest.json").read_text())["frames"] == [[0, 36]]
    reflow_train_main(reflow_run(workshop, tmp_path / "run", **split, reflow__pairs_path=tmp_path / "pairs"))
    measured = load_frames(where, [0, 11], chunk_size=6, batch_size=2)
    assert next(measured)["index"].tolist() == [36, 47]
    eval_command.main(eval_flags(workshop, tmp_path / "report", **split, num_frames=100))
    assert json.loads((tmp_path / "report/report.json").read_text())["seen"]["frames"] == 12


@from_lerobot_with("exclude_episodes")
def test_episodes_can_be_excluded(workshop):
    where = DatasetConfig(REPO_ID, root=str(workshop / "dataset"), exclude_episodes=[0, 7])
    metadata = open_metadata(where)
    assert frame_ranges(metadata, chosen_episodes(metadata, where)) == [range(6, 42)]
    assert len(open_dataset(where)) == 36


@pytest.mark.parametrize("command", COMMANDS)
def test_annotations_of_any_length(workshop, dataset, tmp_path, command):
    """A column whose entries differ in length from frame to frame."""
    pytest.importorskip("lerobot.datasets.language")
    row = {"role": "user", "content": "left", "style": "vqa", "camera": CAMERA, "tool_calls": None}
    words = dict.fromkeys(("role", "content", "style", "camera"), pa.string())
    kind = pa.list_(pa.struct([*words.items(), ("tool_calls", pa.list_(pa.string()))]))
    entries = pa.array([[row] * (index % 3) for index in range(48)], kind)
    # Hugging Face's own description of the columns, written beside them, would not know the new one.
    table = pq.read_table(dataset / DATA).append_column("language_events", entries).replace_schema_metadata(None)
    pq.write_table(table, dataset / DATA)
    feature = {"language_events": {"dtype": "language", "shape": [1], "names": None}}
    edited("meta/info.json", lambda content: content["features"].update(feature))(dataset)
    main, flags = COMMANDS[command]
    main(flags(workshop, tmp_path / "out", dataset__root=dataset))


@from_lerobot_with("return_uint8")
def test_training_may_stream(workshop, tmp_path):
    """LeRobot streams in as many parts as there are workers."""
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__streaming=True, num_workers=1))


def test_a_tilde_means_the_home_folder(workshop, tmp_path, monkeypatch):
    home, there = tmp_path / "home", Path("~/workshop")
    home.mkdir()
    (home / "workshop").symlink_to(workshop)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    pairs_command.main(pairs_flags(there, Path("~/pairs")))
    assert (home / "pairs/manifest.json").is_file()
    teacher = "~/workshop/1rf/checkpoints/last/pretrained_model"
    eval_command.main(eval_flags(there, Path("~/report"), teacher_path=teacher, earlier_rounds=f"[{teacher}]"))
    assert (home / "report/report.json").is_file()
    reflow_train_main(reflow_run(workshop, home / "run", reflow__teacher_path=teacher, steps=1))
    noted = json.loads((home / "run" / LAST / "config.json").read_text())["pretrained_path"]
    assert noted == str((workshop / "1rf" / LAST).resolve())
    assert not (tmp_path / "~").exists()
