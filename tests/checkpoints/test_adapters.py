"""PEFT adapters, as `lerobot-train --peft.*` saves them: measured, reflowed from, and merged into stock checkpoints."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from editing import ADAPTER_CONFIG, CONFIG, doubled, edit_weights
from helpers import eval_flags, lerobot_train_main, reflow_run, reflow_train_main, refused, short
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from pairs_helpers import pairs_flags
from people import RENAME_MAP, dataset_flags, edit_json, fine_tune
from people import REPO_ID as PEOPLES_DATASET
from safetensors.torch import load_file

from smolvla_reflow import ReflowError, attach
from smolvla_reflow.checkpoint.load import load_policy
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands import eval as eval_command
from smolvla_reflow.commands import merge
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST, one_rectified_flow_flags
from smolvla_reflow.demo.task import REPO_ID

WEIGHTS = "adapter_model.safetensors"
LORA = {"peft__method_type": "LORA", "peft__r": 4}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def train_adapter(workshop: Path, run: Path, **changes) -> Path:
    """`lerobot-train --policy.path=BASE --peft.*`; returns the last checkpoint."""
    changes = {"policy__path": workshop / "1rf" / LAST, "policy__type": None, **LORA, **changes}
    flags = one_rectified_flow_flags(workshop, steps=12, lr=0.1)  # in the first steps of a long warm-up
    lerobot_train_main(short(flags, output_dir=run, **changes))
    return run / LAST


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    """An adapter of the workshop's 1-RF."""
    return train_adapter(workshop, tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """The stock checkpoint of it."""
    new = tmp_path_factory.mktemp("merged") / "new"
    merge.main([str(trained), str(new)])
    return new


def by_lerobot(folder: Path, root: Path, repo_id: str = REPO_ID, rename_map=None):
    """A checkpoint's policy as LeRobot's own commands make it."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    return make_policy(config, ds_meta=LeRobotDatasetMetadata(repo_id, root=root), rename_map=rename_map).eval()


def acts(policy, folder: Path, root: Path, repo_id: str = REPO_ID) -> torch.Tensor:
    """The actions of a policy on two frames of a dataset, prepared by a checkpoint's processors, on fixed noise."""
    preprocessor, _ = make_pre_post_processors(PreTrainedConfig.from_pretrained(folder), str(folder))
    dataset = LeRobotDataset(repo_id, root=root)
    batch = preprocessor(torch.utils.data.default_collate([dataset[i] for i in (0, 9)]))
    shape = (2, policy.config.chunk_size, policy.config.max_action_dim)
    with torch.no_grad():
        return policy.predict_action_chunk(batch, noise=torch.randn(shape, generator=torch.manual_seed(3)))


def read_json(file: Path):
    return json.loads(file.read_text())


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, other, **ROUNDING)


def test_the_policy_is_the_one_that_lerobot_runs(workshop, trained):
    opened = open_checkpoint(trained)
    assert opened.base.folder == workshop / "1rf" / LAST
    policy, stock = load_policy(opened, "cpu"), by_lerobot(trained, workshop / "dataset")
    assert type(stock).__name__ == "PeftModel"
    assert type(policy) is SmolVLAPolicy
    here, there = (acts(each, trained, workshop / "dataset") for each in (policy, stock))
    assert_same(here, there)
    base = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST).eval()
    assert (acts(base, trained, workshop / "dataset") - here).abs().max() > 0.01  # which the adapter has moved


@pytest.mark.parametrize(
    "kind",
    [
        {"peft__full_training_modules": '["state_proj","action_out_proj"]', "peft__target_modules": '["q_proj"]'},
        {"peft__target_modules": '["q_proj","fc1","action_in_proj"]'},  # of the vision-language model too
        {"peft__init_type": "pissa"},  # which changes the base's weights
        {"peft__method_type": "MISS", "peft__target_modules": r"model\.vlm_with_expert\.lm_expert\..*\.q_proj"},
    ],
    ids=["modules to save", "backbone", "pissa", "miss"],
)
def test_adapters_of_every_kind(workshop, tmp_path, kind):
    saved = train_adapter(workshop, tmp_path / "run", steps=6, **kind)
    merge.main([str(saved), str(tmp_path / "new")])
    expected = acts(by_lerobot(saved, workshop / "dataset"), saved, workshop / "dataset")
    assert_same(acts(SmolVLAPolicy.from_pretrained(tmp_path / "new"), saved, workshop / "dataset"), expected)


def test_evaluating_one(workshop, adapter, merged, tmp_path, monkeypatch):
    """Its report is that of the merged checkpoint, and LeRobot follows the number that is stored with the adapter."""
    for name in ("FEWEST_FRAMES", "FEWEST_EPISODES"):
        monkeypatch.setattr(f"smolvla_reflow.evaluation.decision.{name}", 2)
    teacher = Path(shutil.copytree(adapter, tmp_path / "teacher"))
    edit_json(teacher / CONFIG, num_steps=2)
    found = []
    for folder in (merged, adapter):
        output_dir = tmp_path / f"report {len(found)}"
        flags = {"policy__path": folder, "teacher_path": teacher, "num_steps": "[2]"}
        flags["write_num_steps"] = "true" if folder == adapter else None
        eval_command.main(eval_flags(workshop, output_dir, **flags))
        found.append(read_json(output_dir / "report.json"))
    for one, other in zip(*(report["rows"] for report in found), strict=True):
        assert one["flow_rmse"] == pytest.approx(other["flow_rmse"], rel=1e-3, abs=1e-5)
    assert found[1]["recommended_num_steps"] == 2  # at which they are the same policy
    assert read_json(adapter / CONFIG)["num_steps"] == 2
    assert by_lerobot(adapter, workshop / "dataset").config.num_steps == 2


def test_evaluating_by_one(workshop, trained, tmp_path):
    """As the teacher of the first round, and as a round in between."""
    flags = {"policy__path": workshop / "1rf" / LAST, "teacher_path": trained, "earlier_rounds": f"[{trained}]"}
    eval_command.main(eval_flags(workshop, tmp_path / "r", **flags))
    assert read_json(tmp_path / "r/report.json")["made_with"]["teacher's path"] == str(trained.resolve())


def test_a_student_starts_from_the_merged_weights(workshop, adapter, merged, tmp_path):
    """And is a stock checkpoint, which needs neither the adapter nor its base."""
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, reflow__teacher_path=adapter, policy__optimizer_lr=1e-12, steps=2))
    assert_starts_from(run / LAST, merged)
    config, train_config = (read_json(run / LAST / name) for name in (CONFIG, "train_config.json"))
    assert not config["use_peft"]
    assert config["pretrained_path"] == train_config["reflow"]["teacher_path"] == str(adapter)
    assert not list((run / LAST).glob("adapter_*"))

    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=3"])
    assert (run / "checkpoints/000003").is_dir()
    adapter.rename(tmp_path / "gone")
    actions = acts(by_lerobot(run / LAST, workshop / "dataset"), run / LAST, workshop / "dataset")
    assert torch.isfinite(actions).all()


def assert_starts_from(student: Path, start: Path) -> None:
    weights, expected = (load_file(each / "model.safetensors") for each in (student, start))
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)


def test_a_resumed_run_keeps_its_adapter(workshop, adapter, tmp_path, capsys):
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, reflow__teacher_path=adapter, steps=1))
    edit_weights(adapter / "adapter_model.safetensors", doubled)
    line = refused(capsys, reflow_train_main, [f"--config_path={run}", "--resume=true", "--steps=2"])
    assert "is not the one that this run began with" in line


def test_attaching_one(workshop, trained, merged):
    student = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST)
    teacher = attach(student, teacher=trained).teacher.state_dict()
    for name, tensor in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(teacher[name], tensor)


def test_pairs_of_one(workshop, trained, tmp_path, capsys):
    folder = tmp_path / "pairs"
    pairs_command.main(pairs_flags(workshop, folder, reflow__teacher_path=trained))
    flags = reflow_run(workshop, tmp_path / "run", reflow__pairs_path=folder, reflow__solver="euler")
    reflow_train_main([*flags, f"--reflow.teacher_path={trained}"])
    assert (tmp_path / "run" / LAST / "model.safetensors").is_file()
    line = refused(capsys, reflow_train_main, [*flags, f"--output_dir={tmp_path / 'other'}"])
    assert "are not this run's" in line  # but those of its base


def test_its_fingerprint(workshop, adapter, tmp_path):
    """Of all that it acts by, wherever that is."""
    base = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "base"))
    found = [open_checkpoint(base).fingerprint(), open_checkpoint(adapter).fingerprint()]
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=str(base), peft_version="0")
    assert open_checkpoint(adapter).fingerprint() == found[1]
    for change in (
        lambda: edit_json(adapter / ADAPTER_CONFIG, lora_alpha=99),
        lambda: edit_weights(adapter / WEIGHTS, doubled),
        lambda: edit_weights(base / "model.safetensors", doubled),
    ):
        change()
        found.append(open_checkpoint(adapter).fingerprint())
    assert len(set(found)) == 5


def test_a_student_that_starts_from_another_adapter(workshop, trained, merged, tmp_path):
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, policy__path=trained, policy__optimizer_lr=1e-12, steps=1))
    assert_starts_from(run / LAST, merged)


def test_a_new_adapter_needs_a_whole_base(workshop, trained, merged, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=trained, **LORA)
    line = refused(capsys, reflow_train_main, flags)
    assert f"smolvla-reflow-merge {trained.resolve()} NEW_FOLDER, and start from --policy.path=" in line
    reflow_train_main([*flags, f"--policy.path={merged}"])
    noted = read_json(tmp_path / "run" / LAST / ADAPTER_CONFIG)
    assert noted["base_model_name_or_path"] == str(merged)
    by_lerobot(tmp_path / "run" / LAST, workshop / "dataset")


def test_an_adapter_that_is_trained_on(workshop, tmp_path):
    """Resumed, it goes on from where it was, with the base that it had."""
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, policy__optimizer_lr=1e-3, steps=2, **LORA))
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=3"])
    before, after = (run / "checkpoints" / step / "pretrained_model" for step in ("000002", "000003"))
    weights = load_file(after / WEIGHTS)
    for name, tensor in load_file(before / WEIGHTS).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0.01)
        assert tensor.any()
    found = (load_policy(open_checkpoint(after), "cpu"), by_lerobot(after, workshop / "dataset"))
    assert_same(*(acts(each, after, workshop / "dataset") for each in found))
    named = {read_json(each / ADAPTER_CONFIG)["base_model_name_or_path"] for each in (before, after)}
    assert named == {str((workshop / "1rf" / LAST).resolve())}


def test_merging(workshop, trained, merged):
    """Names, shapes and types are the base's, the processors the adapter's, and plain LeRobot acts by it as by both."""
    base, weights = (load_file(each / "model.safetensors") for each in (workshop / "1rf" / LAST, merged))
    assert {name: (t.shape, t.dtype) for name, t in weights.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    config, before = (read_json(each / CONFIG) for each in (merged, trained))
    assert config == {**before, "use_peft": False}
    assert before["use_peft"]
    processors = [path.name for path in trained.glob("policy_*")]
    assert len(processors) == 4
    assert all((merged / name).read_bytes() == (trained / name).read_bytes() for name in processors)
    expected = {*processors, "config.json", "train_config.json", "model.safetensors"}
    assert {path.name for path in merged.iterdir()} == expected
    expected = acts(by_lerobot(trained, workshop / "dataset"), trained, workshop / "dataset")
    assert_same(acts(by_lerobot(merged, workshop / "dataset"), merged, workshop / "dataset"), expected)


def test_what_is_merged_needs_no_peft(workshop, merged, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    reflow_train_main(reflow_run(workshop, tmp_path / "run", reflow__teacher_path=merged, steps=1))


def test_an_adapter_with_renamed_cameras(people, tmp_path):
    """Its base knows the cameras by other names and other widths; the adapter's own configuration holds."""
    saved = fine_tune(people.teacher, people.dataset, tmp_path / "lora", **LORA)
    merge.main([str(saved), str(tmp_path / "new")])
    stock = by_lerobot(saved, people.dataset, PEOPLES_DATASET, RENAME_MAP)
    expected = acts(stock, saved, people.dataset, PEOPLES_DATASET)
    new = tmp_path / "new"
    assert_same(acts(SmolVLAPolicy.from_pretrained(new), new, people.dataset, PEOPLES_DATASET), expected)
    flags = dataset_flags(people.dataset, output_dir=tmp_path / "2rf", steps=1, rename_map=None)
    reflow_train_main([*flags, f"--reflow.teacher_path={saved}"])
    assert (tmp_path / "2rf" / LAST / "model.safetensors").is_file()


def test_a_backbone_that_has_moved(workshop, adapter, merged, tmp_path, capsys):
    edit_json(adapter / CONFIG, vlm_model_name="/nowhere/backbone")
    line = refused_merge(capsys, adapter, tmp_path / "new")
    assert "--policy.vlm_model_name=/nowhere/backbone" in line
    merge.main([str(adapter), str(tmp_path / "new"), f"--policy.vlm_model_name={workshop / 'backbone'}"])
    assert (tmp_path / "new/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "new/config.json")["vlm_model_name"] == "/nowhere/backbone"


def refused_merge(capsys, *words) -> str:
    return refused(capsys, merge.main, [str(word) for word in words])


def test_where_it_is_written(workshop, adapter, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert "there exists already; name a new folder." in refused_merge(capsys, adapter, tmp_path / "there")
    assert f"lies within {adapter}" in refused_merge(capsys, adapter, adapter / "new")
    base = workshop / "1rf" / LAST
    assert f"{base} is no adapter: it holds all of its weights" in refused_merge(capsys, base, tmp_path / "new")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    new = tmp_path / "new"
    assert f"While writing {new}: OSError: [Errno 28] No space left on device" in refused_merge(capsys, adapter, new)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "adapter"}


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/nowhere/base", "There is no checkpoint at /nowhere/base"),
        ("me/base", "While downloading me/base from the hub, since there is no such folder"),
        (None, "There is no checkpoint at None"),
        ("{adapter}", "holds no model.safetensors"),  # as LeRobot 0.4 notes it when it resumes an adapter
    ],
)
def test_a_base_that_is_not_there(adapter, trained, named, said):
    name = named and named.format(adapter=trained)
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=name)
    with pytest.raises(ReflowError, match=said) as error:
        open_checkpoint(adapter)
    assert str(error.value).startswith(
        f"The adapter {adapter} needs the base that base_model_name_or_path={name} names"
    )


def test_a_relative_base(workshop, adapter, monkeypatch):
    """LeRobot, too, looks for it in the present folder."""
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=f"1rf/{LAST}")
    monkeypatch.chdir(workshop)
    assert open_checkpoint(adapter).base.folder.samefile(workshop / "1rf" / LAST)


def test_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ReflowError, match=r"While importing the package peft .*\(pip install peft\): ModuleNotFoundError"
    ):
        open_checkpoint(adapter)


def test_adapters_that_are_not_whole(adapter):
    edit_json(adapter / CONFIG, use_peft=False)  # as PEFT's own save_pretrained leaves the base's
    assert open_checkpoint(adapter).base is not None
    edit_json(adapter / ADAPTER_CONFIG, megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(ReflowError, match="has a megatron_config"):
        open_checkpoint(adapter)
    edit_json(adapter / ADAPTER_CONFIG, megatron_config=None)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ReflowError, match=r"holds no adapter_model.safetensors. Pickled weights are never loaded"):
        open_checkpoint(adapter)
    (adapter / ADAPTER_CONFIG).unlink()
    with pytest.raises(ReflowError, match=r"holds no model.safetensors"):
        open_checkpoint(adapter)


LORA_A = "base_model.model.model.state_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda weights: weights.pop(LORA_A),
            "does not fit its base: it lacks base_model.model.model.state_proj.lora_A",
        ),
        (
            lambda weights: weights.update({LORA_A.replace("state_proj", "other"): torch.zeros(4, 4)}),
            "does not fit its base: it has the unknown base_model.model.model.other.lora_A",
        ),
        (
            lambda weights: weights.update({LORA_A: torch.zeros(4, 5)}),
            "While loading the policy .*size mismatch for base_model.model.model.state_proj.lora_A",
        ),
        (lambda weights: weights[LORA_A].fill_(torch.nan), "model.state_proj.weight in .* holds NaN"),
    ],
    ids=["missing", "unknown", "width", "nan"],
)
def test_weights_that_do_not_fit(adapter, change, said):
    edit_weights(adapter / WEIGHTS, change)
    with pytest.raises(ReflowError, match=said):
        load_policy(open_checkpoint(adapter), "cpu")


def test_an_adapter_on_the_hub(workshop, adapter, trained, merged, cached, tmp_path):
    """It is merged into the base that it was trained on, though the base's main branch has moved on since."""
    commits = {"me/adapter": "a" * 40, "me/base": "b" * 40}
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="me/base", revision=commits["me/base"])
    cached("me/adapter", commits["me/adapter"], adapter, "main")
    cached("me/base", commits["me/base"], workshop / "1rf" / LAST)
    edit_weights(cached("me/base", "c" * 40, workshop / "1rf" / LAST, "main") / "model.safetensors", doubled)
    opened = open_checkpoint("me/adapter")
    assert (opened.base.source, opened.base.commit) == ("me/base", commits["me/base"])
    assert opened.fingerprint() == open_checkpoint(trained).fingerprint()
    merge.main(["me/adapter", str(tmp_path / "new")])
    assert (tmp_path / "new/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, reflow__teacher_path="me/adapter", steps=1))
    saved = read_json(run / LAST / "train_config.json")
    assert saved["reflow"]["teacher_commit"] == commits["me/adapter"]
    assert saved["policy"]["pretrained_path"] == "me/adapter"
