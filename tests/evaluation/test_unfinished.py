"""An interrupted evaluation: its finished parts, the same command again, and the one bar over all parts."""

import json
import re

import pytest
from helpers import driven_flags, eval_main, refused

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import run, stages
from smolvla_reflow.evaluation.journal import NAME, Journal


def without_latencies(report: dict) -> dict:
    for row in report["rows"]:
        for name in ("latency_ms_p50", "latency_ms_p95", "speedup"):
            del row[name]
    del report["chunk_parts"]
    return report


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """The report of an uninterrupted command."""
    folder = tmp_path_factory.mktemp("whole") / "report"
    report = eval_main(driven_flags(workshop, folder))
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    return without_latencies(report)


@pytest.mark.parametrize(
    ("where", "name"), [("measure_batch", "frames"), ("measure_latency", "latency"), ("drive", "episodes")]
)
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
    assert "holds another evaluation, which is unfinished (num_frames was 5 and is 6)" in line
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

    def held(policy, frame, num_steps):
        timed.append(frame["index"].tolist())
        return {"p50": 1.0, "p95": 1.0}

    monkeypatch.setattr(stages, "drive", look)
    monkeypatch.setattr(stages, "measure_latency", held)
    eval_main(driven_flags(workshop, tmp_path))  # an empty folder is taken
    assert [report["complete"] for report in seen] == [False] * 3
    assert [sum(row["success"] is not None for row in report["rows"]) for report in seen] == [0, 1, 2]
    assert all(row["latency_ms_p50"] for row in seen[0]["rows"])
    assert timed == [[0]] * 3
    shown = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", shown) if "%|" in line]
    named = {line.partition(":")[0] for line in lines[1:]}
    of_steps = [f"{kind} of the policy at num_steps={n}" for kind in ("latency", "episodes") for n in (1, 2, 10)]
    assert named == {"frames 0 to 12", "frames 24 to 35", "frames 47 to 47", "parts of a chunk", *of_steps}
    assert "Stepping through" not in shown


def test_the_journal_keeps_finished_parts(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Journal(tmp_path / "r", {}).recall("a", lambda: 1 / 0)
    assert not (tmp_path / "r").exists()  # until a part is finished
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
