"""Nothing that is only read can run code or lead elsewhere. Each test tries, with a trap that would go off."""

import importlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import reflow_run, reflow_train_main
from lerobot.processor import PolicyProcessorPipeline

from smolvla_reflow import Pairs, ReflowError
from smolvla_reflow.checkpoint.load import load_processors
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


@pytest.fixture
def checkpoint(workshop, tmp_path):
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))


def refused(workshop, tmp_path, capsys, **changes):
    with pytest.raises(SystemExit) as exit:
        reflow_train_main(reflow_run(workshop, tmp_path / "run", **changes))
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["model.safetensors", "policy_preprocessor_step_5_normalizer_processor.safetensors", "config.json"]
)
def test_no_pickle_is_loaded_whatever_it_is_called(workshop, checkpoint, sprung, tmp_path, capsys, file):
    (found,) = checkpoint.glob(file.replace("_step_5_", "_step_*_"))
    found.write_bytes(pickle.dumps(Trap(sprung)))
    said = refused(workshop, tmp_path, capsys, reflow__teacher_path=checkpoint)
    assert found.name in said
    assert not sprung.exists()
    pickle.loads(found.read_bytes())
    assert sprung.exists()


def test_no_pickle_is_loaded_in_place_of_missing_weights(checkpoint, sprung):
    (checkpoint / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ReflowError, match="Pickled weights are never loaded"):
        open_checkpoint(checkpoint)
    assert not sprung.exists()


@pytest.mark.parametrize("callable_", ["os.system", "subprocess.Popen", "no.such.module", "nodots"])
def test_a_processor_cannot_name_just_anything_to_call(workshop, checkpoint, sprung, tmp_path, capsys, callable_):
    file = checkpoint / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    argument = {"os.system": {"command": f"touch {sprung}"}, "subprocess.Popen": {"args": ["touch", str(sprung)]}}
    saved["steps"].insert(0, {"class": callable_, "config": argument.get(callable_, {})})
    file.write_text(json.dumps(saved))
    said = refused(workshop, tmp_path, capsys, reflow__teacher_path=checkpoint)
    assert f"names '{callable_}', which is no processor step" in said
    assert not sprung.exists()
    if callable_ == "os.system":  # what LeRobot's own loader would do
        with pytest.raises(Exception, match=r"\(int\) must inherit"):  # which `os.system` returned, in place of a step
            PolicyProcessorPipeline.from_pretrained(checkpoint, config_filename=file.name)
        assert sprung.exists()


@pytest.mark.parametrize("processor", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_module_that_a_processor_names_is_not_imported(checkpoint, sprung, tmp_path, monkeypatch, processor):
    """Not even one that does hold a step. A package that the user has loaded may offer it."""
    (tmp_path / "springs.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
        "from lerobot.processor import IdentityProcessorStep\nclass Step(IdentityProcessorStep): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = checkpoint / processor
    saved = json.loads(file.read_text())
    saved["steps"].insert(0, {"class": "springs.Step", "config": {}})
    file.write_text(json.dumps(saved))
    with pytest.raises(ReflowError, match=r"names 'springs\.Step', which is no processor step"):
        open_checkpoint(checkpoint)
    assert not sprung.exists()
    importlib.import_module("springs")
    try:
        assert sprung.exists()
        assert open_checkpoint(checkpoint).steps(processor)[0].type.__module__ == "springs"
    finally:
        del sys.modules["springs"]


def test_a_name_is_not_asked_of_a_module_that_would_make_it_up(checkpoint, monkeypatch):
    made_up = []
    module = ModuleType("generous")
    module.__getattr__ = made_up.append
    monkeypatch.setitem(sys.modules, "generous", module)
    file = checkpoint / "policy_preprocessor.json"
    file.write_text(json.dumps({"steps": [{"class": "generous.Step"}]}))
    with pytest.raises(ReflowError, match="which is no processor step"):
        open_checkpoint(checkpoint)
    assert made_up == []


@pytest.mark.parametrize("config", [{}, {"trust_remote_code": True}])
def test_no_step_downloads_code(checkpoint, sprung, config):
    """LeRobot's tokenizer of actions trusts remote code unless it is told not to, and the checkpoint says where it is."""
    evil = checkpoint / "evil"
    evil.mkdir()
    (evil / "processor.py").write_text(f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Evil: pass\n")
    names = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "processor.Evil"}}
    (evil / "processor_config.json").write_text(json.dumps(names))
    file = checkpoint / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    step = {
        "registry_name": "action_tokenizer_processor",
        "config": {"action_tokenizer_name": str(evil), **config},
    }
    file.write_text(json.dumps({**saved, "steps": [step, *saved["steps"]]}))
    with pytest.raises(ReflowError, match="'action_tokenizer_processor' runs code that it downloads or finds"):
        open_checkpoint(checkpoint)
    assert not sprung.exists()
    with pytest.raises(ValueError, match="action_tokenizer_processor"):  # what LeRobot's own loader would do
        PolicyProcessorPipeline.from_pretrained(checkpoint, config_filename=file.name)
    assert sprung.exists()


def test_no_tokenizer_brings_code(checkpoint, sprung):
    evil = checkpoint / "evil"
    evil.mkdir()
    (evil / "words.py").write_text(f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["words.Evil", None]}
    (evil / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Evil"}))
    file = checkpoint / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    (step,) = (step for step in saved["steps"] if step["registry_name"] == "tokenizer_processor")
    step["config"]["tokenizer_name"] = str(evil)
    step.pop("artifacts", None)
    file.write_text(json.dumps(saved))
    opened = open_checkpoint(checkpoint)
    with pytest.raises(ReflowError, match="names the tokenizer"):
        load_processors(opened, "cpu", {})
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b"])
def test_the_statistics_lie_in_the_checkpoint(checkpoint, name):
    file = checkpoint / "policy_preprocessor.json"
    saved = json.loads(file.read_text())
    (step,) = (step for step in saved["steps"] if "state_file" in step)
    step["state_file"] = name
    file.write_text(json.dumps(saved))
    with pytest.raises(ReflowError, match="which is not in the checkpoint"):
        open_checkpoint(checkpoint)


def test_no_remote_code_is_trusted(workshop, checkpoint, sprung, tmp_path, capsys):
    """A backbone that brings its own configuration class, as remote code would."""
    backbone = tmp_path / "backbone"
    shutil.copytree(workshop / "backbone", backbone)
    (backbone / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    config = json.loads((backbone / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    (backbone / "config.json").write_text(json.dumps(config))
    said = refused(workshop, tmp_path, capsys, policy__vlm_model_name=backbone)
    assert f"--policy.vlm_model_name={backbone}" in said
    assert not sprung.exists()


def test_a_manifest_leads_nowhere(workshop, tmp_path):
    """Neither its shards nor what it says of its origin are looked for where it says."""
    stored = tmp_path / "pairs"
    pairs_command.main(
        [
            f"--reflow.teacher_path={workshop / '1rf' / LAST}",
            f"--dataset.repo_id={REPO_ID}",
            f"--dataset.root={workshop / 'dataset'}",
            f"--output_dir={stored}",
            "--policy.device=cpu",
            "--num_workers=0",
        ]
    )
    manifest = json.loads((stored / "manifest.json").read_text())
    for checksums, why in (
        ({"../../elsewhere": "0"}, "is damaged"),
        ({"-1": "0"}, "a checksum without a shard"),
        ({"9": "0"}, "a checksum without a shard"),
        ({"0": "0", "1": "../x"}, "a checksum without a shard"),
    ):
        (stored / "manifest.json").write_text(json.dumps({**manifest, "checksums": checksums}))
        with pytest.raises(ReflowError, match=why):
            Pairs(stored).check()
    (stored / "manifest.json").write_text(json.dumps(manifest))
    Pairs(stored).check()
