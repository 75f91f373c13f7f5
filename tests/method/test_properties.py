"""Properties that hold for anything hypothesis thinks of: attaching, pair indexing, configuration, fuzz."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import reflow_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from smolvla_reflow import Pairs, ReflowError, Solver, attach, detach, is_attached
from smolvla_reflow.checkpoint.fork.migration import plan
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.commands.console import command_line
from smolvla_reflow.commands.train import parse
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.errors import sha256
from smolvla_reflow.pairs.manifest import Manifest, Provenance, read_manifest, shard_path
from smolvla_reflow.times import TimeSampling
from smolvla_reflow.training.arguments import complete
from smolvla_reflow.training.config import ReflowTrainPipelineConfig

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


ACTIONS = ("attach", "detach", "train", "eval", "forward", "save", "strategy")


def held(policy):
    """What every module holds, one level into its dictionaries: a hook or a submodule that stayed would show."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in policy.named_modules()
    }


@quick
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=12))
def test_any_sequence_leaves_the_policy_as_it_was(make_policy, batch, tmp_path_factory, actions):
    policy = make_policy(seed=0)
    before, names, attached = held(policy), list(policy.state_dict()), False
    for action in actions:
        if action in ("attach", "detach"):
            twice = (action == "attach") is attached
            with pytest.raises(ReflowError) if twice else contextlib.nullcontext():
                {"attach": attach, "detach": detach}[action](policy)
            attached = action == "attach"
        elif action in ("train", "eval"):
            policy.train(action == "train")
        elif action == "forward":
            assert torch.isfinite(policy.forward(dict(batch))[0])
        elif action == "save":
            policy.save_pretrained(tmp_path_factory.mktemp("saved"))
        elif attached:
            policy.model.training_mode = "standard" if policy.model.training_mode == "reflow" else "reflow"
        assert is_attached(policy) is attached
        assert list(policy.state_dict()) == names
    if attached:
        detach(policy)
    policy.eval()
    assert held(policy) == before


terms = st.one_of(st.just("beta"), st.integers(1, 20).map(lambda k: f"grid:{k}"))


@quick
@given(names=st.lists(terms, min_size=1, max_size=4), size=st.integers(0, 64))
def test_mixtures_of_times(names, size):
    times = TimeSampling("+".join(names)).draw(size, torch.device("cpu"), lambda n, device: torch.zeros(n))
    grids = [int(name.removeprefix("grid:")) for name in names if name != "beta"]
    visited = {t for k in grids for t in (torch.arange(1, k + 1) / k).tolist()} | ({0.0} if "beta" in names else set())
    assert times.shape == (size,)
    assert set(times.tolist()) <= visited


@quick
@given(name=st.text(max_size=12).filter(lambda name: not name.startswith("grid:") and name != "beta"))
def test_any_other_name_is_refused(name):
    with pytest.raises(ReflowError, match="is unknown; known are: beta"):
        TimeSampling(name)


NUMBERS = {"total_frames": 10_000, "chunk_size": 2, "max_action_dim": 3, "seed": 0, "couplings_per_frame": 1}
NAMES = {"teacher": "t", "dataset": "d", "statistics": "s", "dtype": "float32"}
PROVENANCE = Provenance(**NAMES, **NUMBERS, solver=Solver("euler", num_steps=10))


@st.composite
def manifests(draw):
    """Ascending ranges with gaps, cut into shards."""
    gaps_and_lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=6))
    frames, at = [], draw(st.integers(0, 5)) - 1
    for gap, length in gaps_and_lengths:
        frames.append([at + gap, at + gap + length])
        at += gap + length
    return Manifest(PROVENANCE, {}, "0", frames, frames_per_shard=draw(st.integers(1, 50)))


@quick
@given(manifest=manifests(), wanted=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=5))
def test_every_frame_has_one_place(manifest, wanted, tmp_path_factory):
    every = [frame for start, stop in manifest.frames for frame in range(start, stop)]
    shards = [manifest.frames_of(shard) for shard in range(manifest.num_shards)]
    assert list(itertools.chain.from_iterable(shards)) == every
    assert all(len(shard) == manifest.frames_per_shard for shard in shards[:-1])
    assert manifest.num_frames == len(every)

    folder = tmp_path_factory.mktemp("pairs")
    dataclasses.replace(manifest, checksums=dict.fromkeys(range(manifest.num_shards), "")).write(folder)
    pairs = Pairs(folder)
    for frame in every:
        shard, row = divmod(pairs._position(frame), manifest.frames_per_shard)
        assert shards[shard][row] == frame
    for frame in set(range(every[-1] + 5)) - set(every):
        with pytest.raises(ReflowError, match=f"Frame {frame} has no pairs"):
            pairs._position(frame)
    ranges = [range(start, start + length) for start, length in wanted]
    assert pairs.missing(ranges) == sum(frame not in every for frames in ranges for frame in frames)


numbers = st.floats(1e-9, 1.0)
reflow_fields = st.fixed_dictionaries(
    {},
    optional={
        "strategy": st.sampled_from(["reflow", "distill", "standard"]),
        "time_sampling": st.just("beta") | st.integers(1, 20).map(lambda k: f"grid:{k}"),
        "real_data_ratio": st.floats(0, 1),
        "augment_pairs": st.booleans(),
        "solver": st.sampled_from(["euler", "midpoint", "dopri5"]),
        **dict.fromkeys(("couplings_per_frame", "num_steps"), st.integers(1, 1000)),
        **dict.fromkeys(("rtol", "atol"), numbers),
    },
)


@settings(quick, max_examples=12)
@given(fields=reflow_fields, steps=st.integers(1, 10**6))
def test_what_is_typed_is_what_is_resumed(workshop, tmp_path_factory, fields, steps):
    """Command line -> config -> train_config.json -> config of the resumed run."""
    folder = tmp_path_factory.mktemp("config")
    typed = {f"reflow__{name}": json.dumps(value).strip('"') for name, value in fields.items()}
    run = reflow_run(workshop, folder / "run", **{"reflow__num_steps": None, **typed, "steps": steps})
    with command_line("smolvla-reflow-train", complete(run).flags):
        cfg = parse()
    assert fields.items() <= vars(cfg.reflow).items()
    cfg.save_pretrained(folder)
    with command_line("smolvla-reflow-train", [f"--config_path={folder / 'train_config.json'}", "--resume=true"]):
        again = parse()
    assert isinstance(again, ReflowTrainPipelineConfig)
    assert again.reflow == cfg.reflow
    assert again.steps == cfg.steps == steps


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture(scope="module")
def fuzzed(workshop, tmp_path_factory):
    """A checkpoint and a finished set of pairs to be spoilt."""
    folder = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(workshop / "1rf" / LAST, folder / "checkpoint")
    shard = shard_path(folder, 0)
    save_file({"actions": torch.zeros(4, PROVENANCE.couplings_per_frame, 2, 3)}, shard)
    Manifest(PROVENANCE, {}, "0", [[0, 4]], 4, {0: sha256(shard).hexdigest()}).write(folder)
    return folder


def spoil(file: Path, text: str, data: st.DataObject) -> None:
    """Change or remove some field, anywhere; or cut the file; or make it anything."""
    how = data.draw(st.sampled_from(["field", "remove", "cut", "whole"]))
    content = place = data.draw(anything) if how == "whole" else json.loads(text)
    if how in ("field", "remove"):
        key = data.draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place)))
        del place[key]
        place.update({key: data.draw(anything)} if how == "field" else {})
    raw = json.dumps(content)
    file.write_text(raw[: data.draw(st.integers(0, len(raw) - 1))] if how == "cut" else raw)


def fuzz(files: Sequence[Path], reads: Sequence[Callable[[], object]], max_examples: int) -> None:
    """Spoil one of the files and read: any error but ours goes through. Both happen, or the fuzz would say nothing."""
    for read in reads:
        read()  # what is not spoilt
    outcomes = Counter()

    @settings(quick, max_examples=max_examples)
    @given(data=st.data())
    def spoilt(data):
        file = data.draw(st.sampled_from(files))
        text = file.read_text()
        try:
            spoil(file, text, data)
            for number, read in enumerate(reads):
                try:
                    read()
                    outcomes[number, "read"] += 1
                except ReflowError:
                    outcomes[number, "refused"] += 1
        finally:
            file.write_text(text)

    spoilt()
    counts = [outcomes[number, how] for number in range(len(reads)) for how in ("read", "refused")]
    assert min(counts) > max_examples // 20, outcomes


def test_fuzzed_configs_raise_nothing_but_our_error(fuzzed):
    folder = fuzzed / "checkpoint"
    files = [folder / name for name in ("config.json", "policy_preprocessor.json", "train_config.json")]
    fuzz(files, [lambda: open_checkpoint(folder).fingerprint(), lambda: plan(folder)], 200)


def test_fuzzed_manifests_raise_nothing_but_our_error(fuzzed):
    reads = [lambda: read_manifest(fuzzed), lambda: Pairs(fuzzed).check(), lambda: Pairs(fuzzed).lookup(3, 0)]
    fuzz([fuzzed / "manifest.json"], reads, 300)
