"""Nothing that is only read can run code or lead elsewhere. Each test tries, with a trap that would go off."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from helpers import reflow_run, reflow_train_main
from lerobot.processor import PolicyProcessorPipeline

from smolvla_reflow import Pairs, ReflowError
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.smolvla.checkpoint import open_checkpoint


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
    (checkpoint / "policy_preprocessor.json").exists()
    (found,) = checkpoint.glob(file.replace("_step_5_", "_step_*_"))
    found.write_bytes(pickle.dumps(Trap(sprung)))
    refused(workshop, tmp_path, capsys, reflow__teacher_path=checkpoint)
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
        with pytest.raises(Exception, match=r".*"):
            PolicyProcessorPipeline.from_pretrained(checkpoint, config_filename=file.name)
        assert sprung.exists()


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
    for checksums in ({"../../elsewhere": "0"}, {"-1": "0"}, {"9": "0"}, {"0": "0", "1": "../x"}):
        (stored / "manifest.json").write_text(json.dumps({**manifest, "checksums": checksums}))
        with pytest.raises(ReflowError):
            Pairs(stored).check()
    (stored / "manifest.json").write_text(json.dumps(manifest))
    Pairs(stored).check()
