"""An evaluation that is broken off: what is kept, the same command again, and the one bar over all of it."""

import io
import json
import re
import time

import pytest
from helpers import eval_flags, refused

from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import latency, run, stages
from smolvla_reflow.evaluation.journal import NAME, Journal
from smolvla_reflow.evaluation.progress import Progress

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
    """The report of a command that nothing broke off."""
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
    """Broken off in the second part of each stage; what came before is not measured again."""
    stock, calls = getattr(stages, where), []

    def broken_off(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(stages, where, broken_off)
    with pytest.raises(SystemExit) as exit:
        eval_command.main(flags(workshop, tmp_path / "r"))
    assert exit.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    so_far = json.loads((tmp_path / "r" / "report.json").read_text())
    assert not so_far["complete"]
    assert [row["num_steps"] for row in so_far["rows"]] == [1, 2, 10]
    kept = [json.loads(line) for line in (tmp_path / "r" / NAME).read_text().splitlines()][1:]
    assert sum(next(iter(part)).startswith(name) for part in kept) == 1

    before = len(calls)
    eval_command.main(flags(workshop, tmp_path / "r"))
    parts = {"frames": 3, "latency": 3, "episodes": 3}[name]
    assert len(calls) - before == parts - 1
    assert without_latencies(tmp_path / "r") == whole
    assert not (tmp_path / "r" / NAME).exists()


def test_the_report_grows(workshop, tmp_path, monkeypatch):
    """Written after every part here, it is there, and unfinished, before the first episode."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_WRITES", -1.0)
    stock, seen = stages.drive, []

    def look(*args, **kwargs):
        seen.append(json.loads((tmp_path / "r" / "report.json").read_text()))
        seen[-1]["said"] = (tmp_path / "r" / "report.md").read_text()
        return stock(*args, **kwargs)

    monkeypatch.setattr(stages, "drive", look)
    eval_command.main(flags(workshop, tmp_path / "r"))
    assert [report["complete"] for report in seen] == [False] * 3
    assert [sum(row["success"] is not None for row in report["rows"]) for report in seen] == [0, 1, 2]
    assert all(row["latency_ms_p50"] for row in seen[0]["rows"])
    assert "This report is unfinished: the same command goes on with it." in seen[0]["said"]
    assert "unfinished" not in (tmp_path / "r" / "report.md").read_text()


def test_another_command_does_not_go_on(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "measure_latency", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        eval_command.main(flags(workshop, tmp_path / "r"))
    kept = (tmp_path / "r" / NAME).read_bytes()
    line = refused(capsys, eval_command.main, flags(workshop, tmp_path / "r", num_frames=6))
    assert "holds an evaluation that was broken off, and is another one (num_frames is 5 there and 6 here)" in line
    assert (tmp_path / "r" / NAME).read_bytes() == kept


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    first = Journal(tmp_path, {"seed": 0})
    assert first.recall("a", lambda: [1.5]) == [1.5]
    assert first.recall("b", lambda: {"x": 2}) == {"x": 2}
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"c": [1, 2')
    again = Journal(tmp_path, {"seed": 0})
    assert again.parts == {"a": [1.5], "b": {"x": 2}}
    assert again.recall("a", lambda: pytest.fail("measured again")) == [1.5]
    assert again.recall("c", lambda: 3) == 3
    assert Journal(tmp_path, {"seed": 0}).parts == {"a": [1.5], "b": {"x": 2}, "c": 3}


def test_a_journal_that_is_damaged_is_refused(tmp_path):
    Journal(tmp_path, {}).recall("a", lambda: 1)
    (tmp_path / NAME).write_text('{}\n{"a": \n')
    with pytest.raises(ReflowError, match="cannot be read .*; remove it to begin anew"):
        Journal(tmp_path, {})


def test_nothing_is_written_before_the_first_part_is_finished(tmp_path):
    journal = Journal(tmp_path / "r", {})
    with pytest.raises(ZeroDivisionError):
        journal.recall("a", lambda: 1 / 0)
    assert not (tmp_path / "r").exists()


def test_the_time_left_is_that_of_each_kind_at_its_own_pace(monkeypatch):
    """By a clock of its own: frames take 2 s each, latencies 1 s, and of the episodes nothing is known at first."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def takes(seconds):
        def part():
            clock[0] += seconds

        return part

    bar = Progress({"frames": 3, "latency": 2, "episodes": 2})
    assert bar.seconds_left() is None
    bar.run("frames", "frames 0 to 1", takes(2))
    assert bar.seconds_left() == 2 * 2 + 2 * 2 + 2 * 2  # all at the only pace there is
    bar.run("latency", "latency", takes(1))
    assert bar.seconds_left() == 2 * 2 + 1 * 1 + 2 * 2  # the episodes at the slowest
    bar.skip("frames")
    bar.run("episodes", "episodes", takes(10))
    assert bar.seconds_left() == 1 * 2 + 1 * 1 + 1 * 10
    assert bar.bar.n == pytest.approx(13 / (13 + 13))
    bar.close()


def test_one_bar_is_all_that_is_shown(workshop, tmp_path, capsys):
    """LeRobot's own bars, one in another, are not: every line is of ours, and it names each stage."""
    eval_command.main(flags(workshop, tmp_path / "r"))
    shown = capsys.readouterr().err
    lines = [line for line in re.split(r"[\r\n]+", shown) if "|" in line]
    assert all(re.match(r"(starting|frames|latency|parts|episodes)[^|]*:\s+\d+%\|", line) for line in lines), lines
    for stage in ("frames 0 to", "latency of the policy at num_steps=1", "episodes of the policy at num_steps=10"):
        assert any(line.startswith(stage) for line in lines)
    assert re.search(r"about \d\d:\d\d left", lines[-1])
    assert "Stepping through" not in shown


def test_latencies_are_measured_on_a_frame_of_the_first_batch_alone(workshop, tmp_path, monkeypatch):
    seen = []

    def held(policy, frame, num_steps):
        seen.append(frame["index"].tolist())
        return latency.Latency(1.0, 1.0)

    monkeypatch.setattr(stages, "measure_latency", held)
    eval_command.main(eval_flags(workshop, tmp_path / "r", num_frames=4, reference_steps=2))
    assert seen == [[0]] * 3


def test_the_bar_goes_to_stderr():
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        bar = Progress({"frames": 1})
        bar.run("frames", "frames 0 to 3", lambda: print("noise", file=__import__("sys").stderr))
        bar.close()
    assert "frames 0 to 3" in stream.getvalue()
    assert "noise" not in stream.getvalue()
