"""A set of pairs on disk: its noise, its actions, its manifest, and what reading it costs."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from pairs_helpers import CHUNK, FRAMES, WIDTH, make_pairs, observed
from safetensors.torch import load_file, save_file

from smolvla_reflow import Pairs, ReflowError, Solver
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID, write_dataset
from smolvla_reflow.noise import EVALUATION, PAIRS, pair_noise
from smolvla_reflow.pairs.manifest import differences, read_manifest, shard_path
from smolvla_reflow.smolvla.observation import observe


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


def test_no_pair_has_a_noise_of_the_evaluation():
    """Whatever the seeds, frames and pairs: the second word of the generator's counter tells the two apart.

    Philox maps counters one to one to blocks of numbers, so with one seed no block is shared. The generators are looked
    at after a chunk larger than any policy's: the counter has not reached its second word.
    """
    made, stock = [], np.random.Philox

    def noted(**words):
        made.append(stock(**words))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "Philox", noted)
        for stream in (PAIRS, EVALUATION):
            for seed, frame, pair in itertools.product((0, 1, 2**64, 2**128 - 1), (0, 2**64 - 1), (0, 2**64 - 1)):
                pair_noise(seed, frame, pair, (1000, 100), stream)
    words = [int(generator.state["state"]["counter"][1]) for generator in made]
    assert words == [PAIRS] * 16 + [EVALUATION] * 16
    assert PAIRS != EVALUATION
    shape = (CHUNK, WIDTH)
    own = {tuple(pair_noise(0, f, k, shape, EVALUATION).flatten().tolist()) for f in range(30) for k in range(4)}
    of_pairs = {
        tuple(pair_noise(s, f, k, shape).flatten().tolist()) for s in range(30) for f in range(30) for k in range(4)
    }
    assert not own & of_pairs


def test_noise_of_old_sets_stays_what_it_was():
    """Changing these numbers makes every stored set worthless: it needs another format version."""
    golden = torch.tensor([[0.134004548, 0.436599135], [-0.526899099, -1.149254322]])
    torch.testing.assert_close(pair_noise(7, 11, 2, (2, 2)), golden, rtol=1e-6, atol=0)


def assert_stock_samples(workshop: Path, pairs: Pairs, frames: tuple[int, ...], pair: int) -> None:
    """The stored actions are the teacher's own samples from the stored noise, rounded to float16."""
    teacher, batch = observed(workshop, frames=frames)
    couplings = [pairs.lookup(frame, pair) for frame in frames]
    noise = torch.stack([pair_noise(0, frame, pair, (CHUNK, WIDTH)) for frame in frames])
    assert torch.equal(torch.stack([coupling.noise for coupling in couplings]), noise)
    with torch.no_grad():
        expected = teacher.model.sample_actions(*observe(teacher, batch), noise=noise)
    actions = torch.stack([coupling.actions for coupling in couplings])
    torch.testing.assert_close(actions, expected, rtol=2**-11, atol=1e-4)


def test_stored_actions_are_the_teachers_stock_samples(workshop, stored):
    for k in range(3):
        assert_stock_samples(workshop, Pairs(stored), (0, 7, 20, 47), k)


def test_the_prefix_is_encoded_once_for_all_pairs_of_a_frame(workshop, tmp_path, monkeypatch):
    encoded, solved = [], []

    def counted(name, sizes, size_of):
        method = getattr(VLAFlowMatching, name)
        counting = lambda self, x, *a, **k: sizes.append(size_of(x)) or method(self, x, *a, **k)  # noqa: E731
        monkeypatch.setattr(VLAFlowMatching, name, counting)

    counted("embed_prefix", encoded, lambda images: len(images[0]))
    counted("embed_suffix", solved, len)
    make_pairs(workshop, tmp_path / "pairs", batch_size=16, couplings_per_frame=5, reflow__num_steps=2)
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
    assert_stock_samples(workshop, pairs, (17, 31), 1)
    for frame in (5, 18, 29, 36):
        with pytest.raises(ReflowError, match="no pairs"):
            pairs.lookup(frame, 0)
    assert pairs.missing([range(0, 48)]) == 30
    assert pairs.missing([range(7, 10), range(31, 33)]) == 0


@pytest.mark.parametrize(
    ("changes", "size", "eps"),
    [
        ({"dtype": "float32"}, 4, 1e-5),
        ({"dtype": "bfloat16"}, 2, 2**-8),
        ({"batch_size": 16, "num_workers": 2, "frames_per_shard": 10}, 2, 2**-11),
    ],
)
def test_number_formats_batches_and_workers_change_the_pairs_by_rounding_alone(
    workshop, stored, tmp_path, changes, size, eps
):
    pairs, others = Pairs(stored), Pairs(make_pairs(workshop, tmp_path / "other", **changes))
    assert others.manifest.bytes_per_pair == CHUNK * WIDTH * size
    for frame in range(FRAMES):
        coupling, other = pairs.lookup(frame, 1), others.lookup(frame, 1)
        assert torch.equal(coupling.noise, other.noise)
        torch.testing.assert_close(coupling.actions, other.actions, rtol=eps + 2**-11, atol=1e-4)


def test_a_dataset_with_other_statistics(workshop, tmp_path, capsys):
    """The stored actions are in the dataset's normalised space: in robot units, what the teacher would do."""
    write_dataset(tmp_path / "other", episodes=4, seed=9)
    pairs = Pairs(make_pairs(workshop, tmp_path / "pairs", dataset__root=tmp_path / "other", dtype="float32"))
    assert capsys.readouterr().err.count("The dataset's statistics are not the teacher's (most in '") == 1
    teacher, batch = observed(workshop, tmp_path / "other", frames=(3, 20))
    _, postprocessor = make_pre_post_processors(None, str(workshop / "1rf" / LAST))
    couplings = [pairs.lookup(frame, 0) for frame in (3, 20)]
    actions = torch.stack([coupling.actions for coupling in couplings])
    chunk = teacher.predict_action_chunk(batch, noise=torch.stack([coupling.noise for coupling in couplings]))
    expected = torch.stack([postprocessor(chunk[:, i]) for i in range(CHUNK)], dim=1)
    stats = LeRobotDatasetMetadata(REPO_ID, root=tmp_path / "other").stats["action"]
    mean, std = (torch.as_tensor(stats[name]).float() for name in ("mean", "std"))
    torch.testing.assert_close(actions[..., :2] * std + mean, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actions[..., :2], chunk, atol=1e-2)


ENTRIES = [{"frames": [[10, 5]]}, {"frames": []}, {"checksums": [1]}, {"surprise": 1}, {"frames_per_shard": 0}]
ORIGIN = [{"provenance": None}, {"dtype": "object"}, {"chunk_size": "6"}, {"solver": {"method": "rk5"}}]
NUMBERS = [{"chunk_size": True}, {"scaled_noise": "0"}, {"scaled_noise": 2}, {"seed": 2**128}]
HALF_A_STEP = {"solver": {"method": "euler", "num_steps": 2.5}}


@pytest.mark.parametrize("changes", ["{", "[]", *ENTRIES, *ORIGIN, *NUMBERS, HALF_A_STEP])
def test_a_damaged_manifest_is_refused(copied, changes):
    file = copied / "manifest.json"
    values = json.loads(file.read_text())
    for name, value in changes.items() if isinstance(changes, dict) else ():
        (values["provenance"] if name in values["provenance"] else values)[name] = value
    file.write_text(changes if isinstance(changes, str) else json.dumps(values))
    with pytest.raises(ReflowError, match="manifest.json is damaged"):
        Pairs(copied)


@pytest.mark.parametrize("changes", [{"chunk_size": 10**12}, {"max_action_dim": 2**70}, {"chunk_size": 1}])
def test_a_manifest_of_other_chunks_than_the_files(copied, changes):
    """Found before noise of that size is drawn."""
    file = copied / "manifest.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "provenance": {**values["provenance"], **changes}}))
    with pytest.raises(ReflowError, match="cannot be read .its chunks are"):
        Pairs(copied).lookup(3, 0)


def test_a_manifest_of_another_version_is_not_called_damaged(copied):
    file = copied / "manifest.json"
    for version in (1, 3, "2"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": version}))
        with pytest.raises(ReflowError, match=f"manifest.json has format version {version}, this package reads 2;"):
            Pairs(copied)


def test_differences_name_every_value_of_the_solver(stored):
    here = read_manifest(stored).provenance
    other = dataclasses.replace(here, solver=Solver("dopri5", rtol=1e-3, atol=1e-4), seed=1)
    assert differences(here, here) == []
    assert differences(here, other) == [
        "seed is 1 in the pairs and 0 here",
        "solver is dopri5 in the pairs and euler here",
        "num_steps is None in the pairs and 10 here",
        "rtol is 0.001 in the pairs and None here",
        "atol is 0.0001 in the pairs and None here",
    ]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_reading_a_large_set_keeps_nothing_in_memory(stored, tmp_path):
    """200 MB in shards, every frame read once in random order."""
    manifest, frames, per_shard = read_manifest(stored), 6400, 400
    sizes = {"chunk_size": 256, "max_action_dim": 32, "couplings_per_frame": 2, "total_frames": frames}
    for shard in range(frames // per_shard):
        actions = torch.zeros(per_shard, 2, 256, 32, dtype=torch.float16)
        actions[:, 0, 0, 0] = torch.arange(per_shard)
        save_file({"actions": actions}, shard_path(tmp_path, shard))
    dataclasses.replace(
        manifest,
        provenance=dataclasses.replace(manifest.provenance, **sizes),
        frames=[[0, frames]],
        frames_per_shard=per_shard,
        checksums=dict.fromkeys(range(frames // per_shard), ""),
    ).write(tmp_path)

    def in_use() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pairs = Pairs(tmp_path)
    pairs.lookup(0, 0)
    before = in_use()
    for frame in torch.randperm(frames).tolist():
        assert pairs.lookup(frame, 0).actions[0, 0] == frame % per_shard
    assert in_use() - before < 20 * 2**20
