"""A new run from the config file of another: what it takes over, what it decides anew, and that it pushes nowhere."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import reflow_run, reflow_train_main, refused, same_tensors, saved_config, saved_weights
from lerobot.configs.train import TrainPipelineConfig
from people import edit_json

from smolvla_reflow import ReflowError
from smolvla_reflow.compat import hub_destinations
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.training.arguments import complete
from smolvla_reflow.training.checks import check_destinations

TEACHERS = "somebody/their_smolvla"
# What a finished, published, once resumed run has in its train_config.json, as far as it matters for a new one.
PUBLISHED = {
    **{"resume": True, "checkpoint_path": "/there/1rf/checkpoints/000040", "output_dir": "/there/1rf"},
    **{"job_name": "their_run", "steps": 40, "seed": 3, "tolerance_s": 1e-5, "use_policy_training_preset": False},
    "optimizer": {"type": "adamw", "lr": 0.01},
    "scheduler": {"type": "diffuser", "num_warmup_steps": 3},
    "dataset": {"repo_id": "ID", "root": "/data", "episodes": [1, 2], "use_imagenet_stats": False},
    "wandb": {"enable": True, "project": "robots", "run_id": "abc123"},
    "policy": {
        **{"type": "smolvla", "push_to_hub": True, "repo_id": TEACHERS, "use_peft": True, "device": "cpu"},
        **{"pretrained_path": "lerobot/smolvla_base", "chunk_size": 50, "input_features": {}},
        **{"freeze_vision_encoder": False, "optimizer_lr": 1e-4, "optimizer_weight_decay": 1e-6},
        **{"scheduler_decay_lr": 2.5e-6, "scheduler_warmup_steps": 1000, "scheduler_decay_steps": 30000},
    },
    # From LeRobot 0.6 on.
    **{"save_checkpoint_to_hub": True, "job": {"target": "a10g-small"}, "reward_model": None},
    "eval": {"recording": True, "recording_repo_id": "somebody/recorded", "n_episodes": 7},
}
HANDED_OVER = {"teacher_path": "T", "strategy": "distill", "weighting": "none", "teacher_fingerprint": "f"}


@pytest.fixture
def saved(tmp_path):
    """Writes a train_config.json like PUBLISHED, with changes, and gives the flag that names it."""

    def write(reflow=None, policy=(), **changes):
        content = {**PUBLISHED, **({"reflow": reflow} if reflow else {}), **changes}
        content["policy"] = {**content["policy"], **dict(policy)}
        file = tmp_path / "train_config.json"
        file.write_text(json.dumps(content))
        return f"--config_path={file}"

    return write


def completed(*argv):
    """Flags by name, and the config file that goes with them."""
    arguments = complete(argv)
    given = dict(flag[2:].split("=", 1) for flag in arguments.flags)
    file = Path(given.pop("config_path"))
    rest = json.loads(file.read_text())
    file.unlink()
    return given, rest


def test_the_teachers_own_file(saved):
    """It describes the teacher's training: the dataset and how the machine is used stay, all else is a reflow run's."""
    given, rest = completed(saved(), "--reflow.teacher_path=T")
    assert rest == {
        "steps": 40,
        "seed": 3,
        "tolerance_s": 1e-5,  # a number, though YAML takes Python's 1e-05 for a word
        "dataset": PUBLISHED["dataset"],
        "wandb": {"enable": True, "project": "robots"},
        "eval": {"recording": True, "n_episodes": 7},
        "reward_model": None,
    }
    kept = {"freeze_vision_encoder": "false", "device": "cpu", "optimizer_weight_decay": "1e-06"}
    reflows = {"path": "T", "optimizer_lr": "2e-05", "push_to_hub": "false", "repo_id": "null"}
    reflows |= {"scheduler_decay_lr": json.dumps(2e-5 / 40), "scheduler_warmup_steps": "1"}
    reflows |= {"scheduler_decay_steps": "40"}
    policy = {f"policy.{name}": value for name, value in {**kept, **reflows}.items()}
    assert given == {"reflow.teacher_path": "T", **policy}


def test_what_is_typed_holds(saved):
    pushes = {"policy.repo_id": TEACHERS, "policy.push_to_hub": "true", "save_checkpoint_to_hub": "true"}
    typed = {**pushes, "wandb.run_id": "abc123", "output_dir": "/there/1rf"}
    typed |= {"policy.optimizer_lr": "1e-4", "policy.path": "S"}
    given, _ = completed(saved(), "--reflow.teacher_path=T", *(f"--{name}={value}" for name, value in typed.items()))
    assert typed.items() <= given.items()


def test_a_reflow_runs_own_file_keeps_its_hyperparameters(saved):
    """Also the policy's fields, with which it changed what its teacher's config says."""
    given, rest = completed(saved(HANDED_OVER))
    assert {name: given[f"reflow.{name}"] for name in HANDED_OVER} == HANDED_OVER
    schedule = {"policy.scheduler_warmup_steps": "1000", "policy.scheduler_decay_steps": "30000"}
    fields = {"policy.optimizer_lr": "0.0001", "policy.chunk_size": "50"}
    assert {**schedule, **fields, "policy.path": "T", "policy.push_to_hub": "false"}.items() <= given.items()
    assert {"optimizer": PUBLISHED["optimizer"], "use_policy_training_preset": False}.items() <= rest.items()
    assert not {"resume", "checkpoint_path", "output_dir", "job_name", "job", "save_checkpoint_to_hub"} & rest.keys()
    assert not {"policy.use_peft", "policy.pretrained_path"} & given.keys()


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("--steps=7", True),
        ("--reflow.teacher_path=U", False),
        ("--reflow.solver=dopri5", False),
        ("--reflow.solver=midpoint", True),
        ("--reflow.strategy=standard", False),
        ("--reflow.pairs_path=P", False),
    ],
)
def test_the_solvers_filled_in_steps_hold_for_this_teacher_and_solver(saved, typed, kept):
    given, _ = completed(saved({**HANDED_OVER, "num_steps": 5, "solver": "midpoint"}), typed)
    assert ("reflow.num_steps" in given) is kept


def test_a_schedule_that_was_filled_in_is_filled_in_again(saved):
    usual = {"optimizer_lr": 2e-5, "scheduler_decay_lr": 2e-5 * (2.5e-6 / 1e-4)}
    usual |= {"scheduler_warmup_steps": round(40 / 30), "scheduler_decay_steps": 40}
    given, _ = completed(saved(HANDED_OVER, usual), "--steps=3000")
    assert (given["policy.scheduler_decay_steps"], given["policy.scheduler_warmup_steps"]) == ("3000", "100")
    given, _ = completed(saved(HANDED_OVER, {**usual, "scheduler_decay_steps": 25}), "--steps=3000")
    assert given["policy.scheduler_decay_steps"] == "25"


@pytest.mark.parametrize("typed", ["--reflow.teacher_path=U", "--policy.path=S"])
def test_another_checkpoint_brings_its_own_architecture(saved, typed):
    given, _ = completed(saved(HANDED_OVER), typed)
    assert not {"policy.chunk_size", "policy.input_features"} & given.keys()
    assert given["policy.freeze_vision_encoder"] == "false"
    assert given["policy.optimizer_lr"] == "0.0001"


def test_another_dataset_brings_its_own_folder_and_episodes(saved):
    _, rest = completed(saved(), "--reflow.teacher_path=T", "--dataset.repo_id=OTHER")
    assert rest["dataset"] == {"repo_id": "ID", "use_imagenet_stats": False}
    _, rest = completed(saved(), "--reflow.teacher_path=T", "--dataset.repo_id=ID")
    assert rest["dataset"] == PUBLISHED["dataset"]


def test_a_file_written_by_hand_holds_as_it_stands(tmp_path):
    file, kept = tmp_path / "run.yaml", {"output_dir": "out", "job_name": "mine", "wandb": {"run_id": "fresh"}}
    kept |= {"dataset": {"repo_id": "ID"}, "use_policy_training_preset": False, "optimizer": {"type": "adamw"}}
    policy = "{optimizer_lr: 3e-4, repo_id: me/student, push_to_hub: true, pretrained_path: S}"
    others = "".join(f"{name}: {json.dumps(value)}\n" for name, value in kept.items())
    file.write_text(f"policy: {policy}\nreflow: {{teacher_path: T}}\n{others}")
    given, rest = completed(f"--config_path={file}")
    destination = {"policy.repo_id": "me/student", "policy.push_to_hub": "true"}
    assert {**destination, "policy.optimizer_lr": "3e-4", "policy.path": "S"}.items() <= given.items()
    assert rest == kept


@pytest.mark.parametrize(
    ("name", "text"),
    [("save_checkpoint_to_hub", "save_checkpoint_to_hub: true"), ("policy.push_to_hub", "policy: {push_to_hub: true}")],
)
def test_neither_a_flag_nor_a_file_pushes_into_an_unnamed_repository(tmp_path, name, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    for given in (f"--{name}=true", f"--config_path={file}"):
        with pytest.raises(ReflowError, match=f"--{name}=true needs --policy.repo_id, the student's own"):
            complete([given, "--reflow.teacher_path=T", "--dataset.repo_id=ID"])


def test_a_file_is_named_by_its_folder_too(saved, tmp_path, monkeypatch):
    """As LeRobot takes it, from a folder or the hub; and as it is for resuming."""
    saved()
    whole = completed(f"--config_path={tmp_path / 'train_config.json'}", "--reflow.teacher_path=T")
    assert completed(f"--config_path={tmp_path}", "--reflow.teacher_path=T") == whole
    monkeypatch.setattr(
        "smolvla_reflow.training.inherited.hf_hub_download", lambda repo_id, name: tmp_path / repo_id[-1:] / ".." / name
    )
    (tmp_path / "r").mkdir()
    assert completed("--config_path=some/repor", "--reflow.teacher_path=T") == whole


def destination(repo_id, **changes):
    policy = SimpleNamespace(repo_id=repo_id, push_to_hub=True)
    return SimpleNamespace(policy=policy, output_dir=None, **changes)


def teacher(repo_id=None, source="/here/teacher", commit=None):
    return SimpleNamespace(config=SimpleNamespace(repo_id=repo_id), source=source, commit=commit)


@pytest.mark.parametrize("of", [teacher(TEACHERS), teacher(source=TEACHERS, commit="c")], ids=["config", "hub id"])
def test_the_teachers_repository_has_to_be_typed(of):
    with pytest.raises(ReflowError, match=f"would push into {TEACHERS}, the teacher's own repository"):
        check_destinations(destination(TEACHERS), of, {"policy.push_to_hub"})
    check_destinations(destination(TEACHERS), of, {"policy.repo_id"})
    check_destinations(destination("me/student"), of, set())


def test_averaged_weights_go_beside_the_students():
    cfg = destination(TEACHERS, ema=SimpleNamespace(enable=True))
    assert hub_destinations(cfg) == [TEACHERS, f"{TEACHERS}-ema"]
    with pytest.raises(ReflowError, match=f"{TEACHERS}-ema, the teacher's"):
        check_destinations(cfg, teacher(f"{TEACHERS}-ema"), {"policy.repo_id"})


def changed_copy(checkpoint, folder, **fields):
    """A copy of a checkpoint with these fields of the policy changed, in its own config and in its training's."""
    shutil.copytree(checkpoint, folder)
    for name in ("config.json", "train_config.json"):
        content = json.loads((folder / name).read_text())
        content.get("policy", content).update(fields)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def pushed(monkeypatch):
    """The repositories that anything is pushed to meanwhile, which is then not done."""
    found = []

    def create_repo(repo_id, **kwargs):
        found.append(repo_id)
        raise ConnectionError("not in a test")

    for module in ("lerobot.policies.pretrained", "lerobot.utils.hub", "lerobot.common.train_utils"):
        try:
            monkeypatch.setattr(f"{module}.HfApi", lambda token=None: SimpleNamespace(create_repo=create_repo))
        except (ImportError, AttributeError):  # not in this LeRobot
            continue
    return found


def test_nothing_is_pushed_to_the_teachers_repository_unasked(workshop, tmp_path, capsys, pushed):
    """No saved file names it, and a later run that is told to push needs a name. One that names it has to be typed."""
    run, published = tmp_path / "run", {"repo_id": TEACHERS, "push_to_hub": True}
    teacher = changed_copy(workshop / "1rf" / LAST, tmp_path / "teacher", **published)
    reflow_train_main(reflow_run(workshop, run, steps=1, reflow__teacher_path=teacher))
    for name in ("config.json", "train_config.json"):
        assert TEACHERS not in (run / LAST / name).read_text()
    resume = ["--resume=true", f"--config_path={run}", "--steps=2"]
    push = [*resume, "--policy.push_to_hub=true"]
    assert "repo_id' argument missing" in refused(capsys, reflow_train_main, push)
    if "save_checkpoint_to_hub" in TrainPipelineConfig.__dataclass_fields__:
        line = refused(capsys, reflow_train_main, [*resume, "--save_checkpoint_to_hub=true"])
        assert "save_checkpoint_to_hub requires --policy.repo_id" in line
    policy = {**saved_config(run)["policy"], "repo_id": TEACHERS}  # as an earlier version of this package saved it
    edit_json(run / LAST / "train_config.json", policy=policy)
    assert f"would push into {TEACHERS}" in refused(capsys, reflow_train_main, push)
    assert pushed == []
    for destination in ("me/student", TEACHERS):
        line = refused(capsys, reflow_train_main, [*push, f"--policy.repo_id={destination}"])
        assert "While training: ConnectionError: not in a test. Go on from the last good checkpoint" in line
        push[2] = "--steps=3"
    assert pushed == ["me/student", TEACHERS]


def test_a_run_from_the_file_of_a_resumed_run(workshop, tmp_path, capsys):
    """It takes its own steps, from the teacher's weights, with an optimizer of its own."""
    first = tmp_path / "first"
    reflow_train_main(reflow_run(workshop, first, steps=2))
    reflow_train_main(["--resume=true", f"--config_path={first}", "--steps=3"])
    assert saved_config(first)["resume"]
    reflow_train_main([f"--config_path={first / LAST}", f"--output_dir={tmp_path / 'second'}", "--save_freq=1"])
    reflow_train_main(reflow_run(workshop, tmp_path / "same", steps=3, save_freq=1, policy__scheduler_decay_steps=2))
    for step in (1, 3):
        assert same_tensors(*(saved_weights(tmp_path / run, f"00000{step}") for run in ("second", "same")))


def test_a_run_from_the_teachers_file_fills_in_the_rest_and_says_so_in_one_line(
    workshop, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file = workshop / "1rf" / LAST / "train_config.json"
    before = {path: path.read_bytes() for path in (workshop / "1rf").rglob("*") if path.is_file()}
    flags = [f"--config_path={file}", f"--reflow.teacher_path={file.parent}", "--steps=1", "--wandb.mode=disabled"]
    reflow_train_main(flags)
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if "Reflow: teacher" in ln]
    assert "1 steps, batch 8; filled in:" in line
    assert "--policy.optimizer_lr=2e-05" in line
    saved = saved_config(*tmp_path.glob("outputs/train/*/*_smolvla"))
    assert saved["optimizer"]["lr"] == 2e-5
    assert saved["scheduler"]["decay_lr"] == pytest.approx(5e-7)
    assert saved["dataset"]["root"] == str(workshop / "dataset")
    assert {path: path.read_bytes() for path in before} == before


def test_a_merged_adapter_that_says_it_is_one(workshop, tmp_path):
    """`use_peft: true` stays in the config of a checkpoint whose adapter has been merged, and in its training's."""
    lora = {"peft__method_type": "LORA", "peft__r": 2}
    merged = changed_copy(workshop / "1rf" / LAST, tmp_path / "merged", use_peft=True)
    flags = reflow_run(workshop, tmp_path / "lora", steps=1, reflow__teacher_path=merged, **lora)
    reflow_train_main([*flags, f"--config_path={merged}"])
    reflow_train_main(["--resume=true", f"--config_path={tmp_path / 'lora'}", "--steps=2"])
    assert (tmp_path / "lora" / "checkpoints/000002/pretrained_model/adapter_model.safetensors").is_file()
