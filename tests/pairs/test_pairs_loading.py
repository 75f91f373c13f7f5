"""Stored pairs come with the batch: read by the data loader's processes, chosen at random, and used once."""

import os
import pickle

import lerobot
import pytest
import torch
from accelerate import Accelerator
from helpers import reads, reflow_run, reflow_train_main, refused
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from packaging.version import Version
from pairs_helpers import CHUNK, FRAMES_SEEN, WIDTH, observed, which_pairs
from safetensors.torch import load_file
from torch.utils.data import DataLoader, default_collate

from smolvla_reflow import Pairs, Recipe, attach
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.pairs import store
from smolvla_reflow.pairs.loading import CollateWithPairs, read_in_loader
from smolvla_reflow.pairs.manifest import shard_path
from smolvla_reflow.smolvla.observation import observe

NEW = Version(lerobot.__version__) >= Version("0.6.0")
streams_images = pytest.mark.skipif(not NEW, reason="this LeRobot streams videos only")


@pytest.fixture
def dataset(workshop):
    return LeRobotDataset(REPO_ID, root=workshop / "dataset")


@pytest.fixture
def items(dataset):
    """The set has 16 frames in a shard."""
    return [dataset[i] for i in FRAMES_SEEN]


@pytest.fixture
def preprocessor(workshop):
    return make_pre_post_processors(None, str(workshop / "1rf" / LAST))[0]


@pytest.fixture
def opened(monkeypatch):
    """The files that pairs are read from, one entry for each time."""
    paths, safe_open = [], store.safe_open
    monkeypatch.setattr(store, "safe_open", lambda path, **how: paths.append(path) or safe_open(path, **how))
    return paths


def brought(batch):
    return batch["info"][store.BROUGHT]


def picks(batch, per_frame=1):
    """Which of a frame's three stored pairs is in the batch, and that it is one."""
    found = brought(batch)
    assert found["noise"].shape == found["actions"].shape == (len(batch["index"]), per_frame, CHUNK, WIDTH)
    return [tuple(which_pairs(*each)) for each in zip(batch["index"].tolist(), found["noise"], strict=True)]


def with_pairs(folder, *, per_frame=1, process=0, collate=default_collate):
    return CollateWithPairs(collate, Pairs(folder), per_frame, process)


IN_ANOTHER_PROCESS = pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("workers", [{"num_workers": 0}, IN_ANOTHER_PROCESS])
def test_pairs_get_through_loader_accelerator_and_preprocessor(stored, dataset, preprocessor, workers):
    """The batch that the policy gets holds, for each frame, the noise and the actions of one of its pairs."""
    loader = DataLoader(dataset, batch_size=24, **workers)
    read_in_loader(loader, Pairs(stored), per_frame=2)
    loader = Accelerator(cpu=True).prepare(loader)
    files = [load_file(shard_path(stored, shard))["actions"].float() for shard in range(3)]
    seen = []
    for loaded in loader:
        batch = preprocessor(loaded)
        for i, pairs in enumerate(picks(batch, per_frame=2)):
            frame = int(batch["index"][i])
            seen.append(frame)
            assert len(set(pairs)) == 2
            for k, pair in enumerate(pairs):
                assert torch.equal(brought(batch)["actions"][i, k], files[frame // 16][frame % 16, pair])
    assert seen == list(range(48))


def test_a_batch_of_its_own_kind_is_left_alone(workshop, stored, items, preprocessor):
    """Nothing to find the pairs by, an "info" that the dataset has, and a batch of which a collate made nothing."""
    without = [{name: value for name, value in item.items() if name != "index"} for item in items]
    assert "info" not in with_pairs(stored)(without)
    batch = with_pairs(stored)([{**item, "info": torch.tensor(3)} for item in items])
    assert batch["info"].tolist() == [3] * 4
    assert with_pairs(stored, collate=lambda items: None)(items) is None
    policy, _ = observed(workshop)
    batch = {**preprocessor(batch), "action": torch.zeros(4, CHUNK, 2)}
    with attach(policy, pairs=stored):
        assert torch.isfinite(policy.train().forward(batch)[0])


def test_processes_that_are_seeded_alike_choose_for_themselves(stored, items):
    def chosen(process):
        torch.manual_seed(5)
        collate = with_pairs(stored, process=process)
        return [pair for _ in range(20) for pair in picks(collate(items))]

    assert chosen(0) == chosen(0)
    first, second = chosen(0), chosen(1)
    assert 10 < sum(a == b for a, b in zip(first, second, strict=True)) < 45  # of 80, a third by chance
    assert set(first) == {(0,), (1,), (2,)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_chooses_anew(stored, dataset, num_workers):
    loader = DataLoader(dataset, batch_size=6, num_workers=num_workers)
    read_in_loader(loader, Pairs(stored), per_frame=1)
    torch.manual_seed(0)
    epochs = [[pair for batch in loader for pair in picks(batch)] for _ in range(2)]
    assert 5 < sum(a == b for a, b in zip(*epochs, strict=True)) < 30  # of 48, a third by chance
    if num_workers:  # nor do its processes choose alike
        assert epochs[0][:6] != epochs[0][6:12]


def test_choosing_takes_no_random_numbers_from_others(stored, items):
    """So that image transforms are those of plain LeRobot."""
    collate = with_pairs(stored)
    torch.manual_seed(0)
    collate(items)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_a_used_collate_can_be_sent_to_another_process(stored, items):
    collate = with_pairs(stored)
    assert picks(collate(items))
    assert picks(pickle.loads(pickle.dumps(collate))(items))


def test_a_step_uses_the_pairs_in_its_batch_once(workshop, stored, items, preprocessor, opened, asked):
    policy, _ = observed(workshop)
    batch = preprocessor(with_pairs(stored, per_frame=2)(items))
    batch["action"] = torch.zeros(4, CHUNK, 2)
    noise, actions = (brought(batch)[name].flatten(0, 1) for name in ("noise", "actions"))
    attach(policy, pairs=stored, recipe=Recipe(couplings_per_frame=2))
    torch.manual_seed(0)  # of other pairs in the second step
    opened.clear()
    policy.train().forward(batch)
    assert not opened
    assert torch.equal(asked[0][0], actions)
    assert torch.equal(asked[0][1], noise)
    policy.forward(batch)
    assert len(opened) == 3
    assert not torch.equal(asked[1][1], noise)


@pytest.mark.parametrize(("frames", "per_frame"), [(FRAMES_SEEN[::-1], 1), (FRAMES_SEEN, 2)])
def test_what_does_not_belong_to_the_batch_is_not_used(workshop, stored, items, frames, per_frame, asked):
    policy, batch = observed(workshop)
    batch |= {"action": torch.zeros(4, CHUNK, 2), "index": torch.tensor(frames)}
    batch["info"] = with_pairs(stored, per_frame=per_frame)(items)["info"]
    attach(policy, pairs=stored)
    policy.train().forward(batch)
    for frame, noise in zip(frames, asked[0][1], strict=True):
        assert which_pairs(frame, [noise])


def test_a_step_from_pairs_waits_no_more_often_than_a_standard_one(workshop, stored, items, preprocessor):
    policy, _ = observed(workshop)
    batch = preprocessor(with_pairs(stored)(items))
    batch["action"] = torch.zeros(4, CHUNK, 2)
    policy.train()
    standard = reads(lambda: policy.forward(batch))
    attach(policy, pairs=stored)
    assert 1 <= reads(lambda: policy.forward(batch)) <= standard


def test_a_frame_that_stands_twice_keeps_its_two_pairs_and_a_foreign_one_stops_the_run(workshop, stored, items):
    torch.manual_seed(0)  # of two pairs of one frame that differ
    policy, batch = observed(workshop)
    pairs, seen = Pairs(stored), observe(policy, batch)

    def coupled(frames, batch):
        return pairs.in_batch(batch)(seen, frames=torch.tensor(frames), noise=None, per_frame=1)

    twice = [items[0], items[0], items[1], items[2]]
    frames = [item["index"].item() for item in twice]
    batch = with_pairs(stored)(twice)
    given = brought(batch)
    expected = given["noise"].flatten(0, 1), given["actions"].flatten(0, 1)
    assert not torch.equal(expected[0][0], expected[0][1])
    found = coupled(frames, batch)
    assert torch.equal(found.noise, expected[0])
    assert torch.equal(found.actions, expected[1])
    batch["info"] = {store.BROUGHT: given}
    found = coupled(frames[1:], batch)
    assert torch.equal(found.noise, expected[0][1:])
    batch["info"] = {store.BROUGHT: given}
    actions = coupled([frames[3], 10**6], batch).actions
    assert torch.equal(actions[0], expected[1][3])
    assert actions[1].isnan().all()


def test_a_batch_opens_each_file_once(stored, opened):
    pairs, frames = Pairs(stored), [40, 3, 20, 41, 4, 21, 3]
    coupling = pairs.draw(frames, torch.device("cpu"), per_frame=3)
    assert len(opened) == len(set(opened)) == 3
    for i, frame in enumerate(frame for frame in frames for _ in range(3)):
        (k,) = which_pairs(frame, coupling.noise[i : i + 1])
        assert torch.equal(pairs.lookup(frame, k).actions, coupling.actions[i])


@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=streams_images)])
def test_training_reads_no_pair_itself(workshop, stored, tmp_path, monkeypatch, streaming):
    log, safe_open = tmp_path / "opened", store.safe_open

    def logged(path, **how):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return safe_open(path, **how)

    monkeypatch.setattr(store, "safe_open", logged)
    flags = {"num_workers": 1, "steps": 2, "reflow__couplings_per_frame": 2, "dataset__streaming": streaming}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", reflow__pairs_path=stored, **flags))
    assert str(os.getpid()) not in (log.read_text().splitlines() if log.exists() else [])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_gone_is_a_sentence(workshop, copied, tmp_path, capsys, monkeypatch, num_workers):
    check = Pairs.check

    def then_gone(pairs):
        check(pairs)
        for shard in range(3):
            shard_path(copied, shard).unlink()

    monkeypatch.setattr(Pairs, "check", then_gone)
    flags = reflow_run(workshop, tmp_path / "run", reflow__pairs_path=copied, num_workers=num_workers)
    assert "cannot be read (" in refused(capsys, reflow_train_main, flags)


def test_each_start_hashes_every_file_once(workshop, stored, tmp_path, monkeypatch):
    hashed, check_shards = [], store.check_shards
    monkeypatch.setattr(store, "check_shards", lambda *of: hashed.append(of) or check_shards(*of))
    flags = {"reflow__pairs_path": stored, "steps": 1, "save_freq": 1}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", **flags))
    assert len(hashed) == 1
    reflow_train_main([f"--config_path={tmp_path / 'run' / LAST / 'train_config.json'}", "--resume=true", "--steps=2"])
    assert len(hashed) == 2
