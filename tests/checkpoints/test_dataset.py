"""Datasets as people have them: what is silently wrong is refused, what LeRobot trains on is taken."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import eval_flags, load_frames, reflow_run, reflow_train_main, refused
from lerobot.configs.default import DatasetConfig
from lerobot.configs.types import NormalizationMode
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pairs_helpers import pairs_flags

from smolvla_reflow import ReflowError, compat
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.dataset import (
    chosen_episodes,
    frame_ranges,
    is_downloaded,
    load_batches,
    open_dataset,
    open_metadata,
)
from smolvla_reflow.demo.task import CAMERA, FPS, REPO_ID

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
COMMANDS: dict[str, tuple[Callable, Callable[..., list[str]]]] = {
    "train": (reflow_train_main, lambda workshop, out, **changes: reflow_run(workshop, output_dir=out, **changes)),
    "pairs": (pairs_command.main, pairs_flags),
    "eval": (eval_command.main, eval_flags),
}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def info(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "meta/info.json", lambda fields: fields.update(changes))


def stats(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit(root / "meta/stats.json", change)


def gone(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def shortened(name: str, rows: int) -> Callable[[Path], None]:
    return lambda root: pq.write_table(pq.read_table(root / name).slice(0, rows), root / name)


def column(name: str, column: str, change: Callable[[list], list]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        table = pq.read_table(root / name)
        field = table.schema.field(column)
        values = pa.array(change(table.column(column).to_pylist()), field.type)
        pq.write_table(table.set_column(table.schema.get_field_index(column), field, values), root / name)

    return apply


def tree(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


# --- what is refused ------------------------------------------------------------------------------------------

AUGMENT = "augment_dataset_quantile_stats --repo-id=smolvla-reflow/demo --root="
CORRECT = "correct meta/info.json"
SILENT = {
    "no statistics": (gone("meta/stats.json"), "'observation.state' has no 'mean'", AUGMENT),
    "statistics of no action": (stats(lambda s: s.pop("action")), "'action' has no 'mean'", AUGMENT),
    "statistics of no state": (stats(lambda s: s.pop("observation.state")), "'observation.state' has no", AUGMENT),
    "no deviation": (stats(lambda s: s["action"].pop("std")), "'action' has no 'std'", AUGMENT),
    "statistics too wide": (
        stats(lambda s: s["action"].update(std=[1.0] * 3)),
        "'action' has a 'std' of shape (3,), and meta/info.json says that the feature has (2,)",
        AUGMENT,
    ),
    "NaN": (
        stats(lambda s: s["action"].update(std=[math.nan, 1.0])),
        "The dataset's 'action' holds NaN or infinity ('std' in meta/stats.json is not finite)",
        "--operation.type=delete_episodes",
    ),
    "too many frames": (
        info(total_frames=50),
        "says 8 episodes and 50 frames, and meta/episodes lists 8 and 48",
        CORRECT,
    ),
    "too few frames": (info(total_frames=47), "8 episodes and 47 frames", CORRECT),
    "too few episodes": (info(total_episodes=7), "7 episodes and 48 frames", CORRECT),
    "short table of episodes": (shortened(EPISODES, 7), "meta/episodes lists 7 and 42", "copy the dataset again"),
    "episodes with a gap": (
        column(EPISODES, "dataset_to_index", lambda stops: [*stops[:-1], stops[-1] - 1][::-1]),
        "do not follow each other",
        "copy the dataset again",
    ),
    "episodes in another order": (
        column(EPISODES, "episode_index", lambda episodes: episodes[::-1]),
        "do not follow each other",
        "copy the dataset again",
    ),
}
# LeRobot says what is wrong, and the sentence says what was done and what LeRobot said.
LOUD = {
    "no tasks": (gone("meta/tasks.parquet"), "meta/tasks.parquet", "FileNotFoundError"),
    "broken info": (lambda root: (root / "meta/info.json").write_text("{"), "JSONDecodeError", "double quotes"),
    "broken statistics": (lambda root: (root / "meta/stats.json").write_text("{"), "JSONDecodeError", ""),
    "statistics of words": (stats(lambda s: s["action"].update(std="wide")), "", ""),
    "a table that is cut off": (
        lambda root: (root / EPISODES).write_bytes((root / EPISODES).read_bytes()[:-200]),
        "ArrowInvalid: Parquet magic bytes not found",
        "",
    ),
    "format v2.1": (info(codebase_version="v2.1"), "is in 2.1 format", "convert_dataset_v21_to_v30 --repo-id="),
    "format v2.0": (info(codebase_version="v2.0"), "format is v2.0, and this LeRobot reads v3", "Discord"),
    "another layout of a newer format": (
        lambda root: (info(codebase_version="v4.0")(root), (root / EPISODES).unlink()),
        "format is v4.0, and this LeRobot reads v3",
        "",
    ),
}


@pytest.fixture
def dataset(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the workshop's dataset, to be broken."""
    return Path(shutil.copytree(workshop / "dataset", tmp_path / "dataset"))


@pytest.mark.parametrize("name", [*SILENT, *LOUD])
def test_what_is_wrong_is_one_sentence(dataset, name):
    spoil, *said = {**SILENT, **LOUD}[name]
    spoil(dataset)
    before = tree(dataset)
    with pytest.raises(ReflowError) as error:
        open_metadata(DatasetConfig(REPO_ID, root=str(dataset)))
    assert all(words in str(error.value) for words in said)
    assert "\n" not in str(error.value)
    assert tree(dataset) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["too many frames", "format v2.1"])
def test_every_command_says_so_before_it_writes_anything(workshop, dataset, tmp_path, capsys, command, name):
    spoil, *said = {**SILENT, **LOUD}[name]
    spoil(dataset)
    before = tree(tmp_path)
    main, flags = COMMANDS[command]
    line = refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=dataset))
    assert all(words in line for words in said)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["pairs", "eval"])
def test_frames_that_lerobot_cannot_open(workshop, dataset, tmp_path, capsys, command):
    (dataset / DATA).write_bytes((dataset / DATA).read_bytes()[:-200])
    main, flags = COMMANDS[command]
    line = refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=dataset))
    assert f"While opening --dataset.root={dataset}" in line
    assert "Parquet magic bytes not found" in line  # and not only "An error occurred while generating the dataset"
    assert not (tmp_path / "out").exists()


# --- what LeRobot trains on -----------------------------------------------------------------------------------


def by_data_files(frames_in_first: int, pointers: list[int]) -> Callable[[Path], None]:
    """Two data files, and a table whose episodes point to these ones."""

    def apply(root: Path) -> None:
        table = pq.read_table(root / DATA)
        pq.write_table(table.slice(frames_in_first), root / DATA.replace("file-000", "file-001"))
        pq.write_table(table.slice(0, frames_in_first), root / DATA)
        column(EPISODES, "data/file_index", lambda files: pointers)(root)

    return apply


UNREAD = {
    "pointers one file off at a roll-over": by_data_files(24, [0] * 5 + [1] * 3),
    "pointers to the first file alone": by_data_files(24, [0] * 8),
    "pointers to files that are not there": by_data_files(24, [7] * 8),
    "a wrong length": column(EPISODES, "length", lambda lengths: [5, *lengths[1:]]),
    "no statistics of a camera": stats(lambda s: s.pop(CAMERA)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_lerobot_does_not_read_is_not_looked_at(workshop, dataset, tmp_path, name):
    UNREAD[name](dataset)
    where = DatasetConfig(REPO_ID, root=str(dataset), use_imagenet_stats="camera" not in name)
    plain = LeRobotDataset(REPO_ID, root=dataset, delta_timestamps={"action": [k / FPS for k in range(6)]})
    metadata = open_metadata(where)
    assert is_downloaded(metadata, where)
    for batch in load_frames(where, range(48), chunk_size=6, batch_size=16):
        for i, frame in enumerate(batch["index"].tolist()):
            for key in ("action", "action_is_pad", "observation.state"):
                assert torch.equal(batch[key][i].reshape(plain[frame][key].shape), plain[frame][key])
    if "camera" not in name:
        reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__root=dataset, steps=1))


def test_a_whole_dataset_is_taken_and_left_as_it_is(dataset):
    before = tree(dataset)
    assert open_metadata(DatasetConfig(REPO_ID, root=str(dataset))).total_frames == 48
    assert tree(dataset) == before


def test_quantiles_are_asked_for_where_a_policy_needs_them(dataset, make_config):
    stats(lambda s: [s["action"].pop(name) for name in ("q01", "q99")])(dataset)
    where = DatasetConfig(REPO_ID, root=str(dataset))
    mapping = {"VISUAL": NormalizationMode.IDENTITY, "STATE": NormalizationMode.MEAN_STD}
    open_metadata(where, make_config(normalization_mapping={**mapping, "ACTION": NormalizationMode.MEAN_STD}))
    with pytest.raises(ReflowError, match=r"'action' has no 'q01'.*augment_dataset_quantile_stats"):
        open_metadata(where, make_config(normalization_mapping={**mapping, "ACTION": NormalizationMode.QUANTILES}))


def test_the_commands_that_mend_a_dataset_exist(tmp_path):
    for command in (compat.statistics_command("me/x", tmp_path), compat.conversion_command("me/x", tmp_path)):
        module = command.split()[2]
        assert module.startswith("lerobot.")
        spec = compat.importlib.util.find_spec(module)
        assert spec is not None
        source = Path(spec.origin).read_text()
        for flag in [word.partition("=")[0] for word in command.split() if word.startswith("--")]:
            assert f'"{flag}"' in source


@pytest.mark.parametrize("missing", [DATA, "videos"])
def test_what_has_to_be_downloaded_first(dataset, video, missing):
    """As after the first look at a dataset on the hub, which downloads `meta/` alone."""
    root = dataset if missing == DATA else video
    where = DatasetConfig(REPO_ID, root=str(root))
    assert is_downloaded(open_metadata(where), where)
    shutil.rmtree(root / missing) if missing == "videos" else (root / missing).unlink()
    assert not is_downloaded(open_metadata(where), where)


def test_a_folder_above_the_dataset(dataset):
    inside = dataset / REPO_ID
    shutil.copytree(dataset / "meta", inside / "meta")
    for name in ("meta", "data"):
        shutil.rmtree(dataset / name)
    with pytest.raises(ReflowError, match=rf"Did you mean --dataset.root={inside}\?"):
        open_metadata(DatasetConfig(REPO_ID, root=str(dataset)))


@pytest.mark.parametrize("revision", [None, "main"])
def test_what_is_nowhere_leaves_no_folder_behind(tmp_path, revision):
    with pytest.raises(ReflowError, match="There is no LeRobotDataset at --dataset.root="):
        open_metadata(DatasetConfig(REPO_ID, root=str(tmp_path / "nowhere"), revision=revision))
    assert not (tmp_path / "nowhere").exists()


def test_fewer_frames_than_a_chunk_are_trained_on(workshop, dataset, tmp_path, capsys):
    """LeRobot pads the chunk."""
    shortened(DATA, 3)(dataset)
    shortened(EPISODES, 1)(dataset)
    column(EPISODES, "length", lambda lengths: [3])(dataset)
    column(EPISODES, "dataset_to_index", lambda stops: [3])(dataset)
    info(total_frames=3, total_episodes=1)(dataset)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__root=dataset, steps=1))
    assert (tmp_path / "run/checkpoints/last").exists()
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "no", dataset__episodes="[]"))
    assert "hold 0 frames" in line


# --- all that LeRobot lets one say ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A dataset like the workshop's whose camera is a video: three episodes of eight frames, each lighter than the
    one before."""
    root = tmp_path_factory.mktemp("video") / "dataset"
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    features = {"observation.state": vector, "action": vector, CAMERA: camera}
    made = LeRobotDataset.create(REPO_ID, fps=FPS, root=root, features=features, use_videos=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for k in range(8):
            state, action = rng.normal(size=(2, 2)).astype(np.float32)
            image = np.full((64, 64, 3), 25 * k, np.uint8)
            made.add_frame({"observation.state": state, "action": action, CAMERA: image, "task": "drive past"})
        made.save_episode()
    made.finalize()
    return root


@pytest.fixture
def video(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "video"))


@pytest.fixture
def off(video: Path) -> Path:
    """The same with every timestamp 0.03 seconds late."""
    column(DATA, "timestamp", lambda times: [t + 0.03 for t in times])(video)
    return video


def told(root: Path, **changes: Any) -> dict[str, Any]:
    """Flags that name a dataset with a video, which pyav decodes wherever it is installed."""
    return {"dataset__root": root, "dataset__video_backend": "pyav", **changes}


@pytest.mark.parametrize("command", COMMANDS)
def test_timestamps_a_little_off(workshop, off, tmp_path, capsys, command):
    main, flags = COMMANDS[command]
    line = refused(capsys, main, flags(workshop, tmp_path / "out", **told(off)))
    assert "violate the tolerance" in line
    assert "--tolerance_s, now 0.0001 seconds" in line
    assert not (tmp_path / "out").exists()
    main(flags(workshop, tmp_path / "out", **told(off, tolerance_s=0.05)))
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_decoder_that_is_not_there(video, num_workers):
    where = DatasetConfig(REPO_ID, root=str(video), video_backend="betamax")
    with pytest.raises(ReflowError, match=r"While reading.*betamax.*--dataset.video_backend"):
        next(load_batches(open_dataset(where), [[0]], num_workers))


def test_images_arrive_as_training_sees_them(video):
    """Between 0 and 1, whatever LeRobot loads them as."""
    dataset = open_dataset(DatasetConfig(REPO_ID, root=str(video), video_backend="pyav"))
    batch = next(load_batches(dataset, [[3, 15]]))
    assert batch[CAMERA].dtype == torch.float32
    expected = torch.tensor([75 / 255, 175 / 255])
    torch.testing.assert_close(batch[CAMERA].flatten(1).mean(1), expected, atol=0.02, rtol=0)
    assert batch["index"].tolist() == [3, 15]


def test_frames_are_those_of_plain_lerobot(workshop):
    """The recorded chunk of each frame, cut at the end of its episode."""
    where = DatasetConfig(REPO_ID, root=str(workshop / "dataset"))
    plain = LeRobotDataset(REPO_ID, root=workshop / "dataset", delta_timestamps={"action": [k / FPS for k in range(6)]})
    batches = list(load_frames(where, [0, 7, 20, 47], chunk_size=6, batch_size=3))
    assert [len(batch["index"]) for batch in batches] == [3, 1]
    for batch, frames in zip(batches, ([0, 7, 20], [47]), strict=True):
        for name in ("action", "action_is_pad", "index"):
            assert torch.equal(batch[name], torch.stack([plain[frame][name] for frame in frames]))
        image = torch.stack([plain[frame][CAMERA] for frame in frames])
        assert torch.equal(batch[CAMERA].reshape(image.shape), image)


@pytest.mark.skipif(
    "eval_split" not in {field.name for field in fields(DatasetConfig)}, reason="LeRobot holds nothing out before 0.6"
)
def test_pairs_are_made_of_what_is_trained_on_and_the_report_of_what_is_not(workshop, tmp_path):
    where = DatasetConfig(REPO_ID, root=str(workshop / "dataset"), eval_split=0.25)
    metadata = open_metadata(where)
    assert chosen_episodes(metadata, where) == [0, 1, 2, 3, 4, 5]
    assert chosen_episodes(metadata, where, held_out=True) == [6, 7]
    pairs_command.main(pairs_flags(workshop, tmp_path / "pairs", dataset__eval_split=0.25))
    assert json.loads((tmp_path / "pairs/manifest.json").read_text())["frames"] == [[0, 36]]
    reflow_train_main(
        reflow_run(workshop, tmp_path / "run", dataset__eval_split=0.25, reflow__pairs_path=tmp_path / "pairs")
    )
    measured = load_frames(where, [0, 11], chunk_size=6, batch_size=2)
    assert next(measured)["index"].tolist() == [36, 47]
    eval_command.main(eval_flags(workshop, tmp_path / "report", dataset__eval_split=0.25, num_frames=100))
    assert json.loads((tmp_path / "report/report.json").read_text())["made_with"]["num_frames"] == 12


@pytest.mark.skipif(
    "exclude_episodes" not in {field.name for field in fields(DatasetConfig)}, reason="from LeRobot 0.6.2 on"
)
def test_episodes_can_be_excluded(workshop):
    where = DatasetConfig(REPO_ID, root=str(workshop / "dataset"), exclude_episodes=[0, 7])
    metadata = open_metadata(where)
    assert frame_ranges(metadata, chosen_episodes(metadata, where)) == [range(6, 42)]
    assert len(open_dataset(where)) == 36


@pytest.mark.skipif(not hasattr(DatasetConfig, "depth_output_unit"), reason="depth cameras exist from LeRobot 0.6 on")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_depth_unit_can_be_said(workshop, tmp_path, capsys, command):
    main, flags = COMMANDS[command]
    main(flags(workshop, tmp_path / "out", dataset__depth_output_unit="m"))
    line = refused(capsys, main, flags(workshop, tmp_path / "no", dataset__depth_output_unit="ells"))
    assert "depth_output_unit must be" in line


@pytest.fixture
def annotated(dataset: Path) -> Path:
    """The dataset with a column of annotations, which differ in length from frame to frame."""
    pytest.importorskip("lerobot.datasets.language")
    table = pq.read_table(dataset / DATA)
    row = {"role": "user", "content": "left", "style": "vqa", "camera": CAMERA, "tool_calls": None}
    rows = [[row] * (index % 3) for index in range(table.num_rows)]
    fields = {**dict.fromkeys(("role", "content", "style", "camera"), pa.string()), "tool_calls": pa.list_(pa.string())}
    kind = pa.list_(pa.struct(list(fields.items())))
    # Hugging Face's own description of the columns, written beside them, would not know the new one.
    table = table.append_column(pa.field("language_events", kind), pa.array(rows, kind)).replace_schema_metadata(None)
    pq.write_table(table, dataset / DATA)
    feature = {"language_events": {"dtype": "language", "shape": [1], "names": None}}
    edit(dataset / "meta/info.json", lambda i: i["features"].update(feature))
    return dataset


@pytest.mark.parametrize("command", COMMANDS)
def test_annotations_of_any_length(workshop, annotated, tmp_path, command):
    main, flags = COMMANDS[command]
    main(flags(workshop, tmp_path / "out", dataset__root=annotated))


@pytest.mark.skipif(not hasattr(DatasetConfig, "return_uint8"), reason="LeRobot 0.4 cannot stream images")
def test_training_may_stream(workshop, tmp_path):
    """LeRobot streams in as many parts as there are workers."""
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__streaming=True, num_workers=1))


@pytest.mark.parametrize("command", ["pairs", "eval"])
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("dataset__streaming", "leave it out, and the dataset is downloaded"),
        ("dataset__image_transforms.enable", "the images as they were recorded; leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do_instead(workshop, tmp_path, capsys, command, flag, says):
    main, flags = COMMANDS[command]
    assert says in refused(capsys, main, flags(workshop, tmp_path / "out", **{flag: True}))


@pytest.fixture
def home(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder with the workshop in it."""
    (tmp_path / "home").mkdir()
    os.symlink(workshop, tmp_path / "home/workshop")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "home"
    assert not (tmp_path / "~").exists()


def test_a_tilde_means_the_home_folder(home):
    there = Path("~/workshop")
    pairs_command.main(pairs_flags(there, Path("~/pairs")))
    assert (home / "pairs/manifest.json").is_file()
    teacher = "~/workshop/1rf/checkpoints/last/pretrained_model"
    eval_command.main(eval_flags(there, Path("~/report"), teacher_path=teacher, earlier_rounds=f"[{teacher}]"))
    assert (home / "report/report.json").is_file()
