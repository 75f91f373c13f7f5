"""Resuming after the dataset's statistics have moved: the teacher is asked in the space that LeRobot then uses."""

import json
import shutil

import pytest
import torch
from helpers import reflow_run, reflow_train_main, refused
from lerobot.policies.factory import make_pre_post_processors
from pairs_helpers import make_pairs, observed

from smolvla_reflow import register_loss_strategy
from smolvla_reflow.compat import resuming_keeps_statistics
from smolvla_reflow.demo.flags import LAST


@pytest.fixture
def moved(workshop, tmp_path):
    """The workshop's dataset, whose statistics were computed anew: means moved by 1, deviations doubled."""
    root = shutil.copytree(workshop / "dataset", tmp_path / "moved")
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    for feature in ("action", "observation.state"):
        stats[feature]["mean"] = [value + 1 for value in stats[feature]["mean"]]
        stats[feature]["std"] = [value * 2 for value in stats[feature]["std"]]
    path.write_text(json.dumps(stats))
    return root


@pytest.fixture
def resuming(moved, tmp_path):
    """Flags that take the run in `run/` on to a second step, on the dataset whose statistics have moved."""
    return [f"--config_path={tmp_path / 'run'}", "--resume=true", "--steps=2", f"--dataset.root={moved}"]


@pytest.fixture
def watched(registry):
    """The couplings that a run with `--reflow.strategy=watched` was taught, step by step."""
    seen = []

    @register_loss_strategy("watched")
    def loss(step):
        coupling = step.coupling()
        seen.append((step.batch["index"].tolist(), coupling))
        return step.losses(coupling)

    return seen


def in_robot_units(checkpoint, actions):
    _, after = make_pre_post_processors(None, str(checkpoint))
    return torch.stack([after(actions[:, i]) for i in range(actions.shape[1])], dim=1)


def test_couplings_after_resuming_are_the_teachers_stock_actions(workshop, resuming, watched, tmp_path):
    run, teacher = tmp_path / "run", workshop / "1rf" / LAST
    reflow_train_main(reflow_run(workshop, run, steps=1, reflow__strategy="watched", reflow__solver="euler"))
    watched.clear()
    reflow_train_main(resuming)
    ((frames, coupling),) = watched

    policy, batch = observed(workshop, frames=frames)
    chunk = policy.predict_action_chunk({k: v for k, v in batch.items() if k != "action"}, noise=coupling.noise)
    # What LeRobot has normalised by, it has saved with the student.
    taught = in_robot_units(run / LAST, coupling.actions[..., :2])
    torch.testing.assert_close(taught, in_robot_units(teacher, chunk), rtol=1e-3, atol=1e-4)


def test_pairs_of_the_space_that_a_resumed_run_keeps(workshop, resuming, tmp_path, capsys):
    pairs, run = make_pairs(workshop, tmp_path / "pairs", couplings_per_frame=1), tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, steps=1, reflow__pairs_path=pairs))
    if resuming_keeps_statistics():
        reflow_train_main(resuming)
        assert (run / "checkpoints" / "000002").is_dir()
    else:  # this LeRobot would normalise by the statistics that have moved
        assert "statistics is" in refused(capsys, reflow_train_main, resuming)
