"""Pairs on disk: what is stored, what training on them gives, and that nothing is lost or mistaken."""

import copy
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time as clock
from pathlib import Path

import pytest
import torch
from conftest import as_flags, lerobot_train_main, reflow_run, reflow_train_main, torchrun
from filelock import FileLock
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from safetensors.torch import load_file, save_file

from smolvla_reflow import Pairs, Recipe, ReflowError, attach, detach
from smolvla_reflow import files as files_module
from smolvla_reflow import pairs as pairs_module
from smolvla_reflow.commands import pairs as pairs_command
from smolvla_reflow.demo.recipe import LAST
from smolvla_reflow.demo.task import REPO_ID, write_dataset
from smolvla_reflow.flow import observe
from smolvla_reflow.noise import pair_noise
from smolvla_reflow.pairs import read_manifest
from smolvla_reflow.vision import vision_encoder

FRAMES, CHUNK, WIDTH = 48, 6, 4


def pairs_flags(workshop: Path, folder: Path, **changes) -> list[str]:
    flags = {
        "reflow.teacher_path": workshop / "1rf" / LAST,
        "reflow.solver": "euler",  # what stock LeRobot can be asked for, too
        "dataset.repo_id": REPO_ID,
        "dataset.root": workshop / "dataset",
        "output_dir": folder,
        "policy.device": "cpu",
        "pairs_per_frame": 3,
        "batch_size": 5,
        "num_workers": 0,
        "frames_per_shard": 16,
    }
    return as_flags(flags, **changes)


def make_pairs(workshop: Path, folder: Path, **changes) -> Path:
    pairs_command.main(pairs_flags(workshop, folder, **changes))
    return folder


@pytest.fixture(scope="module")
def stored(workshop, tmp_path_factory):
    return make_pairs(workshop, tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def copied(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "copied"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def observed(workshop: Path, dataset: str = "dataset", frames=(0, 7, 20, 47)):
    """The teacher, and some frames as plain LeRobot shows them to it."""
    checkpoint = workshop / "1rf" / LAST
    teacher = SmolVLAPolicy.from_pretrained(checkpoint).eval()
    preprocessor, _ = make_pre_post_processors(teacher.config, str(checkpoint))
    recorded = LeRobotDataset(REPO_ID, root=workshop / dataset)
    return teacher, preprocessor(torch.utils.data.default_collate([recorded[i] for i in frames]))


# --- noise ----------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_frame_and_pair_alone():
    shape = (CHUNK, WIDTH)
    every = {(s, f, k): pair_noise(s, f, k, shape) for s in (0, 1) for f in (0, 1, 2**40) for k in range(3)}
    for (seed, frame, pair), noise in reversed(every.items()):
        assert torch.equal(pair_noise(seed, frame, pair, shape), noise)
        assert (noise.shape, noise.dtype) == (shape, torch.float32)
    assert len({tuple(noise.flatten().tolist()) for noise in every.values()}) == len(every)


def test_noise_is_standard_normal_and_independent():
    noise = torch.stack([pair_noise(0, f, k, (50, 4)).flatten() for f in range(300) for k in range(2)]).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    for other in (noise.roll(1, 0), noise.roll(2, 0), noise.roll(1, 1)):  # next pair, next frame, next number
        assert abs((noise * other).mean()) < 4 / n**0.5


def test_noise_of_old_sets_stays_what_it_was():
    """Changing these numbers makes every stored set worthless: it needs another format version."""
    noise = pair_noise(7, 11, 2, (2, 2))
    torch.testing.assert_close(noise, torch.tensor(GOLDEN), rtol=1e-6, atol=0)


GOLDEN = [[0.134004548, 0.436599135], [-0.526899099, -1.149254322]]


# --- what is stored -------------------------------------------------------------------------------------------


def test_stored_actions_are_the_teachers_stock_samples(workshop, stored):
    pairs, frames = Pairs(stored), (0, 7, 20, 47)
    teacher, batch = observed(workshop)
    for k in range(3):
        couplings = [pairs.lookup(frame, k) for frame in frames]
        noise = torch.stack([c.noise for c in couplings])
        with torch.no_grad():
            expected = teacher.model.sample_actions(*observe(teacher, batch), noise=noise)
        actions = torch.stack([c.actions for c in couplings])
        torch.testing.assert_close(actions, expected, rtol=2**-11, atol=1e-4)  # rounded to float16
        assert all(
            torch.equal(c.noise, pair_noise(0, f, k, (CHUNK, WIDTH))) for f, c in zip(frames, couplings, strict=True)
        )


def test_the_prefix_is_encoded_once_for_all_pairs_of_a_frame(workshop, tmp_path, monkeypatch):
    encoded, solved = [], []
    embed_prefix, embed_suffix = VLAFlowMatching.embed_prefix, VLAFlowMatching.embed_suffix
    monkeypatch.setattr(
        VLAFlowMatching,
        "embed_prefix",
        lambda self, images, *a, **k: encoded.append(len(images[0])) or embed_prefix(self, images, *a, **k),
    )
    monkeypatch.setattr(
        VLAFlowMatching, "embed_suffix", lambda self, x, t: solved.append(len(x)) or embed_suffix(self, x, t)
    )
    make_pairs(workshop, tmp_path / "pairs", batch_size=16, pairs_per_frame=5, reflow__num_steps=2)
    assert encoded == [16] * 3
    assert solved == [16 * 5] * 2 * 3


def test_the_set_covers_every_frame_once(stored):
    pairs = Pairs(stored)
    assert len(pairs) == FRAMES * 3
    assert pairs.manifest.num_shards == 3
    assert [f for shard in range(3) for f in pairs.manifest.frames_of(shard)] == list(range(FRAMES))
    files = [load_file(stored / f"pairs-{shard:05d}.safetensors")["actions"] for shard in range(3)]
    assert all(file.shape == (16, 3, CHUNK, WIDTH) and file.dtype == torch.float16 for file in files)
    for frame in range(FRAMES):
        for k in range(3):
            assert torch.equal(pairs.lookup(frame, k).actions, files[frame // 16][frame % 16, k].float())
    assert pairs.manifest.bytes_per_pair == CHUNK * WIDTH * 2
    for frame in (-1, FRAMES):
        with pytest.raises(ReflowError, match=f"Frame {frame} has no pairs"):
            pairs.lookup(frame, 0)


def test_episodes_with_gaps(workshop, tmp_path):
    """Six frames an episode; 1 and 2 make one range, 5 another."""
    pairs = Pairs(make_pairs(workshop, tmp_path / "some", dataset__episodes="[5,1,2]", frames_per_shard=4))
    assert pairs.manifest.frames == [[6, 18], [30, 36]]
    assert pairs.manifest.frames_of(3) == [30, 31, 32, 33]
    teacher, batch = observed(workshop, frames=(17, 31))
    couplings = [pairs.lookup(frame, 1) for frame in (17, 31)]
    with torch.no_grad():
        noise = torch.stack([c.noise for c in couplings])
        expected = teacher.model.sample_actions(*observe(teacher, batch), noise=noise)
    torch.testing.assert_close(torch.stack([c.actions for c in couplings]), expected, rtol=2**-11, atol=1e-4)
    for frame in (5, 18, 29, 36):
        with pytest.raises(ReflowError, match="no pairs"):
            pairs.lookup(frame, 0)
    assert pairs.missing([range(0, 48)]) == 30
    assert pairs.missing([range(7, 10), range(31, 33)]) == 0


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_other_dtypes(workshop, stored, tmp_path, dtype, eps):
    other = Pairs(make_pairs(workshop, tmp_path / dtype, dtype=dtype))
    first, second = Pairs(stored).lookup(3, 2).actions, other.lookup(3, 2).actions
    torch.testing.assert_close(first, second, rtol=eps + 2**-11, atol=1e-4)
    assert other.manifest.bytes_per_pair == CHUNK * WIDTH * (4 if dtype == "float32" else 2)


def test_neither_batches_nor_workers_change_the_pairs(workshop, stored, tmp_path):
    other = Pairs(make_pairs(workshop, tmp_path / "other", batch_size=16, num_workers=2, frames_per_shard=10))
    pairs = Pairs(stored)
    for frame in range(FRAMES):
        for ours, theirs in zip(pairs.lookup(frame, 1), other.lookup(frame, 1), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-10, atol=1e-4)


def test_a_dataset_with_other_statistics(workshop, tmp_path, capsys):
    """The stored actions are in the dataset's normalised space: in robot units, what the teacher would do."""
    write_dataset(tmp_path / "other", episodes=4, seed=9)
    pairs = Pairs(make_pairs(workshop, tmp_path / "pairs", dataset__root=tmp_path / "other", dtype="float32"))
    assert capsys.readouterr().err.count("The dataset's statistics are not the teacher's (most in '") == 1
    checkpoint = workshop / "1rf" / LAST
    teacher = SmolVLAPolicy.from_pretrained(checkpoint).eval()
    preprocessor, postprocessor = make_pre_post_processors(teacher.config, str(checkpoint))
    recorded = LeRobotDataset(REPO_ID, root=tmp_path / "other")
    batch = preprocessor(torch.utils.data.default_collate([recorded[3], recorded[20]]))
    couplings = [pairs.lookup(frame, 0) for frame in (3, 20)]
    chunk = teacher.predict_action_chunk(batch, noise=torch.stack([c.noise for c in couplings]))
    expected = torch.stack([postprocessor(chunk[:, i]) for i in range(CHUNK)], dim=1)
    mean, std = (torch.as_tensor(recorded.meta.stats["action"][name]).float() for name in ("mean", "std"))
    actions = torch.stack([c.actions for c in couplings])[..., :2] * std + mean
    torch.testing.assert_close(actions, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.stack([c.actions for c in couplings])[..., :2], chunk, atol=1e-2)


# --- training from them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [{"solver": "euler"}, {"solver": "midpoint", "num_steps": 4}], ids=["euler", "midpoint"]
)
def test_loss_and_gradient_equal_online_reflow(workshop, tmp_path, solver):
    flags = {f"reflow__{name}": value for name, value in solver.items()}
    folder = make_pairs(workshop, tmp_path / "pairs", pairs_per_frame=1, dtype="float32", **flags)
    policy, batch = observed(workshop)
    batch["action"] = torch.full((4, CHUNK, 2), 100.0)  # what was recorded has no influence
    noise = torch.stack([pair_noise(0, frame, 0, (CHUNK, WIDTH)) for frame in (0, 7, 20, 47)])
    time = torch.tensor([0.1, 0.4, 0.7, 0.99])
    with torch.no_grad():  # a student that has moved away from its teacher
        policy.model.action_out_proj.weight.mul_(1.1)

    def loss_and_gradient(noise):
        policy.zero_grad()
        loss, _ = policy.train().forward(dict(batch), noise=noise, time=time)
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    with attach(policy, workshop / "1rf" / LAST, **solver):
        expected, expected_gradient = loss_and_gradient(noise)
    with attach(policy, pairs=folder):
        loss, gradient = loss_and_gradient(None)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert gradient.keys() == expected_gradient.keys()
    assert len(gradient) > 10
    for name in gradient:
        torch.testing.assert_close(gradient[name], expected_gradient[name], rtol=1e-3, atol=1e-5)


def test_no_teacher_is_in_memory(workshop, stored):
    policy, _ = observed(workshop)
    before = dict(vars(policy)), dict(vars(policy.model))
    attachment = attach(policy, pairs=stored)
    assert policy.model.teacher is attachment.teacher is None
    detach(policy)
    assert (vars(policy), vars(policy.model)) == before


@pytest.mark.parametrize("per_frame", [2, 5])
def test_several_of_a_frames_pairs_in_one_step(workshop, stored, per_frame):
    """Three are stored: no one comes again before all have come, and the frame's image is encoded once."""
    policy, batch = observed(workshop)
    encoder = vision_encoder(policy).requires_grad_(False)  # as --policy.freeze_vision_encoder=true has it
    counts, seen = [], []
    encoder.encoder.register_forward_hook(lambda _, __, output: counts.append(len(output[0])))
    attach(policy, pairs=stored, recipe=Recipe(couplings_per_frame=per_frame))
    forward_standard = policy.model.forward_standard
    policy.model.forward_standard = lambda *args: seen.append(args[-2]) or forward_standard(*args)
    policy.train()
    encoder.eval()
    policy.forward(dict(batch))[0].backward()
    assert counts == [4]
    for noise, frame in zip(seen[0].split(per_frame), (0, 7, 20, 47), strict=True):
        stored_noises = [pair_noise(0, frame, pair, (CHUNK, WIDTH)) for pair in range(3)]
        pairs = [[torch.equal(one, other) for other in stored_noises].index(True) for one in noise]
        assert len(set(pairs)) == min(per_frame, 3)
        assert max(map(pairs.count, pairs)) == (1 if per_frame <= 3 else 2)


def test_each_visit_draws_one_of_the_frames_pairs(stored):
    pairs = Pairs(stored)
    torch.manual_seed(0)
    drawn = [pairs.draw([5, 40], torch.device("cpu")) for _ in range(60)]
    for i, frame in enumerate((5, 40)):
        every = [pairs.lookup(frame, k) for k in range(3)]
        picks = [
            next(
                k
                for k in range(3)
                if torch.equal(every[k].noise, c.noise[i]) and torch.equal(every[k].actions, c.actions[i])
            )
            for c in drawn
        ]
        assert all(picks.count(k) > 8 for k in range(3))
    assert drawn[0].noise.shape == drawn[0].actions.shape == (2, CHUNK, WIDTH)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / LAST / "model.safetensors")


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


# --- nothing lost ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 8))
def test_interrupted_at_any_write_the_resumed_files_are_the_same(workshop, stored, tmp_path, monkeypatch, moment):
    """Seven files are renamed into place: the manifest, and for each of three shards the shard and the manifest."""
    folder, renames = tmp_path / "pairs", iter(range(1, 100))
    rename = Path.replace

    def dying(path, target):
        if next(renames) == moment:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(Killed):
            make_pairs(workshop, folder)
    if moment > 1:
        assert len(read_manifest(folder).unfinished) == 3 - (moment - 2) // 2
        with pytest.raises(ReflowError, match=r"unfinished: \d of 3 shards are missing.*again with the same"):
            Pairs(folder)
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


def test_kill_9_and_again(workshop, stored, tmp_path):
    """Killed three times from outside, each time a shard later, then left to finish."""
    folder = tmp_path / "pairs"
    command = [sys.executable, "-m", "smolvla_reflow.commands.pairs", *pairs_flags(workshop, folder)]
    for shard in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        waited_for = folder / ("manifest.json" if shard == 0 else f"pairs-{shard - 1:05d}.safetensors")
        deadline = clock.monotonic() + 120
        while not waited_for.exists() and process.poll() is None:
            assert clock.monotonic() < deadline
            clock.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert contents(folder) == contents(stored)


def test_two_processes_make_the_files_of_one(workshop, stored, tmp_path):
    torchrun("-m", "smolvla_reflow.commands.pairs", *pairs_flags(workshop, tmp_path / "pairs"))
    assert contents(tmp_path / "pairs") == contents(stored)


def test_a_finished_set_is_left_alone(workshop, copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.iterdir() if path.name != ".lock"}
    make_pairs(workshop, copied)
    assert "Nothing to do: all 3 shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def refused(capsys, main, flags) -> str:
    """A command that must fail with exit code 2 and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def swap(file):
    file.write_bytes(file.with_name("pairs-00002.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip, swap, Path.unlink])
def test_a_damaged_shard_is_named_and_repaired_alone(workshop, stored, copied, tmp_path, capsys, damage):
    damage(copied / "pairs-00001.safetensors")
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", reflow__pairs_path=copied))
    assert "pairs-00001.safetensors is not the file that was written" in line
    assert "with the same flags and --repair." in line
    assert not (tmp_path / "run").exists()
    line = refused(capsys, pairs_command.main, pairs_flags(workshop, copied))
    assert "pairs-00001.safetensors" in line
    assert "add --repair to make it again" in line
    others = {
        name: (copied / name).stat().st_mtime_ns for name in ("pairs-00000.safetensors", "pairs-00002.safetensors")
    }
    pairs_command.main([*pairs_flags(workshop, copied), "--repair"])
    assert contents(copied) == contents(stored)
    assert {name: (copied / name).stat().st_mtime_ns for name in others} == others


def test_a_full_disk(workshop, stored, tmp_path, capsys, monkeypatch):
    folder, writes = tmp_path / "pairs", iter(range(1, 100))
    write = os.fsync

    def full(descriptor):
        if next(writes) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", full)
        line = refused(capsys, pairs_command.main, pairs_flags(workshop, folder))
    assert "the disk is full" in line
    assert "run the same command again to go on" in line
    assert len(read_manifest(folder).unfinished) == 2
    make_pairs(workshop, folder)
    assert contents(folder) == contents(stored)


def test_a_second_run_in_the_same_folder_is_refused(workshop, copied, capsys):
    with FileLock(copied / ".lock"):
        assert "Another smolvla-reflow-pairs is at work" in refused(
            capsys, pairs_command.main, pairs_flags(workshop, copied)
        )


# --- nothing mistaken -----------------------------------------------------------------------------------------

OTHER = {
    "teacher": "0" * 64,
    "dataset": "other/name",
    "total_frames": 49,
    "statistics": "1" * 64,
    "chunk_size": 7,
    "max_action_dim": 5,
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
        ({"reflow__pairs_path": "{tmp}/none"}, "holds no pairs: there is no manifest.json"),
    ],
)
def test_flags_that_contradict_the_pairs(workshop, stored, tmp_path, capsys, flags, message):
    flags = {"reflow__num_steps": None, "reflow__pairs_path": stored, **flags}
    flags = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in flags.items()}
    assert message in refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_augmented_images_when_asked_for(workshop, stored, tmp_path):
    flags = {
        "dataset__image_transforms__enable": "true",
        "reflow__augment_pairs": "true",
        "reflow__pairs_path": stored,
    }
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1, **flags))


def test_frames_without_pairs_are_counted(workshop, tmp_path, capsys):
    some = make_pairs(workshop, tmp_path / "some", dataset__episodes="[0,3]")
    flags = {"reflow__pairs_path": some, "steps": 1}
    line = refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **flags))
    assert "36 of the 48 frames to train on have no pairs" in line
    assert "which covers 12" in line
    reflow_train_main(reflow_run(workshop, tmp_path / "run", dataset__episodes="[3]", **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reflow__teacher_path": None}, "Name the teacher"),
        ({"dataset__repo_id": None}, "Name the teacher's dataset"),
        ({"output_dir": None}, "Name the folder for the pairs"),
        ({"reflow__teacher_path": "no/such/place"}, "There is no checkpoint at no/such/place"),
        ({"dataset__root": "{tmp}/none"}, "There is no LeRobotDataset at --dataset.root="),
        ({"dataset__episodes": "[0,8]"}, "--dataset.episodes: the dataset has 8, and no episode 8"),
        ({"output_dir": "{workshop}/1rf"}, "1rf exists and holds no pairs"),
        ({"pairs_per_frame": 0}, "--pairs_per_frame=0: at least 1 is needed"),
        ({"seed": -1}, "--seed=-1 is negative"),
        ({"dtype": "int8"}, "--dtype=int8 is unknown; known are: float32, bfloat16, float16"),
        ({"reflow__solver": "rk5"}, "--reflow.solver=rk5 is unknown"),
        ({"repair": "true"}, "there are no pairs in"),
        ({"policy__device": "abacus"}, "--policy.device=abacus cannot be used"),
        ({"pair_per_frame": 2}, "unrecognized arguments: --pair_per_frame=2"),
        ({"dataset__image_transforms__enable": "true"}, "from the images as they were recorded"),
    ],
)
def test_user_errors(workshop, tmp_path, capsys, flags, message):
    names = {"workshop": workshop, "tmp": tmp_path}
    flags = {k: v.format(**names) if isinstance(v, str) else v for k, v in flags.items()}
    assert message in refused(capsys, pairs_command.main, pairs_flags(workshop, **{"folder": tmp_path / "p", **flags}))
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_a_teacher_whose_actions_are_not_finite(workshop, tmp_path, capsys):
    teacher = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.action_out_proj.bias"][0] = float("nan")
    save_file(tensors, teacher / "model.safetensors")
    flags = pairs_flags(workshop, tmp_path / "pairs", reflow__teacher_path=teacher)
    assert "actions for frames 0 to 4 are not finite" in refused(capsys, pairs_command.main, flags)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: "{",
        lambda m: "[]",
        lambda m: {**m, "format_version": 2},
        lambda m: {**m, "frames": [[10, 5]]},
        lambda m: {**m, "frames": []},
        lambda m: {**m, "checksums": [1]},
        lambda m: {**m, "surprise": 1},
        lambda m: {**m, "frames_per_shard": 0},
        lambda m: {k: v for k, v in m.items() if k != "provenance"},
        lambda m: {**m, "provenance": {**m["provenance"], "dtype": "object"}},
        lambda m: {**m, "provenance": {**m["provenance"], "chunk_size": "6"}},
    ],
)
def test_a_damaged_manifest_is_refused(copied, edit):
    file = copied / "manifest.json"
    edited = edit(json.loads(file.read_text()))
    file.write_text(edited if isinstance(edited, str) else json.dumps(edited))
    with pytest.raises(ReflowError, match=r"manifest.json is damaged|manifest.json has format version 2"):
        Pairs(copied)


def test_what_attach_refuses(workshop, stored, copied):
    policy, batch = observed(workshop)
    batch["action"] = torch.zeros(4, CHUNK, 2)
    with pytest.raises(ReflowError, match="either a teacher or the pairs"):
        attach(policy, workshop / "1rf" / LAST, pairs=stored)
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


# --- verify ---------------------------------------------------------------------------------------------------


@pytest.fixture
def origin(workshop):
    """What the pairs were made from, as flags of --verify."""
    return [
        f"--teacher_path={workshop / '1rf' / LAST}",
        f"--dataset_root={workshop / 'dataset'}",
        "--policy.device=cpu",
    ]


def test_verify_solves_a_sample_again(stored, origin, capsys):
    pairs_command.main(["--verify", str(stored), *origin])
    report = capsys.readouterr().out
    assert "every file is the one that was written. Of 96 pairs solved again, the largest difference is" in report
    assert largest_difference(report) < 2e-3


def largest_difference(report: str) -> float:
    return float(report.split("the largest difference is ")[1].split()[0])


def test_verify_sees_pairs_that_are_not_the_teachers(copied, origin, capsys):
    """Whole files with good checksums, but of other actions."""
    for shard in range(3):
        file = copied / f"pairs-{shard:05d}.safetensors"
        save_file({"actions": load_file(file)["actions"] + 0.25}, file)
    manifest = read_manifest(copied)
    checksums = {shard: pairs_module._checksum(pairs_module.shard_path(copied, shard)) for shard in range(3)}
    dataclasses.replace(manifest, checksums=checksums).write(copied)
    pairs_command.main([f"--verify={copied}", *origin])
    assert largest_difference(capsys.readouterr().out) == pytest.approx(0.25, abs=0.01)


def test_verify_refuses_another_teacher(workshop, stored, origin, tmp_path, capsys):
    other = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    tensors = copy.copy(load_file(other / "model.safetensors"))
    tensors["model.action_out_proj.bias"] += 0.1
    save_file(tensors, other / "model.safetensors")
    line = refused(capsys, pairs_command.main, [f"--verify={stored}", *origin[1:], f"--teacher_path={other}"])
    assert "is not the teacher of these pairs: its fingerprint is" in line
    assert "holds no pairs" in refused(capsys, pairs_command.main, [f"--verify={tmp_path}"])


def test_verify_opens_only_what_the_user_names(copied, origin, capsys):
    """A manifest leads nowhere: what it has recorded is said, not followed."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["made_from"].update(teacher_path="../../elsewhere", dataset_root="/etc")
    (copied / "manifest.json").write_text(json.dumps(manifest))
    line = refused(capsys, pairs_command.main, [f"--verify={copied}"])
    assert "their manifest has it at --teacher_path=../../elsewhere --dataset_root=/etc" in line
    assert "--dataset_root=/etc" in refused(capsys, pairs_command.main, [f"--verify={copied}", origin[0]])


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_reading_a_large_set_keeps_nothing_in_memory(stored, tmp_path):
    """200 MB in shards, every frame read once in random order."""
    manifest = read_manifest(stored)
    provenance = dataclasses.replace(
        manifest.provenance, chunk_size=256, max_action_dim=32, pairs_per_frame=2, total_frames=6400
    )
    frames, per_shard = 6400, 400
    for shard in range(frames // per_shard):
        actions = torch.zeros(per_shard, 2, 256, 32, dtype=torch.float16)
        actions[:, 0, 0, 0] = torch.arange(per_shard)
        save_file({"actions": actions}, tmp_path / f"pairs-{shard:05d}.safetensors")
    checksums = dict.fromkeys(range(frames // per_shard), "")
    dataclasses.replace(
        manifest, provenance=provenance, frames=[[0, frames]], frames_per_shard=per_shard, checksums=checksums
    ).write(tmp_path)

    def in_use() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pairs = Pairs(tmp_path)
    pairs.lookup(0, 0)
    before = in_use()
    for frame in torch.randperm(frames).tolist():
        assert pairs.lookup(frame, 0).actions[0, 0] == frame % per_shard
    assert in_use() - before < 20 * 2**20
