"""The workshop's 1-RF: loaded to be measured, and copied to be changed."""

import shutil
from pathlib import Path

import pytest

from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.evaluation.policy import load_measured_policy


@pytest.fixture(scope="module")
def measured(workshop):
    return load_measured_policy("policy", open_checkpoint(workshop / "1rf" / LAST), "cpu", {})


@pytest.fixture
def checkpoint(workshop, tmp_path):
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "checkpoint"))
