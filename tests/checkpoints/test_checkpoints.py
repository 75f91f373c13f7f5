"""Checkpoints as other LeRobots, other machines and the hub have them, opened by every command in the same way."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot
import pytest
import torch
from helpers import eval_flags, reflow_run, reflow_train_main, refused
from huggingface_hub import constants
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from pairs_helpers import pairs_flags
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from smolvla_reflow import ReflowError, attach
from smolvla_reflow.checkpoint import read as checkpoint_module
from smolvla_reflow.checkpoint.load import load_policy, load_processors
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST

PREPROCESSOR = "policy_preprocessor.json"
WORDS = ("observation.language.tokens", "observation.language.attention_mask")
ELSEWHERE = "/nowhere/backbone"


@pytest.fixture
def teacher(workshop, tmp_path):
    """A copy of the workshop's teacher, to be changed."""
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_step(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change one step of the saved preprocessor."""
    edit(
        folder / PREPROCESSOR,
        lambda saved: [change(step) for step in saved["steps"] if step["registry_name"] == name],
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def state_file(folder: Path) -> Path:
    (file,) = folder.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    return file


def train_on(workshop, folder, output_dir, **changes):
    reflow_train_main(reflow_run(workshop, output_dir, reflow__teacher_path=folder, **{"steps": 2, **changes}))
    return output_dir / LAST


def evaluate(workshop, folder, output_dir, **changes):
    flags = {"policy__path": folder, "num_steps": "[1]", "num_frames": 2, "num_noises": 2, "reference_steps": 2}
    eval_command.main(eval_flags(workshop, output_dir, **{**flags, **changes}))
    return json.loads((output_dir / "report.json").read_text())


def stock(folder: Path):
    """The policy and what it reads of an instruction, by plain LeRobot."""
    policy = SmolVLAPolicy.from_pretrained(folder).eval()
    preprocessor, _ = make_pre_post_processors(policy.config, str(folder))
    frame = {
        "observation.state": torch.tensor([0.1, 0.2]),
        "observation.images.top": torch.zeros(3, 32, 32),
        "task": "drive past the obstacle",
    }
    batch = preprocessor(frame)
    return policy, [batch[name] for name in WORDS]


# --- every command says the same ------------------------------------------------------------------------------


def tokenizer_at(name: str) -> Callable[[dict[str, Any]], None]:
    """An edit of the step: its tokenizer is at `name`, and not inside the checkpoint as from LeRobot 0.6.2 on."""

    def edited(step: dict[str, Any]) -> None:
        step["config"]["tokenizer_name"] = name
        step.pop("artifacts", None)

    return edited


def another_machines(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(vlm_model_name=ELSEWHERE))
    edit_step(folder, "tokenizer_processor", tokenizer_at(ELSEWHERE))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "policy_preprocessor.json").unlink(), "has no policy_preprocessor.json"),
        (lambda f: (f / "policy_postprocessor.json").unlink(), "has no policy_postprocessor.json"),
        (lambda f: (f / "policy_postprocessor.json").write_text('{"steps": 3}'), "holds no list of steps"),
        (lambda f: state_file(f).unlink(), "normalizer_processor.safetensors, which policy_preprocessor.json names"),
        (lambda f: state_file(f).write_bytes(state_file(f).read_bytes()[:-1000]), "cannot be read"),
        (
            lambda f: edit(f / PREPROCESSOR, lambda s: s["steps"].append({"registry_name": "from_the_future"})),
            "names 'from_the_future', which is no processor step of the installed LeRobot",
        ),
        (
            lambda f: edit_step(f, "device_processor", lambda s: s["config"].update(async_copy=True)),
            "the step 'device_processor' has the unknown setting 'async_copy'. It was saved by another LeRobot",
        ),
        (lambda f: edit_step(f, "device_processor", lambda s: s.update(config=[1])), "is no mapping"),
        (
            lambda f: edit_step(f, "tokenizer_processor", tokenizer_at(ELSEWHERE)),
            f"names the tokenizer '{ELSEWHERE}', which is not here",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(vlm_model_name=ELSEWHERE)),
            f"--policy.vlm_model_name={ELSEWHERE}: the backbone's configuration is not there",
        ),
        (lambda f: edit(f / "config.json", lambda c: c.update(load_vlm_weights=True)), "holds no weights"),
        (lambda f: edit(f / "config.json", lambda c: c.update(from_the_future=1)), "`from_the_future`"),
        (lambda f: edit_weights(f, lambda w: w.pop("model.action_out_proj.bias")), "they lack model.action_out_proj"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))), "they have the unknown extra"),
        (
            lambda f: edit_weights(f, lambda w: w["model.action_out_proj.bias"].fill_(math.nan)),
            "model.action_out_proj.bias holds NaN or infinity",
        ),
        (
            lambda f: edit_weights(f, lambda w: w.update({"model.action_out_proj.bias": torch.ones(1)})),
            "model.action_out_proj.bias",
        ),
    ],
)
def test_training_and_evaluation_refuse_in_the_same_words(workshop, teacher, tmp_path, capsys, break_it, message):
    break_it(teacher)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    training = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=teacher)
    assert message in refused(capsys, reflow_train_main, training)
    assert message in refused(capsys, eval_command.main, eval_flags(workshop, tmp_path / "r", policy__path=teacher))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- written by another LeRobot -------------------------------------------------------------------------------


def test_unknown_fields_are_those_of_a_newer_lerobot(teacher):
    """Its own message is passed on whole, and by whom the checkpoint was saved."""
    edit(teacher / "config.json", lambda config: config.update(from_the_future=1))
    with pytest.raises(Exception, match="from_the_future") as stock_error:
        PreTrainedConfig.from_pretrained(teacher)
    with pytest.raises(ReflowError) as error:
        open_checkpoint(teacher)
    assert " ".join(str(stock_error.value).split()) in str(error.value)
    assert f"saved by another LeRobot than the installed {lerobot.__version__}" in str(error.value)


def save_as_0_6_2(folder: Path, tokenizer) -> None:
    """Put the tokenizer into the checkpoint, as LeRobot does from 0.6.2 on."""
    tokenizer.save_pretrained(folder / "tokenizer")

    def change(step):
        step["config"]["tokenizer_name"] = "tokenizer"
        step["artifacts"] = {"tokenizer_name": "tokenizer"}

    edit_step(folder, "tokenizer_processor", change)


def test_a_tokenizer_inside_the_checkpoint(workshop, teacher, tmp_path):
    """Works with a LeRobot that does not know of it; the student names the backbone, as that LeRobot's own would."""
    backbone = workshop / "backbone"
    _, as_saved_here = stock(teacher)
    save_as_0_6_2(teacher, AutoTokenizer.from_pretrained(backbone))
    opened = open_checkpoint(teacher)
    assert opened.tokenizer == str(teacher / "tokenizer")
    words = load_processors(opened, "cpu", {}).before(
        {"observation.state": torch.zeros(2), "task": "drive past the obstacle"}
    )
    assert all(torch.equal(words[name], ids) for name, ids in zip(WORDS, as_saved_here, strict=True))

    student = train_on(workshop, teacher, tmp_path / "run")
    shutil.rmtree(teacher)
    _, read = stock(student)
    assert all(map(torch.equal, read, as_saved_here))


def test_a_tokenizer_inside_the_checkpoint_that_is_not_the_backbones(workshop, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workshop / "backbone")
    tokenizer.add_tokens(["obstacle"])
    save_as_0_6_2(teacher, tokenizer)
    _, (read, _) = stock(train_on(workshop, teacher, tmp_path / "run"))
    assert len(tokenizer) - 1 in read


def test_a_tokenizer_that_is_missing_from_the_checkpoint(workshop, teacher):
    save_as_0_6_2(teacher, AutoTokenizer.from_pretrained(workshop / "backbone"))
    shutil.rmtree(teacher / "tokenizer")
    with pytest.raises(ReflowError, match=r"lacks tokenizer, which policy_preprocessor\.json names"):
        open_checkpoint(teacher)


@pytest.mark.parametrize("name", ["../tokenizer", "/etc"])
def test_a_tokenizer_inside_the_checkpoint_lies_inside(workshop, teacher, name):
    edit_step(teacher, "tokenizer_processor", lambda step: step.update(artifacts={"tokenizer_name": name}))
    with pytest.raises(ReflowError, match="which is not in the checkpoint"):
        open_checkpoint(teacher)


def save_as_0_3(folder: Path) -> None:
    """Put the statistics among the weights, as LeRobot did before it had processors."""
    stats = load_file(state_file(folder))

    def change(weights):
        for kind in ("mean", "std"):
            weights[f"normalize_inputs.buffer_observation_state.{kind}"] = stats[f"observation.state.{kind}"]
            weights[f"unnormalize_outputs.buffer_action.{kind}"] = stats[f"action.{kind}"].clone()

    edit_weights(folder, change)
    for file in folder.glob("policy_*processor*"):
        file.unlink()


def test_statistics_among_the_weights(teacher):
    """The converter that the message names is there, and takes the flag."""
    save_as_0_3(teacher)
    with pytest.raises(ReflowError, match="LeRobot 0.3 or an earlier one") as error:
        open_checkpoint(teacher)
    command = str(error.value).partition("python -m ")[2].split()
    assert command[1:] == ["--pretrained-path", str(teacher)]
    tool = importlib.util.find_spec(command[0])
    assert tool is not None
    assert f'"{command[1]}"' in Path(tool.origin).read_text()


def test_weights_in_shards(teacher):
    (teacher / "model.safetensors").unlink()
    (teacher / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ReflowError, match=f"lerobot-convert-dcp --checkpoint_dir={teacher}"):
        open_checkpoint(teacher)


# --- from another machine -------------------------------------------------------------------------------------


def test_a_backbone_that_is_somewhere_else_here(workshop, teacher, tmp_path):
    """The student is one of this machine's: stock LeRobot loads it, and a resumed run goes on."""
    here, before = workshop / "backbone", stock(teacher)[1]
    another_machines(teacher)
    student = train_on(workshop, teacher, tmp_path / "run", policy__vlm_model_name=here)
    saved = json.loads((student / "config.json").read_text())
    assert saved["vlm_model_name"] == str(here)
    assert saved["pretrained_path"] == str(teacher)
    assert str(ELSEWHERE) not in (student / PREPROCESSOR).read_text()
    assert all(map(torch.equal, stock(student)[1], before))
    reflow_train_main([f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"])
    assert (tmp_path / "run/checkpoints/000003").is_dir()
    report = evaluate(workshop, student, tmp_path / "r", teacher_path=teacher, policy__vlm_model_name=here)
    assert report["made_with"]["teacher"] == str(teacher)


@pytest.mark.parametrize(("config_says", "step_says"), [(ELSEWHERE, None), (None, ELSEWHERE), (ELSEWHERE, ELSEWHERE)])
def test_either_of_two_names_may_be_another_machines(workshop, teacher, config_says, step_says):
    here = str(workshop / "backbone")
    edit(teacher / "config.json", lambda config: config.update(vlm_model_name=config_says or here))
    edit_step(teacher, "tokenizer_processor", tokenizer_at(step_says or here))
    opened = open_checkpoint(teacher, backbone=here)
    assert (opened.tokenizer, opened.config.vlm_model_name) == (here, here)


def test_a_tokenizer_of_its_own_is_kept(workshop, teacher, tmp_path):
    """Of a base from the hub that was fine-tuned with a backbone from a folder, say."""
    own = tmp_path / "own"
    AutoTokenizer.from_pretrained(workshop / "backbone").save_pretrained(own)
    edit_step(teacher, "tokenizer_processor", tokenizer_at(str(own)))
    moved = Path(shutil.copytree(workshop / "backbone", tmp_path / "moved"))
    assert open_checkpoint(teacher, backbone=str(moved)).tokenizer == str(own)


def test_pairs_of_a_backbone_that_is_somewhere_else_here(workshop, teacher, tmp_path):
    another_machines(teacher)
    opened = open_checkpoint(teacher, backbone=str(workshop / "backbone"))
    load_processors(opened, "cpu", {})
    assert opened.fingerprint() == open_checkpoint(teacher).fingerprint()
    weights = load_policy(opened, "cpu").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(teacher / "model.safetensors").items())
    pairs_command.main(
        pairs_flags(
            workshop,
            tmp_path / "pairs",
            reflow__teacher_path=teacher,
            policy__vlm_model_name=workshop / "backbone",
            dataset__episodes="[0]",
            couplings_per_frame=1,
        )
    )
    assert (tmp_path / "pairs/manifest.json").is_file()


def test_nothing_temporary_is_left(workshop, teacher, tmp_path, monkeypatch):
    another_machines(teacher)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    train_on(workshop, teacher, tmp_path / "run", policy__vlm_model_name=workshop / "backbone")
    assert not list(scratch.glob("reflow_*"))


def test_a_path_from_the_home_folder(workshop, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    student = train_on(workshop, "~/teacher", tmp_path / "run")
    assert json.loads((student / "config.json").read_text())["pretrained_path"] == str(teacher)


# --- adapters -------------------------------------------------------------------------------------------------


def test_an_adapter_that_has_been_merged(workshop, teacher, tmp_path):
    """What LeRobot notes for an adapter stays in its config.json; nothing looks for one."""
    edit(teacher / "config.json", lambda config: config.update(use_peft=True))
    assert not open_checkpoint(teacher).config.use_peft
    student = train_on(workshop, teacher, tmp_path / "run")
    assert not json.loads((student / "config.json").read_text())["use_peft"]
    evaluate(workshop, student, tmp_path / "r", teacher_path=teacher)


def test_an_adapter_beside_weights(teacher):
    edit(teacher / "config.json", lambda config: config.update(use_peft=True))
    (teacher / "adapter_config.json").write_text("{}")
    with pytest.raises(ReflowError, match="holds an adapter, which LeRobot would load"):
        open_checkpoint(teacher)


# --- which teacher it is --------------------------------------------------------------------------------------


def trained_further(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["model.action_out_proj.bias"].add_(0.5))


def test_a_resumed_run_keeps_its_teacher(workshop, teacher, tmp_path, capsys):
    student = train_on(workshop, teacher, tmp_path / "run")
    noted = json.loads((student / "train_config.json").read_text())["reflow"]
    assert noted["teacher_fingerprint"] == open_checkpoint(teacher).fingerprint()
    resume = [f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"]
    moved = teacher.rename(tmp_path / "moved")
    trained_further(Path(shutil.copytree(moved, teacher)))
    said = refused(capsys, reflow_train_main, resume)
    assert f"The teacher {teacher} is not the one that this run began with" in said
    reflow_train_main([*resume, f"--reflow.teacher_path={moved}"])
    assert (tmp_path / "run/checkpoints/000003").is_dir()


def test_a_new_run_of_an_old_file_has_its_teacher_or_one_that_is_named(workshop, teacher, tmp_path, capsys):
    student = train_on(workshop, teacher, tmp_path / "run")
    again = [f"--config_path={student / 'train_config.json'}", f"--output_dir={tmp_path / 'again'}", "--steps=1"]
    trained_further(teacher)
    assert "is not the one that this file was written with" in refused(capsys, reflow_train_main, again)
    reflow_train_main([*again, f"--reflow.teacher_path={teacher}"])
    noted = json.loads((tmp_path / "again" / LAST / "train_config.json").read_text())["reflow"]
    assert noted["teacher_fingerprint"] == open_checkpoint(teacher).fingerprint()


def test_the_next_round_has_another_teacher(workshop, teacher, tmp_path):
    first = train_on(workshop, teacher, tmp_path / "2rf")
    second = train_on(workshop, first, tmp_path / "3rf", config_path=first / "train_config.json")
    noted = json.loads((second / "train_config.json").read_text())["reflow"]
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
def cache(workshop, tmp_path, monkeypatch):
    """The hub's cache on this machine, with two commits of `me/teacher`, of which main is the second."""
    folder = tmp_path / "hub/models--me--teacher"
    for commit in COMMITS:
        shutil.copytree(workshop / "1rf" / LAST, folder / "snapshots" / commit)
    trained_further(folder / "snapshots" / COMMITS[1])
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMITS[1])
    (folder / "refs/v1").write_text(COMMITS[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent))
    return folder


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
    weights = load_file(student / "model.safetensors")
    for name, tensor in load_file(cache / "snapshots" / COMMITS[1] / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor)
    saved = json.loads((student / "train_config.json").read_text())
    assert saved["policy"]["pretrained_path"] == "me/teacher"
    assert saved["reflow"]["teacher_commit"] == COMMITS[1]
    (cache / "refs/main").write_text(COMMITS[0])
    reflow_train_main([f"--config_path={student / 'train_config.json'}", "--resume=true", "--steps=3"])
    last = json.loads((tmp_path / "run" / LAST / "train_config.json").read_text())
    assert last["reflow"]["teacher_commit"] == COMMITS[1]


def test_training_on_a_revision(workshop, cache, tmp_path):
    student = train_on(workshop, "me/teacher", tmp_path / "run", reflow__teacher_revision="v1")
    assert json.loads((student / "train_config.json").read_text())["reflow"]["teacher_commit"] == COMMITS[0]


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMITS[1]), ("v1", COMMITS[0])])
def test_attaching_a_revision(workshop, cache, revision, commit):
    student = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST)
    attached = attach(student, "me/teacher", revision=revision).teacher
    expected = SmolVLAPolicy.from_pretrained(cache / "snapshots" / commit).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in attached.state_dict().items())
    with pytest.raises(ReflowError, match="revision has no effect on a teacher that is not named by its hub id"):
        attach(SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST), student, revision="v1")


def test_evaluating_a_revision(workshop, cache, tmp_path, capsys):
    student = train_on(workshop, "me/teacher", tmp_path / "run", reflow__teacher_revision="v1")
    flags = eval_flags(workshop, tmp_path / "r", policy__path=student, teacher_path="me/teacher")
    assert f"Name the one it learnt from with its revision, {COMMITS[0]}" in refused(capsys, eval_command.main, flags)
    report = evaluate(workshop, student, tmp_path / "r", teacher_path="me/teacher", teacher_revision="v1")
    assert report["made_with"]["teacher"] == f"me/teacher at {COMMITS[0]}"
    report = evaluate(workshop, "me/teacher", tmp_path / "s", policy__pretrained_revision="v1")
    assert report["made_with"]["policy"] == f"me/teacher at {COMMITS[0]}"


def test_a_revision_of_what_is_here_has_no_effect(workshop, teacher, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=teacher, reflow__teacher_revision="v1")
    assert "so the revision v1 has no effect" in refused(capsys, reflow_train_main, flags)


def test_a_revision_that_is_not_there(cache):
    with pytest.raises(ReflowError, match=r"as a hub id \(revision v9\) it cannot be downloaded"):
        open_checkpoint("me/teacher", "v9")


def test_only_what_is_read_is_downloaded(workshop, teacher, tmp_path, monkeypatch):
    """A repository holds the run's optimizer states too, tens of gigabytes of them."""
    save_as_0_6_2(teacher, AutoTokenizer.from_pretrained(workshop / "backbone"))
    local, asked = tmp_path / COMMITS[0], []

    def download(repo_id, name, revision=None):
        asked.append((name, revision))
        if not (teacher / name).is_file():
            raise checkpoint_module.EntryNotFoundError(f"404: {name}")
        local.mkdir(exist_ok=True)
        return shutil.copy(teacher / name, local / name)

    def download_folder(repo_id, revision, allow_patterns):
        asked.append((allow_patterns, revision))
        shutil.copytree(teacher / "tokenizer", local / "tokenizer")

    monkeypatch.setattr(checkpoint_module, "hf_hub_download", download)
    monkeypatch.setattr(checkpoint_module, "snapshot_download", download_folder)
    opened = open_checkpoint("me/teacher", "v1")
    load_processors(opened, "cpu", {})
    assert opened.fingerprint() == open_checkpoint(teacher).fingerprint()
    assert asked[0] == ("config.json", "v1")
    assert {revision for _, revision in asked[1:]} == {COMMITS[0]}
    states = {file.name for file in teacher.glob("policy_*processor_step_*.safetensors")}
    assert {name for name, _ in asked} == states | {
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "train_config.json",
        "adapter_config.json",
        "tokenizer/*",
    }
