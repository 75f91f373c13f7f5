"""`compat.py` knows LeRobot's versions: held against the LeRobot that is installed."""

import inspect
from types import SimpleNamespace

import accelerate
import pytest
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


def test_a_lerobot_whose_config_builds_the_accelerator(monkeypatch):
    """From 0.6.2 on. The config stays as it was."""
    trained_with = []
    monkeypatch.setattr(lerobot_train, "train", lambda cfg: trained_with.append(cfg.accelerator.build("p", cpu=True)))

    class Settings:
        def build(self, *args, cpu):
            return args, cpu

    cfg = SimpleNamespace(accelerator=Settings())
    compat.train(cfg, lambda accelerator: ("hooked", accelerator))
    assert trained_with == [("hooked", (("p",), True))]
    assert not vars(cfg.accelerator)


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
