"""An interrupted evaluation: its finished parts, the same command again, and the one bar over all parts."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import draccus
import pytest
from helpers import change_config, driven_flags, eval_main, refused
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands.console import load_plugins, parsed
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID, write_dataset
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import run, stages
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.journal import NAME, journal_in
from smolvla_reflow.evaluation.key import key_of


def without_latencies(report: dict) -> dict:
    for row in report["rows"]:
        for name in ("latency_ms_p50", "latency_ms_p95", "speedup"):
            del row[name]
    del report["chunk_time"]
    return report


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """The report of an uninterrupted command."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    report = eval_main(driven_flags(workshop, folder))
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    return without_latencies(report)


@pytest.mark.parametrize(("where", "name"), [("measure_batch", "frames"), ("drive", "episodes")])
def test_the_same_command_goes_on_and_ends_in_the_same_report(
    workshop, whole, tmp_path, monkeypatch, capsys, where, name
):
    """Interrupted in the second part of each stage; finished parts are not measured again. Another command is refused."""
    stock, calls, folder = getattr(stages, where), [], tmp_path / "r"

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(stages, where, interrupted)
    with pytest.raises(SystemExit) as exit:
        eval_main(driven_flags(workshop, folder))
    assert exit.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    so_far = json.loads((folder / "report.json").read_text())
    assert not so_far["complete"]
    assert [row["num_steps"] for row in so_far["rows"]] == [1, 2, 10]
    unfinished = "This report is unfinished: the same command goes on with it."
    assert unfinished in (folder / "report.md").read_text()
    assert len([file for file in (folder / NAME).iterdir() if file.name.startswith(name)]) == 1

    kept = {file: file.read_bytes() for file in folder.rglob("*.*")}
    line = refused(capsys, eval_main, driven_flags(workshop, folder, num_frames=6))
    assert "holds another evaluation, which is unfinished (num_frames was 5 and is 6; frames was" in line
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == kept

    before = len(calls)
    assert without_latencies(eval_main(driven_flags(workshop, folder))) == whole
    assert len(calls) - before == 3 - 1
    assert unfinished not in (folder / "report.md").read_text()
    assert not (folder / NAME).exists()


def test_the_report_grows_under_one_bar(workshop, tmp_path, monkeypatch, capsys):
    """Written after every part in this test, it is there before the first episode. LeRobot's own bars are hidden; ours
    names each part. Latencies are measured on a frame of the first batch alone."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_WRITES", -1.0)
    drive, seen, timed = stages.drive, [], []

    def look(*args, **kwargs):
        seen.append(json.loads((tmp_path / "report.json").read_text()))
        return drive(*args, **kwargs)

    def held(policies, frame):
        timed.append(frame["index"].tolist())
        return [[[1.0 + n] * 3 for n in numbers] for _, numbers in policies], 0.0

    monkeypatch.setattr(stages, "drive", look)
    monkeypatch.setattr(stages, "measure_rounds", held)
    eval_main(driven_flags(workshop, tmp_path))  # an empty folder is taken
    assert [report["complete"] for report in seen] == [False] * 3
    assert [sum(row["success"] is not None for row in report["rows"]) for report in seen] == [0, 1, 2]
    assert all(row["latency_ms_p50"] for row in seen[0]["rows"])
    assert timed == [[0]]
    shown = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", shown) if "%|" in line]
    named = {line.partition(":")[0] for line in lines[1:]}
    of_steps = [f"episodes of the policy at num_steps={n}" for n in (1, 2, 10)]
    assert named == {"frames 0 to 12", "frames 24 to 35", "frames 47 to 47", "latency", *of_steps}
    assert "Stepping through" not in shown


def test_the_journal_keeps_finished_parts(tmp_path):
    with pytest.raises(ZeroDivisionError), journal_in(tmp_path / "r", {}) as journal:
        journal.recall("a", lambda: 1 / 0)
    assert not (tmp_path / "r").exists()  # until a part is finished
    with journal_in(tmp_path, {"seed": 0}) as first:
        assert first.recall("a", lambda: [1.5]) == [1.5]
        assert first.recall("b", lambda: {"x": 1 / 3}) == {"x": 1 / 3}
    (tmp_path / NAME / "c.json.partial").write_bytes(b"[1, 2")  # interrupted while it was being written
    with journal_in(tmp_path, {"seed": 0}) as again:
        assert again.parts == {"a": [1.5], "b": {"x": 1 / 3}}
        assert again.recall("a", lambda: pytest.fail("measured again")) == [1.5]
        assert again.recall("c", lambda: 3) == 3
    (tmp_path / NAME / "a.json").write_text("[1.")
    with pytest.raises(ReflowError, match=f"While reading .*remove {tmp_path} to begin anew"), journal_in(tmp_path, {}):
        pass
    (tmp_path / NAME / "a.json").write_text("[1.5]")
    with journal_in(tmp_path, {"seed": 0}) as last:
        assert last.parts == {"a": [1.5], "b": {"x": 1 / 3}, "c": 3}
        last.remove()
    assert list(tmp_path.iterdir()) == []  # the folder itself was there before


def test_a_second_command_in_the_same_folder_waits_outside(tmp_path):
    """Another process finds the first one's lock, and leaves the parts alone; once the first has ended, it goes on."""
    script = f"""
        from pathlib import Path
        from smolvla_reflow.evaluation.journal import journal_in
        with journal_in(Path({str(tmp_path)!r}), {{"seed": 0}}) as journal:
            print(journal.parts)
    """

    def second():
        command = [sys.executable, "-c", textwrap.dedent(script)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    with journal_in(tmp_path, {"seed": 0}) as journal:
        journal.recall("a", lambda: 1)
        held = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
        refused_one = second()
        assert "ReflowError: Another smolvla-reflow-eval is at work in --output_dir" in refused_one.stderr
        assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == held
    assert second().stdout == "{'a': 1}\n"


def leaves(values: object, name: str = "") -> dict[str, object]:
    """Every single value, by its dotted name."""
    if isinstance(values, dict) and values:
        return {k: v for key, each in values.items() for k, v in leaves(each, f"{name}.{key}".strip(".")).items()}
    return {name: values}


def test_every_flag_is_part_of_the_key(workshop, tmp_path):
    """But two, which change no number. So a flag that is added belongs to the key, too."""
    argv = [*driven_flags(workshop, tmp_path / "r"), "--teacher_path=there"]
    cfg = parsed(EvalConfig, load_plugins(argv))
    checkpoints = {"policy": open_checkpoint(workshop / "1rf" / LAST)}
    dataset = LeRobotDataset(REPO_ID, root=workshop / "dataset")
    found, flags = key_of(cfg, checkpoints, dataset, [0, 7]), leaves(draccus.encode(cfg))
    assert flags.keys() - found.keys() == {"output_dir", "write_num_steps"}
    assert {name: found[name] for name in flags if name in found} == {n: v for n, v in flags.items() if n in found}
    for flag in ("dataset.root", "dataset.revision", "rename_map", "tolerance_s", "eval.batch_size", "policy.device"):
        assert flag in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: change_config(folder, num_steps=3), "policy's num_steps was 10 and is 3"),
        (lambda folder: change_config(folder, n_action_steps=3), "policy's n_action_steps was 2 and is 3"),
        (lambda folder: change_weights(folder), "policy's fingerprint was"),
        (lambda folder: change_processor(folder), "policy's processors.policy_preprocessor.json was"),
    ],
)
def test_a_checkpoint_that_has_changed_is_another_evaluation(workshop, tmp_path, change, named):
    folder = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "checkpoint"))
    dataset = LeRobotDataset(REPO_ID, root=workshop / "dataset")
    cfg = parsed(EvalConfig, load_plugins(driven_flags(workshop, tmp_path / "r", policy__path=folder)))
    with journal_in(tmp_path / "r", key_of(cfg, {"policy": open_checkpoint(folder)}, dataset, [0])) as journal:
        journal.recall("a", lambda: 1)
    change(folder)
    with pytest.raises(ReflowError, match=re.escape(named)):
        journal_in(tmp_path / "r", key_of(cfg, {"policy": open_checkpoint(folder)}, dataset, [0])).__enter__()


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.action_out_proj.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_processor(folder: Path) -> None:
    file = folder / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"rename_map": {}', '"rename_map": {"a": "b"}'))


def test_other_frames_and_another_dataset_are_another_evaluation(workshop, tmp_path):
    """Half of a dataset's evaluation, continued on a dataset of the same size elsewhere; and other statistics."""
    write_dataset(tmp_path / "b", 8, seed=5)
    cfg = parsed(EvalConfig, load_plugins(driven_flags(workshop, tmp_path / "r")))
    checkpoints = {"policy": open_checkpoint(workshop / "1rf" / LAST)}

    def key(root, positions):
        return key_of(cfg, checkpoints, LeRobotDataset(REPO_ID, root=root), positions)

    first = key(workshop / "dataset", [0, 7])
    assert key(workshop / "dataset", [0, 7]) == first
    moved = Path(shutil.copytree(workshop / "dataset", tmp_path / "moved"))
    assert key(moved, [0, 7]) == first
    assert changed(first, key(workshop / "dataset", [0, 8])) == {"frames"}
    assert changed(first, key(tmp_path / "b", [0, 7])) == {"frames", "statistics of the dataset"}
    stats = json.loads((moved / "meta/stats.json").read_text())
    stats["action"]["std"] = [2 * each for each in stats["action"]["std"]]
    (moved / "meta/stats.json").write_text(json.dumps(stats))
    assert changed(first, key(moved, [0, 7])) == {"statistics of the dataset"}


def test_another_version_of_a_package_is_another_evaluation(workshop, tmp_path, monkeypatch):
    cfg = parsed(EvalConfig, load_plugins(driven_flags(workshop, tmp_path / "r")))
    dataset = LeRobotDataset(REPO_ID, root=workshop / "dataset")
    first = key_of(cfg, {}, dataset, [0])
    monkeypatch.setattr("smolvla_reflow.evaluation.key.version", lambda package: f"another {package}")
    packages = ("smolvla-reflow", "lerobot", "torch", "transformers")
    assert changed(first, key_of(cfg, {}, dataset, [0])) == {f"version of {package}" for package in packages}


def changed(one: dict, other: dict) -> set[str]:
    return {name for name in {**one, **other} if one.get(name) != other.get(name)}
