"""Nothing that is only read can run code or lead elsewhere. Each test tries, with a trap that would go off."""

import importlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from editing import CONFIG, PREPROCESSOR, Trap, add_step, edit_step, tokenizer_at
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
def springs(sprung):
    """Code that springs the trap."""
    return f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"


@pytest.fixture
def evil(teacher, springs):
    """Writes a folder in the checkpoint whose JSON file names a class in a module that springs the trap."""

    def write(name, content):
        folder = teacher / "evil"
        folder.mkdir()
        (folder / "code.py").write_text(springs + "class Evil: pass\n")
        (folder / name).write_text(json.dumps(content))
        return folder

    return write


def refused(workshop, tmp_path, capsys, **changes):
    return refused_by(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "policy_preprocessor_step_*_normalizer_processor.safetensors", "config.json"]
)
def test_no_pickle_is_loaded_whatever_it_is_called(workshop, teacher, sprung, tmp_path, capsys, file):
    (found,) = teacher.glob(file)
    found.write_bytes(pickle.dumps(Trap(sprung)))
    assert found.name in refused(workshop, tmp_path, capsys, reflow__teacher_path=teacher)
    assert not sprung.exists()
    pickle.loads(found.read_bytes())
    assert sprung.exists()


def test_no_pickle_is_loaded_in_place_of_missing_weights(teacher, sprung):
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (teacher / name).write_bytes(pickle.dumps(Trap(sprung)))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(ReflowError, match="Pickled weights are never loaded"):
        open_checkpoint(teacher)
    assert not sprung.exists()


@pytest.mark.parametrize("callable_", ["os.system", "subprocess.Popen", "no.such.module", "nodots"])
def test_a_processor_cannot_name_just_anything_to_call(workshop, teacher, sprung, tmp_path, capsys, callable_):
    argument = {"os.system": {"command": f"touch {sprung}"}, "subprocess.Popen": {"args": ["touch", str(sprung)]}}
    add_step(teacher / PREPROCESSOR, {"class": callable_, "config": argument.get(callable_, {})})
    said = refused(workshop, tmp_path, capsys, reflow__teacher_path=teacher)
    assert f"names '{callable_}', which is no processor step" in said
    assert not sprung.exists()
    if callable_ == "os.system":  # what LeRobot's own loader would do
        with pytest.raises(Exception, match=r"\(int\) must inherit"):  # which `os.system` returned, in place of a step
            PolicyProcessorPipeline.from_pretrained(teacher, config_filename=PREPROCESSOR)
        assert sprung.exists()


@pytest.mark.parametrize("processor", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_module_that_a_processor_names_is_not_imported(teacher, sprung, springs, tmp_path, monkeypatch, processor):
    """Not even one that does hold a step. A package that the user has loaded may offer it."""
    step = "from lerobot.processor import IdentityProcessorStep\nclass Step(IdentityProcessorStep): pass\n"
    (tmp_path / "springs.py").write_text(springs + step)
    monkeypatch.syspath_prepend(tmp_path)
    add_step(teacher / processor, {"class": "springs.Step", "config": {}})
    with pytest.raises(ReflowError, match=r"names 'springs\.Step', which is no processor step"):
        open_checkpoint(teacher)
    assert not sprung.exists()
    importlib.import_module("springs")
    try:
        assert sprung.exists()
        assert open_checkpoint(teacher).processor_steps(processor)[0].type.__module__ == "springs"
    finally:
        del sys.modules["springs"]


def test_a_name_is_not_asked_of_a_module_that_would_make_it_up(teacher, monkeypatch):
    made_up = []
    module = ModuleType("generous")
    module.__getattr__ = made_up.append
    monkeypatch.setitem(sys.modules, "generous", module)
    (teacher / PREPROCESSOR).write_text(json.dumps({"steps": [{"class": "generous.Step"}]}))
    with pytest.raises(ReflowError, match="which is no processor step"):
        open_checkpoint(teacher)
    assert made_up == []


@pytest.mark.parametrize("config", [{}, {"trust_remote_code": True}])
def test_no_step_downloads_code(teacher, sprung, evil, config):
    """LeRobot's tokenizer of actions trusts remote code unless it is told not to, and the checkpoint says where it is."""
    names = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "code.Evil"}}
    step = {"action_tokenizer_name": str(evil("processor_config.json", names)), **config}
    add_step(teacher / PREPROCESSOR, {"registry_name": "action_tokenizer_processor", "config": step})
    with pytest.raises(ReflowError, match="'action_tokenizer_processor' runs code that it downloads or finds"):
        open_checkpoint(teacher)
    assert not sprung.exists()
    with pytest.raises(ValueError, match="action_tokenizer_processor"):  # what LeRobot's own loader would do
        PolicyProcessorPipeline.from_pretrained(teacher, config_filename=PREPROCESSOR)
    assert sprung.exists()


def test_no_step_of_another_policy(teacher, monkeypatch):
    """Some of them load a backbone with its code, and say so nowhere in their arguments."""
    foreign = type("Foreign", (TokenizerProcessorStep,), {"__module__": "lerobot.policies.groot.processor_groot"})
    monkeypatch.setitem(Registry._registry, "foreign", foreign)
    add_step(teacher / PREPROCESSOR, {"registry_name": "foreign", "config": {}})
    with pytest.raises(ReflowError, match="names 'foreign', which is no processor step of SmolVLA"):
        open_checkpoint(teacher)


def test_no_tokenizer_brings_code(teacher, sprung, evil):
    auto_map = {"AutoTokenizer": ["code.Evil", None]}
    folder = evil("tokenizer_config.json", {"auto_map": auto_map, "tokenizer_class": "Evil"})
    edit_step(teacher, "tokenizer_processor", tokenizer_at(str(folder)))
    opened = open_checkpoint(teacher)
    for read in (lambda: load_processors(opened, "cpu", {}), lambda: check_words(opened, opened)):
        with pytest.raises(ReflowError, match="While loading the tokenizer"):
            read()
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc", "a/../../b"])
@pytest.mark.parametrize("step", ["normalizer_processor", "tokenizer_processor"])
def test_statistics_and_tokenizer_lie_in_the_checkpoint(teacher, step, name):
    named = {"state_file": name} if step == "normalizer_processor" else {"artifacts": {"tokenizer_name": name}}
    edit_step(teacher, step, lambda saved: saved.update(named))
    with pytest.raises(ReflowError, match="which is not in the checkpoint"):
        open_checkpoint(teacher)


def test_no_remote_code_is_trusted(workshop, sprung, springs, tmp_path, capsys):
    """A backbone that brings its own configuration class, as remote code would."""
    backbone = Path(shutil.copytree(workshop / "backbone", tmp_path / "backbone"))
    config = "from transformers import PretrainedConfig\nclass Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    (backbone / "evil.py").write_text(springs + config)
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
