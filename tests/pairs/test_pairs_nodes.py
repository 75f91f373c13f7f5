"""Several processes that make pairs: they need one folder, and where one fails all of them stop with the reason."""

import json
import shutil
import textwrap

import pytest
from helpers import torchrun
from pairs_helpers import contents, make_pairs, pairs_flags
from safetensors.torch import load_file

from smolvla_reflow.pairs.manifest import read_manifest

# Two processes that share no folder, as two nodes may, and then two of which one fails.
SCRIPT = """
    import contextlib, io, json, os, sys
    from pathlib import Path
    from smolvla_reflow import Pairs, ReflowError
    from smolvla_reflow.commands import pairs
    from smolvla_reflow.pairs import folder, generate, store

    here, rank, flags = Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2:]
    folder.PATIENCE = 0.0

    def run(name, flags=flags):
        err = io.StringIO()
        code = 0
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                pairs.main([*flags, f"--output_dir={here / name}"])
            except SystemExit as exit:
                code = exit.code
            except OSError as error:
                code = type(error).__name__
        said = [line for line in err.getvalue().splitlines() if "error: " in line]
        return {"code": code, "said": said}

    def failing_in_second(error):
        def write_shard(*args):
            if rank == 1:
                raise error
            return stock(*args)
        stock = generate.write_shard
        generate.write_shard = write_shard
        try:
            return run(f"failing_{type(error).__name__}")
        finally:
            generate.write_shard = stock

    result = {}
    result["two folders"] = run(f"two{rank}")
    result["no folder"] = run(f"none{rank}/pairs") if rank == 0 else run("absent")
    result["no shards"] = run("busy")
    without_teacher = [flag.replace("1rf", "none") for flag in flags]
    result["no teacher"] = run("no_teacher", without_teacher if rank == 1 else flags)
    result["refused"] = failing_in_second(ReflowError("the disk is full"))
    result["crashed"] = failing_in_second(OSError("a broken cable"))

    hashed = []
    check_shards = store.check_shards
    store.check_shards = lambda *args: hashed.append(args) or check_shards(*args)
    from accelerate import PartialState
    try:
        Pairs(here / "damaged").check(PartialState())
    except ReflowError as error:
        result["damaged"] = {"hashed": len(hashed), "said": str(error)}
    (here / f"result{rank}.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def nodes(workshop, stored, tmp_path_factory):
    """What became of it in either process, and the folder in which it happened."""
    here = tmp_path_factory.mktemp("nodes")
    (here / "two1").mkdir()
    (here / "busy").mkdir()
    (here / "busy" / "of_someone_else").touch()
    shutil.copytree(stored, here / "damaged")
    (here / "damaged" / "pairs-00002.safetensors").unlink()
    script = here / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    torchrun(str(script), str(here), *pairs_flags(workshop, None))
    return here, [json.loads((here / f"result{rank}.json").read_text()) for rank in (0, 1)]


def both_refused(results, scenario) -> str:
    """Either process has ended with exit code 2 and the same sentence; return it."""
    assert [result[scenario]["code"] for result in results] == [2, 2]
    ((said,), (other,)) = (result[scenario]["said"] for result in results)
    assert said.partition("error: ")[2].split(":")[0] == other.partition("error: ")[2].split(":")[0]
    return said


def test_folders_of_one_name_that_are_not_one(workshop, stored, nodes):
    """What each has made stays where it is, and can be continued."""
    here, results = nodes
    line = both_refused(results, "two folders")
    assert "is not one folder for all processes" in line
    assert "Name a folder on a file system that all nodes share, or run it on one node." in line
    assert set(read_manifest(here / "two0").checksums) == {0}
    actions = load_file(here / "two1" / "pairs-00001.safetensors")["actions"]
    assert (actions == load_file(stored / "pairs-00001.safetensors")["actions"]).all()
    make_pairs(workshop, here / "two0")
    assert contents(here / "two0") == contents(stored)


def test_a_folder_that_one_process_does_not_see(nodes):
    here, results = nodes
    assert "is not one folder for all processes: some do not see" in both_refused(results, "no folder")
    assert not (here / "none0").exists()
    assert not (here / "absent").exists()


def test_what_the_main_process_refuses_stops_all(nodes):
    _, results = nodes
    assert "busy exists and holds no pairs" in both_refused(results, "no shards")


def test_a_teacher_that_one_process_cannot_open(nodes):
    """As where one node has no copy of it."""
    here, results = nodes
    assert "There is no checkpoint at" in both_refused(results, "no teacher")
    assert not (here / "no_teacher").exists()


def test_where_one_process_fails_the_others_stop_and_their_work_is_kept(nodes):
    here, results = nodes
    assert "the disk is full" in both_refused(results, "refused")
    assert set(read_manifest(here / "failing_ReflowError").checksums) == {0}
    main, other = (result["crashed"] for result in results)
    assert (main["code"], other["code"]) == (2, "OSError")
    assert "Another process failed: OSError: a broken cable" in main["said"][0]
    assert set(read_manifest(here / "failing_OSError").checksums) == {0}


def test_one_process_of_a_node_hashes_and_all_learn_of_it(nodes):
    _, results = nodes
    assert [result["damaged"]["hashed"] for result in results] == [1, 0]
    assert all("pairs-00002.safetensors is not the file" in result["damaged"]["said"] for result in results)
