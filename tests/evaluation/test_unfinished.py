"""An interrupted evaluation: its finished parts, the same command again, and the one bar over all parts."""

import json
import re

import pytest
from helpers import eval_flags, refused

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import run, stages
from smolvla_reflow.evaluation.journal import NAME, Journal

DRIVEN = {
    "num_frames": 5,
    "batch_size": 2,
    "reference_steps": 4,
    "env__type": "drive_past",
    "eval__n_episodes": 4,
    "eval__batch_size": 4,
    "eval__use_async_envs": "false",
}
PLUGIN = "--env.discover_packages_path=smolvla_reflow.demo"


def flags(workshop, output_dir, **changes):
    return [PLUGIN, *eval_flags(workshop, output_dir, **{**DRIVEN, **changes})]


def without_latencies(folder) -> dict:
    report = json.loads((folder / "report.json").read_text())
    for row in report["rows"]:
        for name in ("latency_ms_p50", "latency_ms_p95", "speedup"):
            del row[name]
    del report["chunk_parts"]
    return report


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """The report of an uninterrupted command."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    eval_command.main(flags(workshop, folder))
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    return without_latencies(folder)


@pytest.mark.parametrize(
    ("where", "name"), [("measure_batch", "frames"), ("measure_latency", "latency"), ("drive", "episodes")]
)
def test_the_same_command_goes_on_and_ends_in_the_same_report(
    workshop, whole, tmp_path, monkeypatch, capsys, where, name
):
    """Interrupted in the second part of each stage; finished parts are not measured again."""
    stock, calls = getattr(stages, where), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(stages, where, interrupted)
    with pytest.raises(SystemExit) as exit:
        eval_command.main(flags(workshop, tmp_path / "r"))
    assert exit.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    so_far = json.loads((tmp_path / "r" / "report.json").read_text())
    assert not so_far["complete"]
    assert [row["num_steps"] for row in so_far["rows"]] == [1, 2, 10]
    unfinished = "This report is unfinished: the same command goes on with it."
    assert unfinished in (tmp_path / "r" / "report.md").read_text()
    assert len([file for file in (tmp_path / "r" / NAME).iterdir() if file.name.startswith(name)]) == 1

    before = len(calls)
    eval_command.main(flags(workshop, tmp_path / "r"))
    assert len(calls) - before == 3 - 1
    assert without_latencies(tmp_path / "r") == whole
    assert unfinished not in (tmp_path / "r" / "report.md").read_text()
    assert not (tmp_path / "r" / NAME).exists()


def test_the_report_grows(workshop, tmp_path, monkeypatch):
    """Written after every part in this test, it is there before the first episode."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_WRITES", -1.0)
    stock, seen = stages.drive, []

    def look(*args, **kwargs):
        seen.append(json.loads((tmp_path / "r" / "report.json").read_text()))
        return stock(*args, **kwargs)

    monkeypatch.setattr(stages, "drive", look)
    eval_command.main(flags(workshop, tmp_path / "r"))
    assert [report["complete"] for report in seen] == [False] * 3
    assert [sum(row["success"] is not None for row in report["rows"]) for report in seen] == [0, 1, 2]
    assert all(row["latency_ms_p50"] for row in seen[0]["rows"])


def test_another_command_does_not_go_on(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "measure_latency", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        eval_command.main(flags(workshop, tmp_path / "r"))
    kept = {file: file.read_bytes() for file in (tmp_path / "r").rglob("*.*")}
    line = refused(capsys, eval_command.main, flags(workshop, tmp_path / "r", num_frames=6))
    assert "holds another evaluation, which is unfinished (num_frames was 5 and is 6)" in line
    assert {file: file.read_bytes() for file in (tmp_path / "r").rglob("*.*")} == kept


def test_the_journal_keeps_finished_parts(tmp_path):
    first = Journal(tmp_path, {"seed": 0})
    assert first.recall("a", lambda: [1.5]) == [1.5]
    assert first.recall("b", lambda: {"x": 1 / 3}) == {"x": 1 / 3}
    (tmp_path / NAME / "c.json.partial").write_bytes(b"[1, 2")  # interrupted while it was being written
    again = Journal(tmp_path, {"seed": 0})
    assert again.parts == {"a": [1.5], "b": {"x": 1 / 3}}
    assert again.recall("a", lambda: pytest.fail("measured again")) == [1.5]
    assert again.recall("c", lambda: 3) == 3
    assert Journal(tmp_path, {"seed": 0}).parts == {"a": [1.5], "b": {"x": 1 / 3}, "c": 3}
    (tmp_path / NAME / "a.json").write_text("[1.")
    with pytest.raises(ReflowError, match=f"While reading .*remove {tmp_path} to begin anew"):
        Journal(tmp_path, {"seed": 0})


def test_nothing_is_written_before_the_first_part_is_finished(tmp_path):
    journal = Journal(tmp_path / "r", {})
    with pytest.raises(ZeroDivisionError):
        journal.recall("a", lambda: 1 / 0)
    assert not (tmp_path / "r").exists()


def test_one_bar_is_all_that_is_shown(workshop, tmp_path, capsys):
    """LeRobot's own bars are hidden; ours names each part."""
    (tmp_path / "r").mkdir()  # an empty folder is taken
    eval_command.main(flags(workshop, tmp_path / "r"))
    shown = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", shown) if "%|" in line]
    named = {line.partition(":")[0] for line in lines[1:]}
    of_steps = [f"{kind} of the policy at num_steps={n}" for kind in ("latency", "episodes") for n in (1, 2, 10)]
    assert named == {"frames 0 to 12", "frames 24 to 35", "frames 47 to 47", "parts of a chunk", *of_steps}
    assert "Stepping through" not in shown


def test_latencies_are_measured_on_a_frame_of_the_first_batch_alone(workshop, tmp_path, monkeypatch):
    seen = []

    def held(policy, frame, num_steps):
        seen.append(frame["index"].tolist())
        return {"p50": 1.0, "p95": 1.0}

    monkeypatch.setattr(stages, "measure_latency", held)
    eval_command.main(eval_flags(workshop, tmp_path / "r", num_frames=4, reference_steps=2))
    assert seen == [[0]] * 3
