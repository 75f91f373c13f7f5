"""`smolvla-reflow-migrate`: a checkpoint of the earlier fork becomes one that plain LeRobot loads."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import reflow_run, reflow_train_main
from helpers import refused as refused_by
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

from smolvla_reflow import ReflowError
from smolvla_reflow.checkpoint.fork.migration import plan
from smolvla_reflow.checkpoint.read import open_checkpoint
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
    for name in ("config.json", "train_config.json"):
        fields = json.loads((folder / name).read_text())
        (fields["policy"] if name.startswith("train") else fields).update(FIELDS)
        (folder / name).write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    teacher = {f"model.teacher.{name}": tensor.clone() for name, tensor in weights.items()}
    save_file({**weights, **teacher}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def with_tokenizer(forked):
    """LeRobot 0.6.2 saves the tokenizer beside the weights."""
    (forked / "tokenizer").mkdir(exist_ok=True)
    (forked / "tokenizer/vocab.txt").write_text("go")
    (forked / "tokenizer/trap.pkl").write_bytes(b"")
    return forked


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        migrate.main([str(word) for word in argv])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_lerobot_refuses_the_forks_checkpoint(forked):
    """Or there would be nothing to migrate."""
    with pytest.raises(Exception, match=r"training_mode|teacher_model_path|use_reflow"):
        SmolVLAPolicy.from_pretrained(forked)


def test_what_comes_out_is_the_stock_checkpoint(stock, forked, tmp_path, capsys):
    before = contents(forked)
    migrate.main([str(forked), str(tmp_path / "new"), "--write"])
    assert contents(forked) == before
    new, original = tmp_path / "new", load_file(stock / "model.safetensors")
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
    assert [path.name for path in tmp_path.iterdir()].count("new") == len(list(tmp_path.iterdir())) - 1


def test_folders_in_it_come_along(with_tokenizer, tmp_path, capsys):
    migrate.main([str(with_tokenizer), str(tmp_path / "new"), "--write"])
    assert (tmp_path / "new/tokenizer/vocab.txt").read_text() == "go"
    assert not (tmp_path / "new/tokenizer/trap.pkl").exists()
    assert "tokenizer/trap.pkl: left out" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(forked, tmp_path, capsys):
    before = contents(tmp_path)
    migrate.main([str(forked), str(tmp_path / "new")])
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.endswith(f"Nothing was written. To write {tmp_path / 'new'}, add --write.\n")


def test_a_stock_checkpoint_is_left_alone(stock, tmp_path, capsys):
    migrate.main([str(stock), str(tmp_path / "new"), "--write"])
    assert not (tmp_path / "new").exists()
    assert "is a stock checkpoint already" in capsys.readouterr().out


def test_the_training_command_names_this_one(workshop, forked, tmp_path, capsys):
    for part in ("fields", "tensors"):
        if part == "tensors":
            shutil.copy(workshop / "1rf" / LAST / "config.json", forked)
        flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=forked)
        line = refused_by(capsys, reflow_train_main, flags)
        assert "of the earlier fork" in line
        assert f"smolvla-reflow-migrate {forked} NEW_FOLDER --write" in line


@pytest.mark.parametrize(
    ("new", "message"),
    [("old", "exists already; name a new folder"), ("old/inside", "which is left as it is; name a folder elsewhere")],
)
def test_where_it_will_not_write(forked, tmp_path, capsys, new, message):
    before = contents(tmp_path)
    assert message in refused([forked, tmp_path / new, "--write"], capsys)
    assert contents(tmp_path) == before


def test_what_it_cannot_migrate(forked, tmp_path, capsys):
    new = tmp_path / "new"
    assert "no checkpoint at no/such/place" in refused(["no/such/place", new], capsys)
    assert "arguments are required: NEW" in refused([forked], capsys)
    config = json.loads((forked / "config.json").read_text())
    (forked / "config.json").write_text(json.dumps({**config, "another_invention": 1}))
    assert "The installed LeRobot cannot read" in refused([forked, new, "--write"], capsys)
    (forked / "config.json").write_text(json.dumps(config))
    weights = forked / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read" in refused([forked, new, "--write"], capsys)
    weights.unlink()
    assert "pickled weights are never loaded" in refused([forked, new, "--write"], capsys)
    assert not new.exists()


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_the_old_folder_is_executed(forked, tmp_path, capsys):
    """A pickle is neither opened nor carried over, whatever it is called."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    for name in ("pytorch_model.bin", "optimizer.pt", "modeling_smolvla.py"):
        (forked / name).write_bytes(trap)
    migrate.main([str(forked), str(tmp_path / "new"), "--write"])
    assert not {"pytorch_model.bin", "optimizer.pt", "modeling_smolvla.py"} & {
        p.name for p in (tmp_path / "new").iterdir()
    }
    assert "optimizer.pt: left out" in capsys.readouterr().out
    (forked / "model.safetensors").write_bytes(trap)
    with pytest.raises(ReflowError, match="cannot be read"):
        plan(forked)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()  # it would have gone off


def test_no_teacher_is_opened_from_a_pickle(stock, tmp_path):
    folder = Path(shutil.copytree(stock, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ReflowError, match=r"holds no model.safetensors. Pickled weights are never loaded"):
        open_checkpoint(folder)
