"""Training from couplings that were made before: stored pairs, or a source of the user's own."""

import dataclasses
import json
import os

import pytest
import torch
from helpers import lerobot_train_main, reflow_run, reflow_train_main, refused
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pairs_helpers import (
    CHUNK,
    FRAMES,
    FRAMES_SEEN,
    WIDTH,
    assert_close,
    loss_and_gradient,
    make_pairs,
    moved,
    observed,
    pairs_flags,
    weights,
    which_pairs,
)

from smolvla_reflow import Coupling, Pairs, Recipe, ReflowError, Solver, attach, detach, is_attached
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.noise import pair_noise
from smolvla_reflow.pairs.manifest import read_manifest
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.sharing import vision_encoder


@pytest.mark.parametrize("solver", [Solver("euler"), Solver("midpoint", num_steps=4)], ids=["euler", "midpoint"])
def test_loss_and_gradient_equal_online_reflow(workshop, tmp_path, solver):
    flags = {"reflow__solver": solver.method, "reflow__num_steps": solver.num_steps}
    folder = make_pairs(workshop, tmp_path / "pairs", couplings_per_frame=1, dtype="float32", **flags)
    policy, batch, time = moved(workshop)
    noise = torch.stack([pair_noise(0, frame, 0, (CHUNK, WIDTH)) for frame in FRAMES_SEEN])
    with attach(policy, workshop / "1rf" / LAST, solver=solver):
        expected = loss_and_gradient(policy, batch, noise=noise, time=time)
    with attach(policy, pairs=folder):
        found = loss_and_gradient(policy, batch, time=time)
    assert_close(found, expected, loss={"rtol": 1e-4, "atol": 1e-6}, gradient={"rtol": 1e-3, "atol": 1e-5})


def test_no_teacher_is_in_memory(workshop, stored):
    policy, _ = observed(workshop)
    before = dict(vars(policy)), dict(vars(policy.model))
    attachment = attach(policy, pairs=stored)
    assert policy.model.teacher is attachment.teacher is None
    detach(policy)
    assert (vars(policy), vars(policy.model)) == before


@pytest.mark.parametrize("per_frame", [2, 5])
def test_several_of_a_frames_pairs_in_one_step(workshop, stored, per_frame, asked):
    """Three are stored: no one comes again before all have come, and the frame's image is encoded once."""
    policy, batch = observed(workshop)
    encoder = vision_encoder(policy).requires_grad_(False)  # as --policy.freeze_vision_encoder=true has it
    counts = []
    encoder.encoder.register_forward_hook(lambda _, __, output: counts.append(len(output[0])))
    attach(policy, pairs=stored, recipe=Recipe(couplings_per_frame=per_frame))
    policy.train()
    encoder.eval()
    policy.forward(dict(batch))[0].backward()
    assert counts == [4]
    for noise, frame in zip(asked[0][1].split(per_frame), FRAMES_SEEN, strict=True):
        pairs = which_pairs(frame, noise)
        assert len(set(pairs)) == min(per_frame, 3)
        assert max(map(pairs.count, pairs)) == (1 if per_frame <= 3 else 2)


def test_each_visit_draws_one_of_the_frames_pairs(stored):
    pairs = Pairs(stored)
    torch.manual_seed(0)
    drawn = [pairs.draw([5, 40], torch.device("cpu")) for _ in range(60)]
    assert drawn[0].noise.shape == drawn[0].actions.shape == (2, CHUNK, WIDTH)
    for i, frame in enumerate((5, 40)):
        picks = which_pairs(frame, [c.noise[i] for c in drawn])
        assert all(torch.equal(pairs.lookup(frame, k).actions, c.actions[i]) for k, c in zip(picks, drawn, strict=True))
        assert all(picks.count(k) > 8 for k in range(3))


def test_training_from_pairs_writes_a_stock_checkpoint_and_resumes(workshop, stored, tmp_path, capsys):
    flags = {"reflow__pairs_path": os.path.relpath(stored), "steps": 6, "save_freq": 6}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", **flags))
    log = capsys.readouterr().err
    assert f"Reflow: {FRAMES * 3} pairs from {stored}, no teacher is loaded" in log
    assert "Teacher shares" not in log
    assert weights(tmp_path / "run").keys() == weights(workshop / "1rf").keys()
    config = json.loads((tmp_path / "run" / LAST / "train_config.json").read_text())
    assert config["reflow"]["pairs_path"] == str(stored.resolve())
    reflow_train_main([f"--config_path={tmp_path / 'run' / LAST / 'train_config.json'}", "--resume=true", "--steps=8"])
    assert (tmp_path / "run/checkpoints/000008").is_dir()
    stock = reflow_run(workshop, tmp_path / "stock", steps=1)
    stock = [f for f in stock if not f.startswith("--reflow.")]
    lerobot_train_main([*stock, f"--policy.path={tmp_path / 'run' / LAST}", "--policy.push_to_hub=false"])


OTHER = {
    "teacher": "0" * 64,
    "dataset": "other/name",
    "total_frames": 49,
    "statistics": "1" * 64,
    "chunk_size": 7,
    "max_action_dim": 5,
    "rename_map": {"observation.images.top": "observation.images.left"},
}


@pytest.mark.parametrize("field", OTHER)
def test_pairs_of_another_run_are_refused_with_both_values(workshop, copied, tmp_path, capsys, field):
    manifest = read_manifest(copied)
    value = getattr(manifest.provenance, field)
    changed = dataclasses.replace(manifest.provenance, **{field: OTHER[field]})
    dataclasses.replace(manifest, provenance=changed).write(copied)
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__pairs_path=copied))
    assert f"{field} is {OTHER[field]} in the pairs and {value} here" in line
    assert f"{field} is" in refused(capsys, pairs_command.main, pairs_flags(workshop, copied))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reflow__num_steps": 5}, "num_steps is 10 in the pairs and 5 here"),
        ({"reflow__solver": "rk4"}, "solver is euler in the pairs and rk4 here"),
        ({"dataset__image_transforms__enable": "true"}, "say --reflow.augment_pairs=true"),
        ({"reflow__pairs_path": "no/such/folder"}, "holds no pairs: there is no manifest.json"),
    ],
)
def test_flags_that_contradict_the_pairs(workshop, stored, tmp_path, capsys, flags, message):
    flags = {"reflow__num_steps": None, "reflow__pairs_path": stored, **flags}
    assert message in refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_augmented_images_when_asked_for(workshop, stored, tmp_path):
    asked_for = {"dataset__image_transforms__enable": "true", "reflow__augment_pairs": "true"}
    for run, flags in (("augmented", asked_for), ("plain", {})):
        reflow_train_main(reflow_run(workshop, tmp_path / run, steps=1, reflow__pairs_path=stored, **flags))
    augmented, plain = weights(tmp_path / "augmented"), weights(tmp_path / "plain")
    assert any(not torch.equal(augmented[name], plain[name]) for name in plain)


def test_frames_without_pairs_are_counted(workshop, tmp_path, capsys):
    some = make_pairs(workshop, tmp_path / "some", dataset__episodes="[0,3]")
    flags = {"reflow__pairs_path": some, "steps": 1}
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **flags))
    assert "36 of the 48 frames to train on have no pairs" in line
    assert "which covers 12" in line
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__episodes="[3]", **flags))


def test_what_attach_refuses(workshop, stored, copied):
    policy, batch = observed(workshop)
    batch["action"] = torch.zeros(4, CHUNK, 2)
    source = lambda observation, **asked: None  # noqa: E731
    for pairs in (stored, source):
        with pytest.raises(ReflowError, match="either a teacher or the pairs"):
            attach(policy, workshop / "1rf" / LAST, pairs=pairs)
        with pytest.raises(ReflowError, match="solver has no effect beside pairs"):
            attach(policy, pairs=pairs, solver=Solver("euler", num_steps=10))
    with pytest.raises(ReflowError, match="dataset_stats has no effect on a function that couples"):
        attach(policy, pairs=source, dataset_stats=LeRobotDataset(REPO_ID, root=workshop / "dataset").meta.stats)
    assert not is_attached(policy)
    attach(policy, pairs=stored)
    policy.train()
    with pytest.raises(ReflowError, match="noise of their own"):
        policy.forward(dict(batch), noise=torch.zeros(4, CHUNK, WIDTH))
    without = {name: value for name, value in batch.items() if name != "index"}
    with pytest.raises(ReflowError, match="has no 'index'"):
        policy.forward(without)
    with pytest.raises(ReflowError, match="Frame 48 has no pairs"):
        policy.forward({**batch, "index": batch["index"] + 1})
    detach(policy)
    manifest = read_manifest(copied)
    provenance = dataclasses.replace(manifest.provenance, chunk_size=9)
    dataclasses.replace(manifest, provenance=provenance).write(copied)
    with pytest.raises(ReflowError, match="do not fit the policy: chunk_size is 9 in them and 6 in it"):
        attach(policy, pairs=copied)


def test_attach_takes_the_statistics_that_the_manifest_pins_and_no_others(workshop, stored):
    policy, batch = observed(workshop)
    batch["action"] = torch.zeros(4, CHUNK, 2)
    stats = LeRobotDataset(REPO_ID, root=workshop / "dataset").meta.stats
    with attach(policy, pairs=stored, dataset_stats=stats):
        policy.train().forward(dict(batch))
    for feature, statistic in (("action", "std"), ("observation.state", "mean")):
        others = {**stats, feature: {**stats[feature], statistic: stats[feature][statistic] + 0.1}}
        with pytest.raises(ReflowError, match="in the normalised space of other statistics than dataset_stats"):
            attach(policy, pairs=stored, dataset_stats=others)
        assert not is_attached(policy)
    with pytest.raises(ReflowError, match="no statistics 'observation.state.mean', by which the policy's"):
        attach(policy, pairs=stored, dataset_stats={"action": stats["action"]})


def test_a_function_as_source_gives_the_loss_of_the_same_couplings_online(workshop):
    policy, batch, time = moved(workshop)
    drawn = torch.randn(4, CHUNK, WIDTH)
    with attach(policy, workshop / "1rf" / LAST, solver="midpoint"):
        actions = policy.model.generate_reflow_target(*observe(policy, batch), noise=drawn).actions
        expected = loss_and_gradient(policy, batch, noise=drawn, time=time)

    def made_before(observation, *, frames, noise, per_frame):
        assert frames.tolist() == [0, 7, 20, 47]
        assert noise is None
        assert per_frame == 1
        assert len(observation.state) == 4
        return Coupling(drawn, actions)

    with attach(policy, pairs=made_before) as attachment:
        assert attachment.source is made_before
        assert attachment.teacher is policy.model.teacher is None
        found = loss_and_gradient(policy, batch, time=time)
    assert_close(found, expected, loss={"rtol": 1e-6, "atol": 0}, gradient={"rtol": 1e-5, "atol": 1e-7})
