"""The command line as it reaches LeRobot: teacher, defaults, the earlier fork's flags, config files."""

import json
from pathlib import Path

import pytest

from smolvla_reflow import ReflowError
from smolvla_reflow.training.arguments import complete

TEACHER = "--reflow.teacher_path=T"
DATASET = "--dataset.repo_id=ID"


def flags(*argv):
    return dict(flag[2:].split("=", 1) for flag in complete([*argv, DATASET]).flags)


def test_student_starts_from_the_teacher():
    assert flags(TEACHER)["policy.path"] == "T"
    assert flags(TEACHER, "--policy.path=S")["policy.path"] == "S"
    assert flags(TEACHER, "--policy.type=smolvla", "--policy.pretrained_path=S")["policy.path"] == "S"
    named = flags(TEACHER, "--policy.type=smolvla")
    assert named["policy.path"] == "T"
    assert "policy.type" not in named


def test_reflow_hyperparameters_where_none_are_given():
    given = flags(TEACHER)
    assert float(given["policy.optimizer_lr"]) == 2e-5
    assert float(given["policy.scheduler_decay_lr"]) == pytest.approx(2e-5 / 40)
    assert int(given["policy.scheduler_warmup_steps"]) == 667
    assert int(given["policy.scheduler_decay_steps"]) == 20_000
    scheduler = {f"policy.scheduler_{name}" for name in ("decay_lr", "warmup_steps", "decay_steps")}
    hub = {"policy.push_to_hub", "policy.repo_id"}
    assert set(complete([TEACHER, DATASET]).chosen) == {"policy.path", "policy.optimizer_lr", *scheduler, *hub}


def test_what_the_user_sets_wins_and_the_rest_follows():
    given = flags(TEACHER, "--policy.optimizer_lr=4e-4", "--steps=3000", "--policy.scheduler_warmup_steps=7")
    assert given["policy.optimizer_lr"] == "4e-4"
    assert float(given["policy.scheduler_decay_lr"]) == pytest.approx(1e-5)
    assert given["policy.scheduler_warmup_steps"] == "7"
    assert given["policy.scheduler_decay_steps"] == "3000"
    assert "policy.optimizer_lr" not in complete([TEACHER, DATASET, "--policy.optimizer_lr=1"]).chosen


def test_flags_may_be_separated_by_a_space():
    assert flags("--reflow.teacher_path", "T", "--steps", "30")["steps"] == "30"


def test_the_forks_command_line_runs_verbatim():
    policy = ("type=smolvla", "training_mode=reflow", "teacher_model_path=T", "optimizer_lr=2e-5")
    given = flags(*(f"--policy.{field}" for field in policy), "--steps=20000", "--batch_size=32")
    assert given["reflow.strategy"] == "reflow"
    assert given["reflow.teacher_path"] == given["policy.path"] == "T"
    assert not [name for name in given if "training_mode" in name or "teacher_model" in name]
    for older, strategy in (("true", "reflow"), ("false", "standard")):
        given = flags(f"--policy.use_reflow={older}", "--policy.teacher_model_path=T")
        assert given["reflow.strategy"] == strategy


def test_the_forks_config_file(tmp_path):
    file = tmp_path / "run.yaml"
    policy = "{type: smolvla, training_mode: reflow, optimizer_betas: [0.8, 0.9]}"
    file.write_text(f"policy: {policy}\ndataset: {{repo_id: ID}}\nsteps: 300")
    given = flags(f"--config_path={file}", "--policy.teacher_model_path=T")
    assert given["reflow.strategy"] == "reflow"
    assert given["policy.path"] == "T"
    assert given["policy.scheduler_decay_steps"] == "300"
    assert json.loads(given["policy.optimizer_betas"]) == [0.8, 0.9]
    rest = json.loads(Path(given["config_path"]).read_text())
    assert rest == {"dataset": {"repo_id": "ID"}, "steps": 300}
    assert flags(f"--config_path={file}", TEACHER, "--steps=60")["policy.scheduler_decay_steps"] == "60"


def test_the_student_never_overwrites_the_teachers_repository():
    """The teacher's config may say push_to_hub=true with the teacher's own repo_id."""
    given = flags(TEACHER)
    assert (given["policy.push_to_hub"], given["policy.repo_id"]) == ("false", "null")
    assert flags(TEACHER, "--policy.repo_id=null")["policy.push_to_hub"] == "false"
    assert "policy.push_to_hub" not in flags(TEACHER, "--policy.repo_id=me/student")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"Name the teacher.*--reflow.teacher_path"),
        (["steps=3"], "'steps=3' is not a flag"),
        ([TEACHER], "Name the dataset.*--dataset.repo_id"),
        ([TEACHER, "--steps"], "--steps needs a value"),
        ([TEACHER, DATASET, "--steps=many"], "While reading --steps and .*: ValueError: .*'many'"),
        ([TEACHER, "--policy.teacher_model_path=U"], r"contradicts --reflow.teacher_path=T"),
        (["--resume=true"], "needs --config_path"),
        ([TEACHER, "--config_path=nowhere.yaml"], "While reading --config_path=nowhere.yaml: FileNotFoundError"),
        ([TEACHER, "--policy.use_reflow=true", "--reflow.strategy=distill"], r"use_reflow .*contradicts"),
    ],
)
def test_user_errors(argv, message):
    with pytest.raises(ReflowError, match=message):
        complete(argv)


@pytest.mark.parametrize("text", ["a: [", "just words", "policy: 3"])
def test_unreadable_config_files(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ReflowError, match=f"While reading --config_path={file}: "):
        complete([TEACHER, f"--config_path={file}"])
