"""Files as users have them, which LeRobot trains on or fails at; each fault is one sentence that names its cause."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from editing import COMMANDS, DATA, Change, column, edit_step, edited, stats, tokenizer_at
from helpers import eval_flags, eval_main, reflow_run, reflow_train_main, refused, saved_config
from people import dataset_flags, edit_json

from smolvla_reflow.compat import renamed_early
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import CAMERA


def camera(**changes) -> Change:
    return edited("meta/info.json", lambda content: content["features"][CAMERA].update(changes))


def renamed(old: str, new: str) -> Change:
    """Another name for a column of a dataset."""

    def apply(root: Path) -> None:
        for file in (root / "meta/info.json", root / "meta/stats.json"):
            file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
        table = pq.read_table(root / DATA)
        names = [new if name == old else name for name in table.column_names]
        pq.write_table(table.rename_columns(names).replace_schema_metadata(None), root / DATA)

    return apply


def nan_in(name: str, *frames: int) -> Change:
    return column(DATA, name, lambda rows: [[math.nan, 0.0] if i in frames else row for i, row in enumerate(rows)])


def cut_picture(frame: int) -> Change:
    def cut(rows: list) -> list:
        return [{**row, "bytes": row["bytes"][:60]} if i == frame else row for i, row in enumerate(rows)]

    return column(DATA, CAMERA, cut)


READING = r"While reading the features in .*/meta/info\.json: "
FAULTS = {
    "names null": (camera(names=None), READING + "TypeError: 'NoneType' object is not subscriptable"),
    "no names": (
        edited("meta/info.json", lambda content: content["features"][CAMERA].pop("names")),
        READING + "KeyError: 'names'",
    ),
    "two dimensions": (camera(shape=[32, 32], names=["height", "width"]), READING + "ValueError: Number of dimensions"),
    "no prefix": (renamed(CAMERA, "front"), "the dataset has front; map .*names that begin with 'observation.'"),
    "NaN in states": (
        nan_in("observation.state", 7, 31),
        r"state' holds NaN .* 2 of 48 frames: 7, 31 \(in episodes 1, 5",
    ),
    "NaN in many actions": (
        nan_in("action", *range(12)),
        r"'action' .* 12 of 48 .*7, 8, 9 and 2 more \(in episodes 0, 1\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_is_one_sentence_and_nothing_is_written(workshop, dataset, tmp_path, capsys, command, name):
    spoil, says = FAULTS[name]
    spoil(dataset)
    main, flags = COMMANDS[command]
    line = refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=dataset))
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_episodes_with_nan_can_be_left_out(workshop, dataset, tmp_path):
    nan_in("observation.state", 7, 31)(dataset)
    reflow_train_main(
        reflow_run(workshop, tmp_path / "run", dataset__root=dataset, dataset__episodes="[0,2,3]", steps=1)
    )


def test_nan_in_statistics_that_nobody_uses(workshop, dataset, tmp_path):
    stats(lambda s: s.update({"observation.force": {"mean": [math.nan], "std": [math.nan]}}))(dataset)
    for name, (main, flags) in COMMANDS.items():
        main(flags(workshop, tmp_path / name, dataset__root=dataset))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_was_cut_off_is_named(workshop, dataset, tmp_path, capsys, command, num_workers):
    cut_picture(20)(dataset)
    main, flags = COMMANDS[command]
    more = {"eval": {"num_frames": 48}, "train": {"num_workers": num_workers}, "pairs": {"num_workers": num_workers}}
    line = refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=dataset, **more[command]))
    assert re.search(r"While reading frame 20 of the dataset \(episode 3\): .*truncated", line), line
    assert "Traceback" not in line


@pytest.mark.slow
def test_a_picture_that_is_met_later_leaves_the_run_to_go_on_from(workshop, dataset, tmp_path, capsys):
    """With the episode left out, it does."""
    cut_picture(20)(dataset)
    flags = reflow_run(workshop, tmp_path / "run", dataset__root=dataset, batch_size=2, steps=24, save_freq=1, seed=2)
    line = refused(capsys, reflow_train_main, flags)
    assert "While reading frame 20 " in line
    go_on = line.partition("last good checkpoint with ")[2].partition(" (--debug")[0].split()
    reflow_train_main([*go_on, "--dataset.episodes=[0,1,2,4,5,6,7]"])
    assert (tmp_path / "run/checkpoints/000024").is_dir()


@pytest.mark.parametrize("command", COMMANDS)
def test_brackets_in_a_path(workshop, dataset, tmp_path, capsys, command):
    """Hugging Face's datasets take them for a pattern."""
    root = Path(shutil.copytree(dataset, tmp_path / "a[b]" / "dataset"))
    main, flags = COMMANDS[command]
    line = refused(capsys, main, flags(workshop, tmp_path / "out", dataset__root=root))
    assert re.search(r"While opening .*take \[, \], \* and \? in a path for a pattern; rename the folder", line), line


@pytest.mark.slow
def test_a_home_that_cannot_be_written(workshop, tmp_path):
    """The home is a file. The dataset is whole, and is not called damaged."""
    (tmp_path / "home").touch()
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home/hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "smolvla_reflow.commands.train", *reflow_run(workshop, tmp_path / "run")]
    result = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr[-2000:]
    line = result.stderr.splitlines()[-1]
    assert re.search(r"NotADirectoryError: .*/home/hf.*is no file of the dataset\. HOME and HF_HOME say", line), line


def test_one_of_two_cameras_without_its_prefix_is_said(people, tmp_path, caplog):
    """LeRobot drops the camera in silence and trains on the other, up to 0.6.1. Then it renames the camera first."""
    data = Path(shutil.copytree(people.dataset, tmp_path / "dataset"))
    renamed("observation.images.front", "front")(data)
    rename = json.dumps(
        {"front": "observation.images.camera1", "observation.images.wrist": "observation.images.camera2"}
    )
    given = {"reflow__teacher_path": people.teacher, "output_dir": tmp_path / "run", "rename_map": rename, "steps": 1}
    reflow_train_main(dataset_flags(data, **given))
    said = "LeRobot drops front of the dataset, since a camera's name has to begin with 'observation.'"
    assert (said in caplog.text) is not bool(renamed_early({"front": "observation.images.camera1"}))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_that_lerobot_does_not_implement(workshop, teacher, tmp_path, capsys, command):
    edit_json(teacher / "config.json", use_delta_joint_actions_aloha=True)
    main, flags = COMMANDS[command]
    named = {"policy__path": teacher} if command == "eval" else {"reflow__teacher_path": teacher}
    line = refused(capsys, main, flags(workshop, tmp_path / "out", **named))
    assert re.search(r"While reading .*config.json with LeRobot .*: NotImplementedError: `use_delta", line), line


@pytest.fixture
def copied_run(workshop, tmp_path):
    """The workshop's run, copied by a tool that leaves out symbolic links."""
    run = Path(shutil.copytree(workshop / "1rf", tmp_path / "1rf", symlinks=True))
    (run / "checkpoints/last").unlink()
    return run


@pytest.mark.parametrize("name", ["", str(LAST)])
def test_a_runs_folder_without_last_means_its_newest_checkpoint(workshop, copied_run, tmp_path, name):
    """For every command, and with an output folder that is there and empty."""
    newest, path = copied_run / "checkpoints/000030/pretrained_model", copied_run / name
    (tmp_path / "report").mkdir()
    report = eval_main(eval_flags(workshop, tmp_path / "report", policy__path=path, num_frames=2))
    assert report["made_with"]["policy's path"] == str(newest)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", reflow__teacher_path=path, steps=1))
    assert saved_config(tmp_path / "run")["reflow"]["teacher_path"] == str(newest)


def test_a_file_system_without_symbolic_links(workshop, teacher, tmp_path, capsys, monkeypatch):
    """LeRobot stops at its first checkpoint there. The run goes on, says so once, and can be continued.

    The teacher's tokenizer is in its folder, so that the student starts from a folder of links to the teacher's files.
    """
    tokenizer = Path(shutil.copytree(workshop / "backbone", teacher / "words"))
    edit_step(teacher, "tokenizer_processor", tokenizer_at(str(tokenizer)))

    def symlink(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", symlink)
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, save_freq=1, steps=2, reflow__teacher_path=teacher))
    out, err = capsys.readouterr()
    assert (out + err).count(
        "can hold no symbolic links (Operation not supported), so the run goes on without last"
    ) == 1
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=3"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000001", "000002", "000003"]
    monkeypatch.undo()
    (run / "link").symlink_to("checkpoints")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "symlink", lambda *args, **kwargs: (_ for _ in ()).throw(full))
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "full", steps=1))
    assert "No space left on device" in line
