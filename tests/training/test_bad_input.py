"""Bad input: through the command, with exit code 2, one sentence and an untouched disk; or by the check that finds it."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import reflow_run, reflow_train_main, refused
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

from smolvla_reflow import ReflowError, attach
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.training.checks import check_flags
from smolvla_reflow.training.config import ReflowConfig

since_0_6 = pytest.mark.skipif(
    "job" not in TrainPipelineConfig.__dataclass_fields__, reason="--job.target exists from LeRobot 0.6 on"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reflow__teacher_path": "no/such/place"}, "There is no checkpoint at no/such/place"),
        ({"reflow__num_stepz": 3}, "unrecognized arguments: --reflow.num_stepz=3"),
        ({"reflow__num_steps": "ten"}, "num_steps"),
        ({"rename_map": "{{a: b"}, "A flag's value cannot be read"),
        ({"env__discover_packages_path": "fractions"}, "fractions"),
        ({"policy__type": "act"}, "Cannot specify both --policy.path and --policy.type"),
        ({"policy__chunk_size": 3, "policy__n_action_steps": 2}, "6 in the teacher's config and 3 in the student's"),
        ({"output_dir": "{teacher}"}, "While checking the configuration: FileExistsError: Output directory {teacher}"),
        ({"dataset__root": "{workshop}/nowhere"}, "{workshop}/nowhere"),
        ({"output_dir": "{teacher}/config.json/run"}, "config.json is not writable; name another folder"),
        pytest.param(
            {"job__target": "a10g-small"},
            "--job.target=a10g-small would run lerobot-train, not reflow",
            marks=since_0_6,
        ),
        ({"policy__vlm_model_name": "{other}"}, "While training: RuntimeError: Error(s) in loading state_dict"),
    ],
)
def test_nothing_is_written(workshop, tmp_path, capsys, changes, message):
    names = {"workshop": workshop, "teacher": workshop / "1rf" / LAST, "other": tmp_path / "other"}
    write_backbone(names["other"], hidden_size=48, vision_hidden_size=32)
    changes = {name: value.format(**names) if isinstance(value, str) else value for name, value in changes.items()}
    before = {path: path.stat().st_mtime_ns for path in workshop.rglob("*")}
    line = refused(capsys, reflow_train_main, reflow_run(workshop, **{"output_dir": tmp_path / "run", **changes}))
    assert message.format(**names) in line
    assert {path: path.stat().st_mtime_ns for path in workshop.rglob("*")} == before
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(workshop, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", batch_size=0)
    for debug in (False, True):
        with pytest.raises(SystemExit) as exit:
            reflow_train_main([*flags, "--debug"] if debug else flags)
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert ("Traceback" in err) == debug
        assert ("(--debug shows the traceback)" in err) != debug
        assert "While training: ValueError: batch_size should be a positive integer" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"strategy": "reflo"}, "Unknown loss strategy 'reflo'"),
        ({"time_sampling": "betta"}, "--reflow.time_sampling 'betta' is unknown; known are: beta, grid:K"),
        ({"real_data_ratio": 1.5}, "--reflow.real_data_ratio=1.5 is no share; give a number from 0 to 1"),
        ({"couplings_per_frame": 0}, "--reflow.couplings_per_frame=0: at least 1 is needed"),
        ({"num_steps": 0}, "--reflow.num_steps=0: a solver needs at least one ODE step"),
        ({"solver": "rk5"}, "--reflow.solver=rk5 is unknown; known are: "),
        ({"solver": "dopri5", "num_steps": 5}, "--reflow.solver=dopri5 chooses its own steps"),
        ({"rtol": 0.1}, "--reflow.solver=jittered has fixed steps"),
        ({"solver": "dopri5", "rtol": -1.0}, "--reflow.rtol=-1.0"),
        ({"strategy": "standard", "num_steps": 3}, "num_steps=3 has no effect with --reflow.strategy=standard; leave"),
        ({"strategy": "standard", "train_state_proj": True}, "--reflow.train_state_proj=true has no effect with"),
        ({"augment_pairs": True}, "--reflow.augment_pairs=true has no effect without --reflow.pairs_path"),
    ],
)
def test_flags(flags, message):
    with pytest.raises(ReflowError) as error:
        check_flags(ReflowConfig(teacher_path="T", **flags))
    assert message in str(error.value)


BIAS = "model.action_out_proj.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(BIAS), f"they lack {BIAS}"),
        (lambda w: w.update(extra=torch.ones(1)), "they have the unknown extra"),
        (lambda w: w.update({BIAS: w[BIAS] * math.nan}), f"{BIAS} holds NaN or infinity"),
    ],
)
def test_weights_that_lerobot_would_load_in_part(workshop, tmp_path, edit, message):
    teacher = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    weights = load_file(teacher / "model.safetensors")
    edit(weights)
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReflowError, match=message):
        attach(SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST), teacher)
