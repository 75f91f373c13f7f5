"""`compat.py` knows LeRobot's versions: held against the LeRobot that is installed."""

import inspect
from types import SimpleNamespace

import accelerate
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.scripts import lerobot_train

from smolvla_reflow import ReflowError, attach, compat
from smolvla_reflow.commands.console import command_line
from smolvla_reflow.training.config import ReflowTrainPipelineConfig


class RecordedError(Exception):
    pass


TAKES_ONE = "accelerator" in inspect.signature(inspect.unwrap(lerobot_train.train)).parameters


@pytest.mark.skipif(not TAKES_ONE, reason="from 0.6.2 on LeRobot builds the Accelerator itself")
@pytest.mark.parametrize("use_amp", [False, True])
def test_accelerator_is_built_as_lerobot_builds_its_own(make_config, monkeypatch, use_amp):
    built = []

    def record(**arguments):
        built.append(arguments)
        raise RecordedError

    monkeypatch.setattr(accelerate, "Accelerator", record)
    monkeypatch.setattr(lerobot_train, "Accelerator", record, raising=False)
    cfg = ReflowTrainPipelineConfig(dataset=DatasetConfig(repo_id="a/b"), policy=make_config(use_amp=use_amp))
    with command_line("lerobot-train", []), pytest.raises(RecordedError):
        lerobot_train.train.__wrapped__(cfg)
    assert compat.accelerator_arguments(cfg) == built[0]


@pytest.mark.parametrize("use_amp", [False, True])
def test_a_lerobot_whose_config_builds_the_accelerator(monkeypatch, use_amp):
    """From 0.6.2 on. The config stays as it was, except that training follows `use_amp` as inference does."""
    trained_with = []
    monkeypatch.setattr(lerobot_train, "train", lambda cfg: trained_with.append(cfg.accelerator.build("p", cpu=True)))

    class Settings:
        mixed_precision = "no"

        def build(self, *args, cpu):
            return args, cpu

    cfg = SimpleNamespace(accelerator=Settings(), policy=SimpleNamespace(use_amp=use_amp, device="cpu"))
    compat.train(cfg, lambda accelerator: ("hooked", accelerator))
    assert trained_with == [("hooked", (("p",), True))]
    assert vars(cfg.accelerator) == ({"mixed_precision": "bf16"} if use_amp else {})


def test_a_lerobot_that_takes_no_accelerator_is_refused(monkeypatch):
    monkeypatch.setattr(lerobot_train, "train", lambda cfg: None)
    with pytest.raises(ReflowError, match="supports LeRobot 0.4.4 to 0.6.1, and .* is installed"):
        compat.train(SimpleNamespace(), lambda accelerator: accelerator)


@pytest.mark.parametrize("part", ["policy", "model"])
def test_a_lerobot_whose_forward_has_changed_is_refused_at_attach(policy, monkeypatch, part):
    def forward(self, batch, noise=None, time=None, reduction="mean", guidance=None):
        raise AssertionError

    module = policy if part == "policy" else policy.model
    monkeypatch.setattr(type(module), "forward", forward)
    before = dict(vars(policy.model))
    with pytest.raises(ReflowError, match=r"takes \(batch, .*guidance\).*supports LeRobot 0.4.4 to 0.6.1"):
        attach(policy)
    assert vars(policy.model) == before


def test_remote_jobs_are_refused():
    compat.refuse_remote_job(SimpleNamespace())
    compat.refuse_remote_job(SimpleNamespace(job=SimpleNamespace(is_remote=False, target=None)))
    with pytest.raises(ReflowError, match="--job.target=a10g would run lerobot-train, not reflow"):
        compat.refuse_remote_job(SimpleNamespace(job=SimpleNamespace(is_remote=True, target="a10g")))


class Layer:
    def __init__(self, tensor):
        self.keys, self.values, self.length = tensor, tensor + 1, 3


def cached_as(kind):
    """A prefix as LeRobot hands it over: up to 0.6.0, from 0.6.1 on, and in two of its open pull requests."""
    tensor = torch.arange(2.0)
    caches = {
        "dict": {0: {"key_states": tensor, "value_states": tensor + 1}},
        "class": SimpleNamespace(layers=[Layer(tensor)]),
        "tuple": ((tensor, tensor + 1),),
        "number": 7,
    }
    return {"prefix_pad_masks": tensor, "past_key_values": caches[kind]}


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("dict", lambda cache: cache[0].values()),
        ("class", lambda cache: (cache.layers[0].keys, cache.layers[0].values)),
        ("tuple", lambda cache: cache[0]),
        ("number", None),
    ],
)
def test_any_prefix_is_copied_with_its_tensors_changed(kind, pair):
    given = cached_as(kind)
    copied = compat.copy_prefix(given, lambda x: x.repeat_interleave(2, dim=0))
    assert copied["prefix_pad_masks"].tolist() == [0, 0, 1, 1]
    cache = copied["past_key_values"]
    if pair is None:
        assert cache == 7
    else:
        assert type(cache) is type(given["past_key_values"])
        assert [x.tolist() for x in pair(cache)] == [[0, 0, 1, 1], [1, 1, 2, 2]]
        assert [x.tolist() for x in pair(given["past_key_values"])] == [[0, 1], [1, 2]]


def test_names_that_lerobot_renames_before_its_preprocessor(monkeypatch):
    """From 0.6.2 on. A policy's own preprocessor renames those that begin with `observation.`, as ever."""
    rename_map, batch = {"act": "action", "observation.a": "observation.b"}, {"act": 1, "observation.a": 2}
    monkeypatch.delattr(lerobot_train, "rename_batch_keys", raising=False)
    assert compat.renamed_batch(batch, rename_map) == batch
    rename = lambda batch, names: {names.get(name, name): value for name, value in batch.items()}  # noqa: E731
    monkeypatch.setattr(lerobot_train, "rename_batch_keys", rename, raising=False)
    assert compat.renamed_early(rename_map) == {"act": "action"}
    assert compat.renamed_batch(batch, rename_map) == {"action": 1, "observation.a": 2}
