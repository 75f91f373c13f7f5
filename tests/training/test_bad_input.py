"""A catalogue of bad input: each ends with exit code 2, one sentence that helps, and an untouched disk."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import EPISODES_HAVE_TO_EXIST, reflow_run, reflow_train_main
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file

from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import LAST


def refused(flags: list[str], capsys, folder: Path) -> str:
    """Run a command that must be refused with one line, exit code 2 and nothing written; return the line."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(SystemExit) as exit:
        reflow_train_main(flags)
    assert exit.value.code == 2
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("smolvla-reflow-train: error:")]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return line


@pytest.fixture(scope="module")
def other_backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("other_backbone"), hidden_size=48, vision_hidden_size=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reflow__teacher_path": None}, "Name the teacher"),
        ({"reflow__teacher_path": "no/such/place"}, "There is no checkpoint at no/such/place"),
        ({"reflow__teacher_path": "nobody/nothing"}, "as a hub id it cannot be downloaded"),
        (
            {"reflow__teacher_path": "{workshop}/1rf"},
            "Did you mean {workshop}/1rf/checkpoints/last/pretrained_model?",
        ),
        ({"reflow__teacher_path": "{teacher}/config.json"}, "is a file; name the checkpoint's folder"),
        ({"reflow__strategy": "reflo"}, "Unknown loss strategy 'reflo'"),
        ({"reflow__time_sampling": "betta"}, "--reflow.time_sampling 'betta' is unknown; known are: beta, grid:K"),
        ({"reflow__real_data_ratio": 1.5}, "--reflow.real_data_ratio=1.5 is no share; give a number from 0 to 1"),
        ({"reflow__couplings_per_frame": 0}, "--reflow.couplings_per_frame=0: at least 1 is needed"),
        ({"reflow__real_data_ratio": "nan"}, "--reflow.real_data_ratio=nan is no share"),
        ({"reflow__num_steps": 0}, "--reflow.num_steps=0: the teacher needs at least one ODE step"),
        (
            {"reflow__solver": "rk5"},
            "--reflow.solver=rk5 is unknown; known are: euler, midpoint, heun3, rk4, jittered, dopri5",
        ),
        (
            {"reflow__solver": "dopri5", "reflow__num_steps": 5},
            "--reflow.solver=dopri5 chooses its own steps; give rtol and atol instead",
        ),
        ({"reflow__rtol": 0.1, "reflow__num_steps": None}, "--reflow.solver=jittered has fixed steps"),
        ({"reflow__num_steps": -3}, "--reflow.num_steps=-3: the teacher needs at least one ODE step"),
        ({"reflow__num_stepz": 3}, "--reflow.num_stepz is unknown; known are: --reflow.solver, --reflow.num_steps,"),
        ({"reflow__solver": "dopri5", "reflow__num_steps": None, "reflow__rtol": -1}, "--reflow.rtol=-1.0"),
        ({"reflow__real_data_ratio": -0.1}, "--reflow.real_data_ratio=-0.1 is no share"),
        ({"reflow__time_sampling": "grid:0"}, "--reflow.time_sampling 'grid:0' is unknown"),
        ({"reflow__pairs_path": "no/such/pairs"}, "no/such/pairs holds no pairs: there is no manifest.json"),
        ({"steps": 0}, "--steps=0: at least 1 is needed"),
        ({"rename_map": "{{a: b"}, "A flag's value cannot be read"),
        ({"dataset__episodes": "[0,"}, "A flag's value cannot be read"),
        ({"batch_size": 0}, "--batch_size=0: at least 1 is needed"),
        ({"num_workers": -1}, "--num_workers=-1: at least 0 is needed"),
        pytest.param(
            {"dataset__episodes": "[0,99]"},
            "--dataset.episodes: the dataset has 8, and no episode 99",
            marks=EPISODES_HAVE_TO_EXIST,
        ),
        ({"policy__device": "gpu"}, "Unknown device gpu. Supported devices are"),
        ({"output_dir": "{teacher}"}, "already exists"),
        ({"output_dir": "{teacher}/config.json/run"}, "nothing can be written in {teacher}/config.json"),
        ({"policy__path": "no/such/student"}, "There is no checkpoint at no/such/student"),
        (
            {"policy__chunk_size": 3, "policy__n_action_steps": 2},
            "chunk_size is 6 in the teacher's config and 3 in the student's",
        ),
        ({"policy__max_action_dim": 8}, "max_action_dim is 4 in the teacher's config and 8 in the student's"),
        ({"policy__max_state_dim": 8}, "max_state_dim"),
        ({"policy__resize_imgs_with_padding": "[64,64]"}, "resize_imgs_with_padding"),
        ({"policy__num_vlm_layers": 1}, "num_vlm_layers is 2 in the teacher's config and 1"),
        ({"policy__expert_width_multiplier": 0.5}, "expert_width_multiplier is 0.75"),
        ({"policy__num_expert_layers": 1}, "The teacher's weights do not fit: they have the unknown model.vlm"),
        (
            {"policy__vlm_model_name": "{other}"},
            "The student's weights do not fit its --policy.* configuration: size mismatch",
        ),
        ({"policy__vlm_model_name": "{workshop}/nowhere"}, "--policy.vlm_model_name={workshop}/nowhere"),
        ({"reflow__num_steps": "ten"}, "num_steps"),
        ({"policy__optimizer_lrr": 3}, "unrecognized arguments: --optimizer_lrr=3"),
        ({"policy__type": "act"}, "only smolvla can"),
        ({"env__discover_packages_path": "fractions"}, "fractions is a module; name the package that it stands in"),
        ({"output_dir": "{workshop}/1rf"}, "1rf already exists"),
        ({"dataset__root": "{workshop}/nowhere"}, "There is no LeRobotDataset at --dataset.root="),
        ({"policy__push_to_hub": "true"}, "needs --policy.repo_id"),
    ],
)
def test_user_errors(workshop, other_backbone, tmp_path, capsys, changes, message):
    names = {"workshop": workshop, "teacher": workshop / "1rf" / LAST, "other": other_backbone}
    changes = {k: v.format(**names) if isinstance(v, str) else v for k, v in changes.items()}
    flags = reflow_run(workshop, **{"output_dir": tmp_path / "run", **changes})
    line = refused(flags, capsys, workshop)
    assert message.format(**names) in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def broken_teacher(workshop, tmp_path):
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))


BIAS = "model.action_out_proj.bias"


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit_config(f, type="act"), "holds a policy of type 'act'; only smolvla"),
        (lambda f: edit_config(f, training_mode="reflow"), "of the earlier fork (it has training_mode)"),
        (lambda f: edit_config(f, no_such_field=1), "The installed LeRobot cannot read"),
        (lambda f: (f / "config.json").write_text("{"), "is not readable JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "policy_preprocessor.json").unlink(), "has no policy_preprocessor.json"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "is not readable JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not readable JSON"),
        (lambda f: edit_config(f, chunk_size="many"), "The installed LeRobot cannot read"),
        (lambda f: edit_config(f, input_features={"a": 3}), "The installed LeRobot cannot read"),
        (lambda f: (f / "policy_preprocessor.json").write_text("{"), "policy_preprocessor.json"),
        (lambda f: cut(f / "model.safetensors"), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
        (lambda f: edit_weights(f, lambda w: w.pop(BIAS)), f"they lack {BIAS}"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))), "they have the unknown extra"),
        (lambda f: edit_weights(f, lambda w: w.update({BIAS: w[BIAS] * math.nan})), f"{BIAS} holds NaN or infinity"),
    ],
)
def test_unusable_teachers(workshop, broken_teacher, tmp_path, capsys, break_it, message):
    break_it(broken_teacher)
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=broken_teacher)
    assert message in refused(flags, capsys, tmp_path)


def test_teacher_without_the_statistics_it_needs(workshop, broken_teacher, tmp_path, capsys):
    (file,) = broken_teacher.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    stats = load_file(file)
    save_file({name: t for name, t in stats.items() if not name.startswith("action.std")}, file)
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=broken_teacher)
    assert "no saved statistics 'action.std'" in refused(flags, capsys, tmp_path)


def test_dataset_without_the_teachers_camera(workshop, broken_teacher, tmp_path, capsys):
    features = json.loads((broken_teacher / "config.json").read_text())["input_features"]
    features["observation.images.wrist"] = features.pop("observation.images.top")
    edit_config(broken_teacher, input_features=features)
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=broken_teacher)
    line = refused(flags, capsys, tmp_path)
    assert "needs one of the cameras observation.images.wrist, and the dataset has observation.images.top" in line
    assert "--rename_map" in line


def test_dataset_of_another_action_width(workshop, broken_teacher, tmp_path, capsys):
    """The width is what the teacher's statistics say; `config.json` may still have that of an earlier robot."""
    edit_config(broken_teacher, output_features={"action": {"type": "ACTION", "shape": [5]}})
    (file,) = broken_teacher.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    stats = load_file(file)
    for name in ("action.mean", "action.std", "action.min", "action.max"):
        stats[name] = torch.cat([stats[name], torch.ones(1)])
    save_file(stats, file)
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path=broken_teacher)
    line = refused(flags, capsys, tmp_path)
    assert "'action' has shape (2,) in the dataset, and " in line
    assert "was trained on 3 dimensions" in line


def test_resuming_a_run_that_was_not_reflow(workshop, capsys):
    config = workshop / "1rf" / LAST / "train_config.json"
    line = refused([f"--config_path={config}", "--resume=true"], capsys, workshop)
    assert "names no teacher" in line


@pytest.mark.skipif(
    "job" not in TrainPipelineConfig.__dataclass_fields__, reason="--job.target exists from LeRobot 0.6 on"
)
def test_a_remote_job_is_never_standard_training_in_disguise(workshop, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", job__target="a10g-small")
    assert "--job.target=a10g-small would run lerobot-train, not reflow" in refused(flags, capsys, workshop)


# --- datasets -------------------------------------------------------------------------------------------------


def record(root, frames=8, *, state="observation.state", camera="observation.images.top", action=0.5):
    """A dataset of one episode, of the demo's features unless they are named otherwise."""
    vector = {"dtype": "float32", "shape": (2,), "names": None}
    features = {state: vector, "action": vector}
    if camera:
        features[camera] = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create("me/odd", fps=10, features=features, root=root, use_videos=False)
    for k in range(frames):
        frame = {state: torch.full((2,), k / 10), "action": torch.tensor([action, k / 10]), "task": "go"}
        dataset.add_frame({**frame, camera: torch.zeros(32, 32, 3).numpy()} if camera else frame)
    if frames:
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"frames": 0}, "hold 0 frames"),
        ({"camera": None}, "needs one of the cameras observation.images.top, and the dataset has none"),
        ({"camera": "observation.images.front"}, "map them with --rename_map"),
        ({"state": "observation.joints"}, "needs 'observation.state', which the dataset lacks"),
        ({"action": math.nan}, "The dataset's 'action' holds NaN or infinity"),
        ({"action": math.inf}, "The dataset's 'action' holds NaN or infinity"),
    ],
)
def test_odd_datasets(workshop, tmp_path, capsys, odd, message):
    root = record(tmp_path / "odd", **odd)
    flags = reflow_run(workshop, tmp_path / "run", dataset__repo_id="me/odd", dataset__root=root)
    assert message in refused(flags, capsys, tmp_path)


def test_debug_shows_the_traceback(workshop, tmp_path, capsys):
    flags = reflow_run(workshop, tmp_path / "run", reflow__teacher_path="no/such/place")
    for debug in (False, True):
        with pytest.raises(SystemExit) as exit:
            reflow_train_main([*flags, "--debug"] if debug else flags)
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert ("Traceback" in err) == debug
        assert "There is no checkpoint at no/such/place" in err.splitlines()[-1]
