"""Making pairs: whatever interrupts it, nothing is lost; what is damaged is found; users are told what is wrong."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time as clock
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import EPISODES_HAVE_TO_EXIST, reflow_run, reflow_train_main, refused, torchrun
from pairs_helpers import contents, make_pairs, pairs_flags
from people import edit_json
from safetensors.torch import load_file, save_file

from smolvla_reflow import Pairs, ReflowError, Solver
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.pairs import make as make_module
from smolvla_reflow.pairs.manifest import not_as_written, read_manifest


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 8))
def test_interrupted_at_any_write_the_resumed_files_are_the_same(workshop, stored, tmp_path, monkeypatch, moment):
    """Seven files are renamed into place: the manifest, and for each of three shards the shard and the manifest."""
    folder, renames = tmp_path / "pairs", iter(range(1, 100))
    rename = Path.replace

    def dying(path, target):
        if next(renames) == moment:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(Killed):
            make_pairs(workshop, folder)
    if moment > 1:
        assert len(read_manifest(folder).unfinished) == 3 - (moment - 2) // 2
        with pytest.raises(ReflowError, match=r"unfinished: \d of 3 shards are missing.*again with the same"):
            Pairs(folder)
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


@pytest.mark.slow
def test_kill_9_and_again(workshop, stored, tmp_path):
    folder = tmp_path / "pairs"
    command = [sys.executable, "-m", "smolvla_reflow.commands.pairs", *pairs_flags(workshop, folder)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # with more, the last bits differ from those of `stored`
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    deadline = clock.monotonic() + 120
    while not (folder / "pairs-00000.safetensors").exists() and process.poll() is None:
        assert clock.monotonic() < deadline
        clock.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


def test_each_teacher_has_noise_of_its_own_by_default(workshop, tmp_path):
    """So the second round of reflow does not answer the noises that the first round memorised."""
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1))
    teachers = {"first": workshop / "1rf" / LAST, "second": tmp_path / "run" / LAST}
    seeds = {}
    for name, teacher in teachers.items():
        changes = {"reflow__teacher_path": teacher, "seed": None, "dataset__episodes": "[0]"}
        make_pairs(workshop, tmp_path / name, **changes)
        make_pairs(workshop, tmp_path / name, **changes)  # the same command finds the same seed
        seeds[name] = read_manifest(tmp_path / name).provenance.seed
        assert seeds[name] == int(open_checkpoint(teacher).fingerprint()[:8], base=16)
    assert seeds["first"] != seeds["second"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_what_fails_later_is_continued(workshop, stored, tmp_path, capsys, monkeypatch, error):
    """With the second shard, which is the fourth write."""
    folder, writes, write = tmp_path / "pairs", iter(range(1, 100)), os.fsync

    def failing(descriptor):
        if next(writes) == 4:
            raise error
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(SystemExit):
            pairs_command.main(pairs_flags(workshop, folder))
    said = capsys.readouterr().err
    assert "the same command goes on" in said
    assert isinstance(error, KeyboardInterrupt) or f"While writing to {folder} (finished files are kept" in said
    assert read_manifest(folder).unfinished == [1, 2]
    assert not (folder / ".lock").exists()
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(workshop, stored, tmp_path):
    torchrun("-m", "smolvla_reflow.commands.pairs", *pairs_flags(workshop, tmp_path / "pairs"))
    assert contents(tmp_path / "pairs") == contents(stored)


def test_a_finished_set_is_left_alone(workshop, copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.iterdir() if path.name != ".lock"}
    make_pairs(workshop, copied)
    assert "Nothing to do: all 3 shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def swap(file):
    file.write_bytes(file.with_name("pairs-00002.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [flip, swap, Path.unlink])
def test_a_damaged_shard_is_named_and_repaired_alone(workshop, stored, copied, tmp_path, capsys, damage):
    damage(copied / "pairs-00001.safetensors")
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__pairs_path=copied))
    assert re.search(r"-00001\.safetensors is not the file that was written.*with the same flags and --repair\.", line)
    assert not (tmp_path / "run").exists()
    line = refused(capsys, pairs_command.main, pairs_flags(workshop, copied))
    assert re.search(r"pairs-00001\.safetensors.*add --repair to make it again", line)
    others = [copied / f"pairs-0000{i}.safetensors" for i in (0, 2)]
    before = [path.stat().st_mtime_ns for path in others]
    pairs_command.main([*pairs_flags(workshop, copied), "--repair"])
    assert contents(copied) == contents(stored)
    assert [path.stat().st_mtime_ns for path in others] == before


def test_several_damaged_shards_are_named_together():
    assert not_as_written([1]) == "pairs-00001.safetensors is not the file that was written"
    names = "pairs-00000.safetensors, pairs-00001.safetensors, pairs-00002.safetensors"
    assert not_as_written([0, 1, 2, 3]) == f"{names} and 1 more are not the files that were written"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("open_dataset", ReflowError("no such frames")),
        ("load_pair_maker", RuntimeError("out of memory")),
        ("write_shard", ReflowError("the disk is full")),
        ("write_shard", KeyboardInterrupt()),
    ],
)
def test_what_fails_before_its_first_shard_leaves_nothing(workshop, tmp_path, monkeypatch, fails, error, there):
    """Neither the folders that it made, nor anything in a folder that was there."""
    folder = tmp_path / "new" / "pairs"
    if there:
        folder.mkdir(parents=True)

    def failing(*args, **kwargs):
        assert (folder / "manifest.json").exists()
        raise error

    monkeypatch.setattr(make_module, fails, failing)
    with pytest.raises((SystemExit, RuntimeError)):
        pairs_command.main(pairs_flags(workshop, folder))
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "pairs"] if there else [])


def test_a_run_that_was_killed_before_its_first_shard_holds_no_folder(workshop, stored, tmp_path):
    """Its manifest, which is of no use to anyone, gives way to other flags."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    dataclasses.replace(read_manifest(stored), frames_per_shard=7, checksums={}).write(folder)
    (folder / ".lock").touch()
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


def test_a_refused_run_changes_nothing(workshop, copied, capsys):
    before = contents(copied)
    with FileLock(copied / ".lock"):
        line = refused(capsys, pairs_command.main, pairs_flags(workshop, copied))
    assert "Another smolvla-reflow-pairs is at work" in line
    line = refused(capsys, pairs_command.main, pairs_flags(workshop, copied, seed=1))
    assert "holds other pairs: seed is 0 in the pairs and 1 here" in line
    assert contents(copied) == before
    assert not (copied / ".lock").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reflow__teacher_path": None}, "Name the teacher"),
        ({"dataset__repo_id": None}, "Name the teacher's dataset"),
        ({"output_dir": None}, "Name the folder for the pairs"),
        pytest.param({"dataset__episodes": "[0,8]"}, "has 8, and no episode 8", marks=EPISODES_HAVE_TO_EXIST),
        ({"output_dir": "{workshop}/1rf"}, "1rf exists and holds no pairs"),
        ({"couplings_per_frame": 0}, "--couplings_per_frame=0: at least 1 is needed"),
        ({"frames_per_shard": -1}, "--frames_per_shard=-1: at least 1 is needed"),
        ({"pairs_per_frame": 2}, "unrecognized arguments: --pairs_per_frame=2"),
        ({"seed": -1}, "--seed=-1: at least 0 is needed"),
        ({"dtype": "int8"}, "--dtype=int8 is unknown; known are: float32, bfloat16, float16"),
        ({"reflow__solver": "jittered"}, "--reflow.solver=jittered draws a random number for each batch"),
        ({"repair": "true"}, "there are no pairs in"),
        ({"policy__device": "abacus"}, "abacus"),
    ],
)
def test_user_errors(workshop, tmp_path, capsys, flags, message):
    flags = {k: v.format(workshop=workshop) if isinstance(v, str) else v for k, v in flags.items()}
    assert message in refused(capsys, pairs_command.main, pairs_flags(workshop, **{"folder": tmp_path / "p", **flags}))
    assert not (tmp_path / "p").exists()


def test_a_teacher_whose_actions_are_too_large(workshop, tmp_path, capsys):
    teacher = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.action_out_proj.bias"][0] = 1e6  # float16 ends at 65504
    save_file(tensors, teacher / "model.safetensors")
    flags = pairs_flags(workshop, tmp_path / "new" / "pairs", reflow__teacher_path=teacher)
    assert "actions for frames 0 to 4 are not finite, or beyond float16" in refused(capsys, pairs_command.main, flags)
    assert not (tmp_path / "new").exists()


def test_a_teacher_whose_config_says_few_steps_is_solved_in_ten(workshop, tmp_path, capsys):
    """`smolvla-reflow-eval --write_num_steps` makes such a config. What is asked for is done."""
    quick = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "quick"))
    edit_json(quick / "config.json", num_steps=2)
    common = {"reflow__teacher_path": quick, "reflow__solver": None}
    for asked, taken in ((None, 10), (3, 3)):
        folder = make_pairs(workshop, tmp_path / str(taken), reflow__num_steps=asked, **common)
        assert read_manifest(folder).provenance.solver == Solver("midpoint", num_steps=taken)
        said = f"solved by midpoint with num_steps {taken} ({2 * taken} velocity evaluations)."
        assert said in capsys.readouterr().err
