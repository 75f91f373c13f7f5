"""Checkpoints as other LeRobots, other machines and the hub have them, opened by every command in the same way."""

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import ADAPTER_CONFIG, CONFIG, PREPROCESSOR, edit_step, edit_weights, state_file
from helpers import eval_flags, reflow_run, reflow_train_main, refused
from huggingface_hub.utils import filter_repo_objects
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from pairs_helpers import pairs_flags
from people import edit_json
from safetensors.torch import load_file
from transformers import AutoTokenizer

from smolvla_reflow import ReflowError, attach
from smolvla_reflow.checkpoint import read as checkpoint_module
from smolvla_reflow.checkpoint.load import load_policy, load_processors, weights_of
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST

WEIGHTS = "model.safetensors"
WORDS = ("observation.language.tokens", "observation.language.attention_mask")
ELSEWHERE = "/nowhere/backbone"
BIAS = "model.action_out_proj.bias"


def saved(folder: Path, name: str = "train_config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def train_on(workshop, folder, output_dir, **changes):
    reflow_train_main(reflow_run(workshop, output_dir, reflow__teacher_path=folder, **{"steps": 2, **changes}))
    return output_dir / LAST


def evaluate(workshop, folder, output_dir, **changes):
    flags = {"policy__path": folder, "num_steps": "[1]", "num_frames": 2, "num_noises": 2, "reference_steps": 2}
    eval_command.main(eval_flags(workshop, output_dir, **{**flags, **changes}))
    return saved(output_dir, "report.json")


def words_by_lerobot(folder: Path) -> list[torch.Tensor]:
    """The tokens and the mask of an instruction, by plain LeRobot."""
    preprocessor, _ = make_pre_post_processors(PreTrainedConfig.from_pretrained(folder), str(folder))
    frame = {"observation.state": torch.tensor([0.1, 0.2]), "observation.images.top": torch.zeros(3, 32, 32)}
    batch = preprocessor({**frame, "task": "drive past the obstacle"})
    return [batch[name] for name in WORDS]


def load(folder: Path) -> None:
    opened = open_checkpoint(folder)
    load_processors(opened, "cpu", {})
    load_policy(opened, "cpu")


def tokenizer_at(name: str) -> Callable[[dict[str, Any]], None]:
    """An edit of the step: its tokenizer is at `name`, and not inside the checkpoint as from LeRobot 0.6.2 on."""

    def edited(step: dict[str, Any]) -> None:
        step["config"]["tokenizer_name"] = name
        step.pop("artifacts", None)

    return edited


def another_machines(folder: Path) -> None:
    edit_json(folder / CONFIG, vlm_model_name=ELSEWHERE)
    edit_step(folder, "tokenizer_processor", tokenizer_at(ELSEWHERE))


def step_named(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_step(folder, name, lambda step: step.update(fields))


def weights_where(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder / WEIGHTS, change)


SILENT = [  # LeRobot warns at most
    (weights_where(lambda weights: weights.pop(BIAS)), f"they lack {BIAS}"),
    (weights_where(lambda weights: weights.update(extra=torch.ones(1))), "have the unknown extra"),
    (weights_where(lambda weights: weights[BIAS].fill_(math.nan)), f"{BIAS} .* holds NaN or infinity"),
]
LOUD = [
    (weights_where(lambda weights: weights.update({BIAS: torch.ones(1)})), f"While loading the policy.*{BIAS}"),
    (lambda f: (f / PREPROCESSOR).unlink(), "has no policy_preprocessor.json"),
    (lambda f: (f / "policy_postprocessor.json").unlink(), "has no policy_postprocessor.json"),
    (lambda f: (f / PREPROCESSOR).write_text('{"steps": 3}'), "While reading the steps of"),
    (lambda f: state_file(f).unlink(), "normalizer_processor.safetensors', which is not in the checkpoint"),
    (lambda f: state_file(f).write_bytes(b"cut"), "While loading the processors"),
    (
        step_named("device_processor", registry_name="new"),
        "names 'new', which is no processor step of SmolVLA in LeRobot",
    ),
    (step_named("device_processor", config={"new": 1}), "While loading the processors of .*device_processor"),
    (
        lambda f: edit_step(f, "tokenizer_processor", tokenizer_at(ELSEWHERE)),
        f"While loading the tokenizer {ELSEWHERE}",
    ),
    (lambda f: edit_json(f / CONFIG, vlm_model_name=ELSEWHERE), f"--policy.vlm_model_name={ELSEWHERE}: .*OSError"),
    (lambda f: edit_json(f / CONFIG, load_vlm_weights=True), "no file named"),
    (lambda f: edit_json(f / CONFIG, from_the_future=1), "config.json with LeRobot .*`from_the_future`"),
    (lambda f: edit_json(f / CONFIG, type="act"), "While reading .*config.json|holds a policy of type 'act'"),
    (lambda f: (f / CONFIG).write_text("{"), "While reading .*config.json: JSONDecodeError"),
    (lambda f: (f / CONFIG).unlink(), "holds no config.json. Name a folder such as RUN/checkpoints/last"),
    (lambda f: (f / WEIGHTS).unlink(), "holds no model.safetensors. .*lerobot-convert-dcp --checkpoint_dir="),
]


@pytest.mark.parametrize(("break_it", "message"), [*SILENT, *LOUD])
def test_what_cannot_be_used(teacher, break_it, message):
    break_it(teacher)
    with pytest.raises(ReflowError, match=message):
        load(teacher)


@pytest.mark.parametrize(("break_it", "message"), [SILENT[0], LOUD[1], *LOUD[9:11]])
def test_training_and_evaluation_refuse_in_the_same_words(workshop, teacher, tmp_path, capsys, break_it, message):
    break_it(teacher)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    training = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=teacher)
    assert re.search(message, refused(capsys, reflow_train_main, training))
    evaluation = eval_flags(workshop, tmp_path / "r", policy__path=teacher)
    assert re.search(message, refused(capsys, eval_command.main, evaluation))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_loaded_is_what_is_stored(teacher):
    opened = open_checkpoint(teacher)
    weights, stored = load_policy(opened, "cpu").state_dict(), load_file(teacher / WEIGHTS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(weights_of(opened)[name], tensor) for name, tensor in stored.items())


def save_as_0_6_2(folder: Path, tokenizer) -> None:
    """Put the tokenizer into the checkpoint, as LeRobot does from 0.6.2 on."""
    tokenizer.save_pretrained(folder / "tokenizer")

    def change(step):
        step["config"]["tokenizer_name"] = "tokenizer"
        step["artifacts"] = {"tokenizer_name": "tokenizer"}

    edit_step(folder, "tokenizer_processor", change)


def test_a_tokenizer_inside_the_checkpoint(workshop, teacher, tmp_path):
    """Works with a LeRobot that does not know of it; the student names the backbone, as that LeRobot's own would."""
    backbone, as_saved_here = workshop / "backbone", words_by_lerobot(teacher)
    save_as_0_6_2(teacher, AutoTokenizer.from_pretrained(backbone))
    opened = open_checkpoint(teacher)
    assert opened.tokenizer == str(teacher / "tokenizer")
    read = load_processors(opened, "cpu", {}).before(
        {"observation.state": torch.zeros(2), "task": "drive past the obstacle"}
    )
    assert all(torch.equal(read[name], ids) for name, ids in zip(WORDS, as_saved_here, strict=True))

    student = train_on(workshop, teacher, tmp_path / "run")
    shutil.rmtree(teacher)
    assert all(map(torch.equal, words_by_lerobot(student), as_saved_here))


def test_a_tokenizer_inside_the_checkpoint_that_is_not_the_backbones(workshop, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workshop / "backbone")
    tokenizer.add_tokens(["obstacle"])
    save_as_0_6_2(teacher, tokenizer)
    read, _ = words_by_lerobot(train_on(workshop, teacher, tmp_path / "run"))
    assert len(tokenizer) - 1 in read


@pytest.mark.parametrize("name", ["../tokenizer", "/etc"])
def test_a_tokenizer_inside_the_checkpoint_lies_inside(teacher, name):
    edit_step(teacher, "tokenizer_processor", lambda step: step.update(artifacts={"tokenizer_name": name}))
    with pytest.raises(ReflowError, match="which is not in the checkpoint"):
        open_checkpoint(teacher)


def test_statistics_among_the_weights(teacher):
    """LeRobot 0.3 had no processors. The converter that the message names is there, and takes the flag."""
    stats = load_file(state_file(teacher))
    of_state = {
        f"normalize_inputs.buffer_observation_state.{k}": stats[f"observation.state.{k}"] for k in ("mean", "std")
    }
    edit_weights(teacher / WEIGHTS, lambda weights: weights.update(of_state))
    for file in teacher.glob("policy_*processor*"):
        file.unlink()
    with pytest.raises(ReflowError, match=r"has no policy_preprocessor.json.*convert one of LeRobot 0.3") as error:
        open_checkpoint(teacher).statistics()
    command = str(error.value).partition("python -m ")[2].split()
    assert command[1:] == ["--pretrained-path", str(teacher)]
    tool = importlib.util.find_spec(command[0])
    assert tool is not None
    assert f'"{command[1]}"' in Path(tool.origin).read_text()


def test_a_backbone_that_is_somewhere_else_here(workshop, teacher, tmp_path, monkeypatch):
    """The student is one of this machine's: stock LeRobot loads it, and a resumed run goes on. Scratch is cleaned up."""
    here, before = workshop / "backbone", words_by_lerobot(teacher)
    another_machines(teacher)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    student = train_on(workshop, teacher, tmp_path / "run", policy__vlm_model_name=here)
    assert not list((tmp_path / "scratch").glob("reflow_*"))
    assert saved(student, CONFIG)["vlm_model_name"] == str(here)
    assert saved(student, CONFIG)["pretrained_path"] == str(teacher)
    assert str(ELSEWHERE) not in (student / PREPROCESSOR).read_text()
    SmolVLAPolicy.from_pretrained(student)
    assert all(map(torch.equal, words_by_lerobot(student), before))
    reflow_train_main([f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"])
    assert (tmp_path / "run/checkpoints/000003").is_dir()
    report = evaluate(workshop, student, tmp_path / "r", teacher_path=teacher, policy__vlm_model_name=here)
    assert report["made_with"]["teacher's path"] == str(teacher)
    few = {"dataset__episodes": "[0]", "couplings_per_frame": 1, "policy__vlm_model_name": here}
    pairs_command.main(pairs_flags(workshop, tmp_path / "pairs", reflow__teacher_path=teacher, **few))
    assert (tmp_path / "pairs/manifest.json").is_file()


@pytest.mark.parametrize(
    ("config_says", "step_says", "found"),
    [
        (ELSEWHERE, "{here}", "{here}"),
        ("{here}", ELSEWHERE, "{here}"),
        (ELSEWHERE, ELSEWHERE, "{here}"),
        (ELSEWHERE, "{own}", "{own}"),  # of a base from the hub that was fine-tuned with a backbone from a folder, say
    ],
)
def test_either_of_two_names_may_be_another_machines(workshop, teacher, tmp_path, config_says, step_says, found):
    where = {"here": workshop / "backbone", "own": tmp_path / "own"}
    AutoTokenizer.from_pretrained(where["here"]).save_pretrained(where["own"])
    edit_json(teacher / CONFIG, vlm_model_name=config_says.format(**where))
    edit_step(teacher, "tokenizer_processor", tokenizer_at(step_says.format(**where)))
    opened = open_checkpoint(teacher, backbone=str(where["here"]))
    assert (opened.tokenizer, opened.config.vlm_model_name) == (found.format(**where), str(where["here"]))
    assert opened.fingerprint() == open_checkpoint(teacher).fingerprint()
    load_processors(opened, "cpu", {})


def test_a_path_from_the_home_folder(workshop, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    student = train_on(workshop, "~/teacher", tmp_path / "run")
    assert saved(student, CONFIG)["pretrained_path"] == str(teacher)


def test_an_adapter_that_has_been_merged(workshop, teacher, tmp_path):
    """What LeRobot notes for an adapter stays in its config.json; nothing looks for one."""
    edit_json(teacher / CONFIG, use_peft=True)
    assert not open_checkpoint(teacher).config.use_peft
    student = train_on(workshop, teacher, tmp_path / "run")
    assert not saved(student, CONFIG)["use_peft"]
    evaluate(workshop, student, tmp_path / "r", teacher_path=teacher)


def test_an_adapter_beside_weights(teacher):
    edit_json(teacher / CONFIG, use_peft=True)
    (teacher / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ReflowError, match="holds an adapter, which LeRobot would load"):
        open_checkpoint(teacher)


def trained_further(folder: Path) -> None:
    edit_weights(folder / WEIGHTS, lambda weights: weights[BIAS].add_(0.5))


def test_a_run_keeps_its_teacher(workshop, teacher, tmp_path, capsys):
    """Resumed, or begun anew from its file, unless another one is named."""
    student = train_on(workshop, teacher, tmp_path / "run")
    assert saved(student)["reflow"]["teacher_fingerprint"] == open_checkpoint(teacher).fingerprint()
    resume = [f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"]
    again = [f"--config_path={student / 'train_config.json'}", f"--output_dir={tmp_path / 'again'}", "--steps=1"]
    moved = teacher.rename(tmp_path / "moved")
    trained_further(Path(shutil.copytree(moved, teacher)))
    said = refused(capsys, reflow_train_main, resume)
    assert f"The teacher {teacher} is not the one that this run began with" in said
    assert "is not the one that this file was written with" in refused(capsys, reflow_train_main, again)
    reflow_train_main([*resume, f"--reflow.teacher_path={moved}"])
    assert (tmp_path / "run/checkpoints/000003").is_dir()
    reflow_train_main([*again, f"--reflow.teacher_path={teacher}"])
    noted = saved(tmp_path / "again" / LAST)["reflow"]
    assert noted["teacher_fingerprint"] == open_checkpoint(teacher).fingerprint()


def test_the_next_round_has_another_teacher(workshop, teacher, tmp_path):
    first = train_on(workshop, teacher, tmp_path / "2rf")
    second = train_on(workshop, first, tmp_path / "3rf", config_path=first / "train_config.json")
    noted = saved(second)["reflow"]
    assert Path(noted["teacher_path"]) == first.resolve()
    assert noted["teacher_fingerprint"] == open_checkpoint(first).fingerprint()


def test_a_student_is_compared_with_the_teacher_it_learnt_from(workshop, teacher, tmp_path, capsys):
    student = train_on(workshop, teacher, tmp_path / "run")
    trained_further(teacher)
    flags = eval_flags(workshop, tmp_path / "r", policy__path=student, teacher_path=teacher)
    said = refused(capsys, eval_command.main, flags)
    assert f"was reflowed from {teacher} as it was then" in said
    evaluate(workshop, student, tmp_path / "r", teacher_path=workshop / "1rf" / LAST)  # the same, somewhere else


@pytest.mark.parametrize("name", ["teacher_commit", "teacher_fingerprint"])
def test_what_the_run_fills_in_is_not_for_the_user(workshop, tmp_path, capsys, name):
    flags = reflow_run(workshop, tmp_path / "run", **{f"reflow__{name}": "0"})
    assert f"--reflow.{name} is filled in by the run" in refused(capsys, reflow_train_main, flags)


# --- on the hub -----------------------------------------------------------------------------------------------

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def cache(workshop, cached):
    """The hub's cache on this machine, with two commits of `me/teacher`, of which main is the second."""
    cached("me/teacher", COMMITS[0], workshop / "1rf" / LAST, "v1")
    snapshot = cached("me/teacher", COMMITS[1], workshop / "1rf" / LAST, "main")
    trained_further(snapshot)
    return snapshot.parent.parent


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMITS[1]), ("main", COMMITS[1]), ("v1", COMMITS[0]), (COMMITS[0], COMMITS[0])]
)
def test_a_revision_of_the_teacher(cache, revision, commit):
    opened = open_checkpoint("me/teacher", revision)
    assert (opened.source, opened.commit) == ("me/teacher", commit)
    assert opened.folder == cache / "snapshots" / commit


def test_a_run_from_the_hub_keeps_its_commit(workshop, cache, tmp_path):
    """Student and teacher are of one commit, and a resumed run stays with it whatever main has become."""
    student = train_on(workshop, "me/teacher", tmp_path / "run", policy__optimizer_lr=1e-12)
    weights = load_file(student / WEIGHTS)
    for name, tensor in load_file(cache / "snapshots" / COMMITS[1] / WEIGHTS).items():
        torch.testing.assert_close(weights[name], tensor)
    assert saved(student)["policy"]["pretrained_path"] == "me/teacher"
    assert saved(student)["reflow"]["teacher_commit"] == COMMITS[1]
    (cache / "refs/main").write_text(COMMITS[0])
    reflow_train_main([f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"])
    assert saved(tmp_path / "run" / LAST)["reflow"]["teacher_commit"] == COMMITS[1]


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMITS[1]), ("v1", COMMITS[0])])
def test_attaching_a_revision(workshop, cache, revision, commit):
    student = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST)
    attached = attach(student, "me/teacher", revision=revision).teacher
    expected = SmolVLAPolicy.from_pretrained(cache / "snapshots" / commit).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in attached.state_dict().items())
    with pytest.raises(ReflowError, match="revision has no effect on a teacher that is not named by its hub id"):
        attach(SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST), student, revision="v1")


def test_training_on_a_revision_and_evaluating_it(workshop, cache, tmp_path, capsys):
    student = train_on(workshop, "me/teacher", tmp_path / "run", reflow__teacher_revision="v1")
    assert saved(student)["reflow"]["teacher_commit"] == COMMITS[0]
    flags = eval_flags(workshop, tmp_path / "r", policy__path=student, teacher_path="me/teacher")
    assert f"Name the one it learnt from with its revision, {COMMITS[0]}" in refused(capsys, eval_command.main, flags)
    report = evaluate(workshop, student, tmp_path / "r", teacher_path="me/teacher", teacher_revision="v1")
    assert report["made_with"]["teacher's path"] == f"me/teacher at {COMMITS[0]}"
    report = evaluate(workshop, "me/teacher", tmp_path / "s", policy__pretrained_revision="v1")
    assert report["made_with"]["policy's path"] == f"me/teacher at {COMMITS[0]}"


def test_a_revision_that_has_no_effect_or_is_not_there(teacher, cache):
    with pytest.raises(ReflowError, match="so the revision v1 has no effect"):
        open_checkpoint(teacher, "v1")
    with pytest.raises(
        ReflowError, match=r"While downloading me/teacher \(revision v9\) from the hub, since there is no"
    ):
        open_checkpoint("me/teacher", "v9")


@pytest.mark.parametrize("adapter", [False, True])
def test_only_what_is_read_is_downloaded(workshop, teacher, tmp_path, monkeypatch, adapter):
    """A repository holds the run's optimizer states too, tens of gigabytes of them."""
    save_as_0_6_2(teacher, AutoTokenizer.from_pretrained(workshop / "backbone"))
    if adapter:
        (teacher / WEIGHTS).rename(teacher / "adapter_model.safetensors")
        (teacher / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": str(workshop / "1rf" / LAST)}))
    wanted = {path.relative_to(teacher).as_posix() for path in teacher.rglob("*") if path.is_file()} - {"README.md"}
    for other in (
        "README.md",
        "checkpoints/000002/pretrained_model/model.safetensors",
        "tokenizer.json",
        "training.bin",
    ):
        (teacher / other).parent.mkdir(parents=True, exist_ok=True)
        (teacher / other).write_bytes(b"")
    local, asked = tmp_path / COMMITS[0], []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        files = [path.relative_to(teacher).as_posix() for path in teacher.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(teacher / name, local / name)
        return str(local)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    opened = open_checkpoint("me/teacher", "v1")
    load_processors(opened, "cpu", {})
    assert asked == [("me/teacher", "v1"), ("me/teacher", COMMITS[0])]
    assert {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} == wanted
    if not adapter:
        assert opened.fingerprint() == open_checkpoint(teacher).fingerprint()
