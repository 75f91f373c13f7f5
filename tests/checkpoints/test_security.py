"""Nothing that is only read can run code or lead elsewhere. Each test tries, with a trap that would go off."""

import importlib
import json
import pickle
import shutil
import sys
from types import ModuleType

import pytest
from editing import CONFIG, PREPROCESSOR, Trap, add_step, edit_step
from helpers import reflow_run, reflow_train_main
from helpers import refused as refused_by
from lerobot.processor import PolicyProcessorPipeline, TokenizerProcessorStep
from lerobot.processor import ProcessorStepRegistry as Registry
from people import edit_json

from smolvla_reflow import Pairs, ReflowError
from smolvla_reflow.checkpoint.load import load_processors
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.checkpoint.words import check_words


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


@pytest.fixture
def evil(checkpoint, sprung):
    """Writes a folder in the checkpoint whose JSON file names a class in a module that springs the trap."""

    def write(name, content):
        folder = checkpoint / "evil"
        folder.mkdir()
        code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\nclass Evil: pass\n"
        (folder / "code.py").write_text(code)
        (folder / name).write_text(json.dumps(content))
        return folder

    return write


def refused(workshop, tmp_path, capsys, **changes):
    return refused_by(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "policy_preprocessor_step_*_normalizer_processor.safetensors", "config.json"]
)
def test_no_pickle_is_loaded_whatever_it_is_called(workshop, checkpoint, sprung, tmp_path, capsys, file):
    (found,) = checkpoint.glob(file)
    found.write_bytes(pickle.dumps(Trap(sprung)))
    assert found.name in refused(workshop, tmp_path, capsys, reflow__teacher_path=checkpoint)
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
    argument = {"os.system": {"command": f"touch {sprung}"}, "subprocess.Popen": {"args": ["touch", str(sprung)]}}
    add_step(checkpoint / PREPROCESSOR, {"class": callable_, "config": argument.get(callable_, {})})
    said = refused(workshop, tmp_path, capsys, reflow__teacher_path=checkpoint)
    assert f"names '{callable_}', which is no processor step" in said
    assert not sprung.exists()
    if callable_ == "os.system":  # what LeRobot's own loader would do
        with pytest.raises(Exception, match=r"\(int\) must inherit"):  # which `os.system` returned, in place of a step
            PolicyProcessorPipeline.from_pretrained(checkpoint, config_filename=PREPROCESSOR)
        assert sprung.exists()


@pytest.mark.parametrize("processor", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_module_that_a_processor_names_is_not_imported(checkpoint, sprung, tmp_path, monkeypatch, processor):
    """Not even one that does hold a step. A package that the user has loaded may offer it."""
    (tmp_path / "springs.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
        "from lerobot.processor import IdentityProcessorStep\nclass Step(IdentityProcessorStep): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    add_step(checkpoint / processor, {"class": "springs.Step", "config": {}})
    with pytest.raises(ReflowError, match=r"names 'springs\.Step', which is no processor step"):
        open_checkpoint(checkpoint)
    assert not sprung.exists()
    importlib.import_module("springs")
    try:
        assert sprung.exists()
        assert open_checkpoint(checkpoint).processor_steps(processor)[0].type.__module__ == "springs"
    finally:
        del sys.modules["springs"]


def test_a_name_is_not_asked_of_a_module_that_would_make_it_up(checkpoint, monkeypatch):
    made_up = []
    module = ModuleType("generous")
    module.__getattr__ = made_up.append
    monkeypatch.setitem(sys.modules, "generous", module)
    (checkpoint / PREPROCESSOR).write_text(json.dumps({"steps": [{"class": "generous.Step"}]}))
    with pytest.raises(ReflowError, match="which is no processor step"):
        open_checkpoint(checkpoint)
    assert made_up == []


@pytest.mark.parametrize("config", [{}, {"trust_remote_code": True}])
def test_no_step_downloads_code(checkpoint, sprung, evil, config):
    """LeRobot's tokenizer of actions trusts remote code unless it is told not to, and the checkpoint says where it is."""
    names = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "code.Evil"}}
    step = {"action_tokenizer_name": str(evil("processor_config.json", names)), **config}
    add_step(checkpoint / PREPROCESSOR, {"registry_name": "action_tokenizer_processor", "config": step})
    with pytest.raises(ReflowError, match="'action_tokenizer_processor' runs code that it downloads or finds"):
        open_checkpoint(checkpoint)
    assert not sprung.exists()
    with pytest.raises(ValueError, match="action_tokenizer_processor"):  # what LeRobot's own loader would do
        PolicyProcessorPipeline.from_pretrained(checkpoint, config_filename=PREPROCESSOR)
    assert sprung.exists()


def test_no_step_of_another_policy(checkpoint, monkeypatch):
    """Some of them load a backbone with its code, and say so nowhere in their arguments."""
    foreign = type("Foreign", (TokenizerProcessorStep,), {"__module__": "lerobot.policies.groot.processor_groot"})
    monkeypatch.setitem(Registry._registry, "foreign", foreign)
    add_step(checkpoint / PREPROCESSOR, {"registry_name": "foreign", "config": {}})
    with pytest.raises(ReflowError, match="names 'foreign', which is no processor step of SmolVLA"):
        open_checkpoint(checkpoint)


def test_no_tokenizer_brings_code(checkpoint, sprung, evil):
    auto_map = {"AutoTokenizer": ["code.Evil", None]}
    folder = evil("tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "Evil"})

    def named(step):
        step["config"]["tokenizer_name"] = str(folder)
        step.pop("artifacts", None)

    edit_step(checkpoint, "tokenizer_processor", named)
    opened = open_checkpoint(checkpoint)
    for read in (lambda: load_processors(opened, "cpu", {}), lambda: check_words(opened, opened)):
        with pytest.raises(ReflowError, match="While loading the tokenizer"):
            read()
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b"])
def test_the_statistics_lie_in_the_checkpoint(checkpoint, name):
    edit_step(checkpoint, "normalizer_processor", lambda step: step.update(state_file=name))
    with pytest.raises(ReflowError, match="which is not in the checkpoint"):
        open_checkpoint(checkpoint)


def test_no_remote_code_is_trusted(workshop, sprung, tmp_path, capsys):
    """A backbone that brings its own configuration class, as remote code would."""
    backbone = tmp_path / "backbone"
    shutil.copytree(workshop / "backbone", backbone)
    (backbone / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    edit_json(backbone / CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    said = refused(workshop, tmp_path, capsys, policy__vlm_model_name=backbone)
    assert f"--policy.vlm_model_name={backbone}" in said
    assert not sprung.exists()


def test_a_manifest_leads_nowhere(copied):
    """Neither its shards nor what it says of its origin are looked for where it says."""
    checksums = json.loads((copied / "manifest.json").read_text())["checksums"]
    for shard, checksum, why in (
        ("../../elsewhere", "0", "is damaged"),
        ("-1", "0", "a checksum without a shard"),
        ("9", "0", "a checksum without a shard"),
        ("3", "../x", "a checksum without a shard"),
    ):
        edit_json(copied / "manifest.json", checksums={**checksums, shard: checksum})
        with pytest.raises(ReflowError, match=why):
            Pairs(copied).check()
    edit_json(copied / "manifest.json", checksums=checksums)
    Pairs(copied).check()
