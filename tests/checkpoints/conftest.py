"""A checkpoint to be changed, and the hub's cache on this machine."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from smolvla_reflow.demo.flags import LAST


@pytest.fixture
def teacher(workshop, tmp_path):
    """A copy of the workshop's 1-RF."""
    return Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Puts a checkpoint into the hub's cache as a commit of a repository; `refs` are the names of that commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo_id: str, commit: str, checkpoint: Path, *refs: str) -> Path:
        repository = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        for name in refs:
            (repository / "refs" / name).write_text(commit)
        return Path(shutil.copytree(checkpoint, repository / "snapshots" / commit))

    return put


@pytest.fixture
def dataset(workshop: Path, tmp_path: Path) -> Path:
    """A copy of the workshop's dataset, to be changed."""
    return Path(shutil.copytree(workshop / "dataset", tmp_path / "dataset"))
