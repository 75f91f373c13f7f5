"""`smolvla-reflow-migrate`: a checkpoint of the earlier fork becomes one that plain LeRobot loads."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from editing import CONFIG, Trap, edit, edit_step, edit_weights
from helpers import reflow_run, reflow_train_main, refused
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from people import edit_json
from safetensors.torch import load_file

from smolvla_reflow import ReflowError
from smolvla_reflow.checkpoint.fork.migration import plan
from smolvla_reflow.commands import migrate
from smolvla_reflow.demo.flags import LAST

FIELDS = {"training_mode": "reflow", "teacher_model_path": "outputs/1rf", "use_reflow": True}


@pytest.fixture
def stock(workshop):
    return workshop / "1rf" / LAST


@pytest.fixture
def forked(stock, tmp_path):
    """The workshop's checkpoint with everything the fork may have put into one."""
    folder = Path(shutil.copytree(stock, tmp_path / "old"))
    edit_json(folder / CONFIG, **FIELDS)
    edit(folder / "train_config.json", lambda config: config["policy"].update(FIELDS))
    teacher = {f"model.teacher.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    edit_weights(folder / "model.safetensors", lambda weights: weights.update(teacher))
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_comes_out_is_the_stock_checkpoint(stock, forked, tmp_path, capsys):
    with pytest.raises(Exception, match=r"training_mode|teacher_model_path|use_reflow"):
        SmolVLAPolicy.from_pretrained(forked)  # or there would be nothing to migrate
    before, new = contents(tmp_path), tmp_path / "new"
    migrate.main([str(forked), str(new)])
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.endswith(f"Nothing was written. To write {new}, add --write.\n")
    migrate.main([str(forked), str(new), "--write"])
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    assert contents(forked) == {path.relative_to("old"): content for path, content in before.items()}
    original = load_file(stock / "model.safetensors")
    assert contents(new).keys() == contents(stock).keys()
    for name in ("config.json", "train_config.json"):
        assert json.loads((new / name).read_text()) == json.loads((stock / name).read_text())
    migrated = load_file(new / "model.safetensors")
    assert migrated.keys() == original.keys()
    assert all(torch.equal(migrated[name], original[name]) for name in original)
    SmolVLAPolicy.from_pretrained(new)
    said = capsys.readouterr().out
    assert "config.json: without teacher_model_path (which is 'outputs/1rf')" in said
    assert f"model.safetensors: without the teacher's {len(original)} tensors (model.teacher.model." in said


def test_folders_in_it_come_along_and_links_out_of_it_do_not(forked, tmp_path):
    """LeRobot 0.6.2 saves the tokenizer beside the weights."""
    edit_step(forked, "tokenizer_processor", lambda step: step.update(artifacts={"tokenizer_name": "words"}))
    (forked / "words").mkdir()
    (forked / "words/vocab.txt").write_text("go")
    (forked / "words/trap.pkl").touch()
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("words/link.txt", "link.txt", "link.json"):
        (forked / name).symlink_to(tmp_path / "secret.txt")
    migrate.main([str(forked), str(tmp_path / "new"), "--write"])
    assert (tmp_path / "new/words/vocab.txt").read_text() == "go"
    found = contents(tmp_path / "new")
    assert not {"trap.pkl", "link.txt", "link.json"} & {path.name for path in found}
    assert b"secret" not in found.values()


def test_a_checkpoint_of_the_hub(forked, tmp_path, cached):
    """Its snapshot consists of links into the repository's folder."""
    snapshot = cached("me/forked", "1" * 40, forked, "main")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    migrate.main(["me/forked", str(tmp_path / "new"), "--write"])
    assert contents(tmp_path / "new").keys() == contents(forked).keys()


def test_a_stock_checkpoint_is_left_alone(stock, tmp_path, capsys):
    migrate.main([str(stock), str(tmp_path / "new"), "--write"])
    assert not (tmp_path / "new").exists()
    assert "is a stock checkpoint already" in capsys.readouterr().out
    old = Path(shutil.copytree(stock, tmp_path / "of_0_3", ignore=shutil.ignore_patterns("policy_*")))
    assert "convert one of LeRobot 0.3 with: python -m" in refused(capsys, migrate.main, [old, tmp_path / "new"])


def test_the_training_command_names_this_one(workshop, forked, tmp_path, capsys):
    for part in ("fields", "tensors"):
        if part == "tensors":
            shutil.copy(workshop / "1rf" / LAST / "config.json", forked)
        line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__teacher_path=forked))
        assert "of the earlier fork" in line
        assert f"smolvla-reflow-migrate {forked} NEW_FOLDER --write" in line


def test_what_it_cannot_migrate(forked, tmp_path, capsys):
    new, before = tmp_path / "new", contents(tmp_path)
    assert "exists already; name a new folder" in refused(capsys, migrate.main, [forked, forked, "--write"])
    assert "name a folder elsewhere" in refused(capsys, migrate.main, [forked, forked / "in", "--write"])
    assert "no checkpoint at no/such/place" in refused(capsys, migrate.main, ["no/such/place", new])
    assert "arguments are required: NEW" in refused(capsys, migrate.main, [forked])
    assert contents(tmp_path) == before
    edit_json(forked / CONFIG, another_invention=1)
    assert "`another_invention`" in refused(capsys, migrate.main, [forked, new, "--write"])
    edit(forked / CONFIG, lambda config: config.pop("another_invention"))
    weights = forked / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"While reading {weights}" in refused(capsys, migrate.main, [forked, new, "--write"])
    weights.unlink()
    assert "pickled weights are never loaded" in refused(capsys, migrate.main, [forked, new, "--write"])
    assert not new.exists()


def test_nothing_in_the_old_folder_is_executed(forked, tmp_path):
    """A pickle is neither opened nor carried over, whatever it is called."""
    sprung, traps = tmp_path / "sprung", ("pytorch_model.bin", "optimizer.pt", "modeling_smolvla.py")
    trap = pickle.dumps(Trap(sprung))
    for name in traps:
        (forked / name).write_bytes(trap)
    migrate.main([str(forked), str(tmp_path / "new"), "--write"])
    assert not set(traps) & {path.name for path in (tmp_path / "new").iterdir()}
    (forked / "model.safetensors").write_bytes(trap)
    with pytest.raises(ReflowError, match="While reading"):
        plan(forked)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # it would have gone off
