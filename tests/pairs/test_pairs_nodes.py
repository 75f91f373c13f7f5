"""Several processes that make pairs or check them: they need one folder, and learn of damage from one another."""

import json
import textwrap

import pytest
from helpers import torchrun
from pairs_helpers import contents, make_pairs, pairs_flags

from smolvla_reflow.pairs.manifest import read_manifest

pytestmark = pytest.mark.slow

# Two processes that share no folder, as two nodes may, that fail in the middle, or that check a set.
SCRIPT = """
    import json, os, sys
    from pathlib import Path
    from accelerate import PartialState
    from smolvla_reflow import Pairs, ReflowError
    from smolvla_reflow.commands import pairs
    from smolvla_reflow.pairs import make, store

    scenario, here, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank = int(os.environ["RANK"])
    if scenario == "two folders":
        pairs.main([*flags, f"--output_dir={here / str(rank)}"])
    if scenario == "fails":
        stock = make.write_shard
        def write_shard(folder, shard, *given):
            if shard == 3:
                raise ReflowError("a broken cable")
            return stock(folder, shard, *given)
        make.write_shard = write_shard
        pairs.main([*flags, f"--output_dir={here}"])
    if scenario == "damaged":
        hashed, check_shards, process = [], store.check_shards, PartialState(cpu=True)
        store.check_shards = lambda *given: hashed.append(given) or check_shards(*given)
        try:
            Pairs(here).check()
        except ReflowError as error:
            (here / f"{rank}.json").write_text(json.dumps({"hashed": len(hashed), "said": str(error)}))
        process.wait_for_everyone()  # a process that ends while the other still talks to it can abort
        process.destroy_process_group()
"""


@pytest.fixture
def launch(workshop, tmp_path):
    """Run a scenario in two processes."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    flags = pairs_flags(workshop, None, frames_per_shard=8)
    return lambda scenario, folder: torchrun(str(script), scenario, str(folder), *flags)


def test_folders_of_one_name_that_are_not_one(launch, tmp_path):
    with pytest.raises(AssertionError, match="run on one node"):
        launch("two folders", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_where_one_process_fails_all_stop_and_the_same_command_goes_on(launch, workshop, tmp_path):
    """The second process fails with its second shard."""
    folder = tmp_path / "pairs"
    with pytest.raises(AssertionError, match="smolvla-reflow-pairs: error: a broken cable"):
        launch("fails", folder)
    assert set(read_manifest(folder).checksums) == {0, 1}
    make_pairs(workshop, folder, frames_per_shard=8)
    assert contents(folder) == contents(make_pairs(workshop, tmp_path / "at_once", frames_per_shard=8))


def test_one_process_of_a_node_hashes_and_all_learn_of_it(launch, copied):
    (copied / "pairs-00002.safetensors").unlink()
    launch("damaged", copied)
    results = [json.loads((copied / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["hashed"] for result in results] == [1, 0]
    assert all("pairs-00002.safetensors is not the file" in result["said"] for result in results)
