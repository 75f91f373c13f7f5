"""Losses come from the registry, from installed packages, and from files that the user names."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, attach_plain, loss_of, losses_of, plain, reflow_run, reflow_train_main, refused
from oracle import by_frame, reflow_losses, repeated

from smolvla_reflow import ReflowError, available_loss_strategies, get_loss_strategy, register_loss_strategy

EXAMPLE = Path(__file__).parents[2] / "examples" / "late_time_loss.py"

pytestmark = pytest.mark.usefixtures("registry")


def test_built_in_strategies():
    assert available_loss_strategies() == ("distill", "reflow", "standard")
    assert get_loss_strategy("reflow").unused == ()
    assert get_loss_strategy("distill").unused == ("time_sampling",)
    assert [name for name in available_loss_strategies() if not get_loss_strategy(name).couples] == ["standard"]


def test_a_name_is_taken_once_and_fields_without_use_are_the_recipes():
    with pytest.raises(ReflowError, match="'reflow' is already registered"):
        register_loss_strategy("reflow")(lambda step: None)
    with pytest.raises(ReflowError, match="unused=time_samplin is no field of a Recipe; known are: time_sampling"):
        register_loss_strategy("mine", unused=("time_samplin",))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda step: 0.0, r"'mine' returned a float; return a tensor, such as step.losses\(...\)"),
        (lambda step: step.losses(step.recorded()).mean(), r"returned losses of shape \(\); they have to be unreduced"),
        (lambda step: step.losses(step.recorded())[:2], r"of shape \(2, 5, 6\); .*unreduced, \(4, chunk_size"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(policy, batch, function, message):
    register_loss_strategy("mine")(function)
    attach_plain(policy, strategy="mine")
    with pytest.raises(ReflowError, match=message):
        loss_of(policy, batch)


def test_an_installed_package_offers_its_strategy_unimported(tmp_path, monkeypatch):
    """A real distribution on the path."""
    (tmp_path / "their_losses.py").write_text(
        "from smolvla_reflow import register_loss_strategy\n"
        "def doubled(step):\n    return 2.0 * step.losses(step.coupling())\n"
        "@register_loss_strategy('timeless', unused=('time_sampling',))\n"
        "def timeless(step):\n    return step.losses(step.coupling(), times=1.0)\n"
    )
    info = tmp_path / "their_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[smolvla_reflow.loss_strategies]\ndoubled = their_losses:doubled\ntimeless = their_losses:timeless\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_losses", raising=False)
    assert available_loss_strategies() == ("distill", "doubled", "reflow", "standard", "timeless")
    assert "their_losses" not in sys.modules
    timeless = get_loss_strategy("timeless")
    assert timeless.function is sys.modules["their_losses"].timeless
    assert timeless.unused == ("time_sampling",)  # as its module registers it, when it is imported
    assert get_loss_strategy("doubled").function is sys.modules["their_losses"].doubled


def test_example_is_short_and_honours_every_option(policy, teacher, batch, asked):
    """Its loss against the oracle, on the noise and times the student was asked about."""
    assert len(EXAMPLE.read_text().splitlines()) < 30
    torch.manual_seed(0)  # of both times of the grid
    recipe = plain(time_sampling="grid:2", couplings_per_frame=3, real_data_ratio=0.5)
    attach_plain(policy, teacher, strategy=f"{EXAMPLE}:late", recipe=recipe, solver="midpoint")
    losses = losses_of(policy, batch)
    actions, noise, time = (torch.cat(calls) for calls in zip(*asked, strict=True))
    assert len(noise) == 4 * 3
    frames = repeated(batch, 3)
    assert torch.equal(actions[:6], policy.prepare_action(frames)[:6])
    assert {round(t, 4) for t in time[6:].tolist()} == {0.9, 1.0}  # 0.8 + 0.2 t at the times of grid:2
    assert not {round(t, 4) for t in time[:6].tolist()} & {0.9, 1.0}
    expected = by_frame(reflow_losses(policy, teacher, frames, noise, time))[2:]
    # Their weight beside recorded frames is tested in test_recorded_share.py.
    assert_close(losses[2:] / losses[2:].sum(), expected / expected.sum())


def test_a_file_is_found_from_anywhere_and_run_once(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "from smolvla_reflow import register_loss_strategy\n"
        f"with open({str(tmp_path / 'runs')!r}, 'a') as runs: runs.write('.')\n"
        "@register_loss_strategy('mine', unused=('time_sampling',))\n"
        "def mine(step):\n    return step.losses(step.coupling(), times='grid:1')\n"
        "def plain(step):\n    return step.losses(step.coupling())\n"
        "def _of_its_own(step):\n    return step.losses(step.coupling())\n"
        "@register_loss_strategy('by_another_name')\ndef nine(step):\n    return step.losses(step.coupling())\n"
        "register_loss_strategy('in_one_line')(lambda step: step.losses(step.coupling()))\n"
    )
    monkeypatch.chdir(tmp_path)
    by_path = get_loss_strategy("mine.py:mine")
    assert by_path.unused == ("time_sampling",)
    assert by_path.function is get_loss_strategy(f"{file}:mine").function
    assert get_loss_strategy("./mine.py:plain").function.__name__ == "plain"
    by_another_name = get_loss_strategy("mine.py:by_another_name").function
    assert by_another_name is get_loss_strategy(f"{file}:by_another_name").function
    assert get_loss_strategy("mine.py:in_one_line")
    with pytest.raises(ReflowError, match="known are: by_another_name, in_one_line, mine, nine, plain.$"):
        get_loss_strategy("mine.py:register_loss_strategy")
    assert (tmp_path / "runs").read_text() == "."
    assert not any(".py:" in name for name in available_loss_strategies())


def test_a_file_may_be_mended_and_tried_again(tmp_path, policy, batch):
    """Also one with a dataclass, and with imports that its functions need."""
    file = tmp_path / "mine.py"
    text = (
        "from __future__ import annotations\nimport torch\nfrom dataclasses import dataclass\n"
        "from smolvla_reflow import register_loss_strategy\n"
        "@register_loss_strategy('mended')\n"
        "def mended(step):\n    return torch.full((), Weight().value) * step.losses(step.coupling())\n"
        "@dataclass\nclass Weight:\n    value: float = 0.0\n"
    )
    file.write_text(text + "raise RuntimeError('not yet')\n")
    with pytest.raises(ReflowError, match=r"cannot be run \(RuntimeError: not yet\)"):
        get_loss_strategy(f"{file}:mended")
    file.write_text(text)
    attach_plain(policy, strategy=f"{file}:mended")
    assert loss_of(policy, batch) == 0


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "mine", "strategy=.*mine.py:mine: there is no file"),
        ("def nine(step): pass", "mine", "has no loss 'mine'; known are: nine. Did you mean 'nine'?"),
        ("mine = 3", "mine", "has no loss 'mine'"),
        ("import sys; sys.exit(0)", "mine", "cannot be run .SystemExit: 0"),
        ("import nothing_of_that_name", "mine", "cannot be run .ModuleNotFoundError: No module named"),
        ("def mine(", "mine", "cannot be run .SyntaxError"),
    ],
)
def test_files_without_such_a_loss(tmp_path, text, name, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ReflowError, match=message):
        get_loss_strategy(f"{tmp_path / 'mine.py'}:{name}")


def test_the_command_trains_with_a_file_and_resumes_where_the_user_names_it_again(
    workshop, tmp_path, capsys, monkeypatch
):
    """A configuration alone makes nothing run: it may have come with somebody else's checkpoint."""
    monkeypatch.chdir(EXAMPLE.parent)
    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, steps=2, reflow__strategy="late_time_loss.py:late"))
    monkeypatch.chdir(tmp_path)
    resume = [f"--config_path={run}/checkpoints/last/pretrained_model/train_config.json", "--resume=true", "--steps=3"]
    named = f"--reflow.strategy={EXAMPLE}:late"
    line = refused(capsys, reflow_train_main, resume)
    assert line.endswith(f"would be run. If you trust that file, name it yourself: {named}")
    reflow_train_main([*resume, named])
    assert (run / "checkpoints/000003").is_dir()
    file = tmp_path / "flags.yaml"
    file.write_text(f"reflow:\n  strategy: {EXAMPLE}:late\n")
    line = refused(capsys, reflow_train_main, [*reflow_run(workshop, tmp_path / "other"), f"--config_path={file}"])
    assert "name it yourself" in line
    assert not (tmp_path / "other").exists()


TRAINED = {"reflow__train_state_proj": "true"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reflow__strategy": "distill", "reflow__time_sampling": "beta"}, "--reflow.time_sampling=beta has no effect"),
        ({"reflow__strategy": "standard", "reflow__pairs_path": "x"}, "--reflow.pairs_path=x has no effect"),
        ({"reflow__strategy": "standard", "reflow__solver": "rk4"}, "--reflow.solver=rk4 has no effect"),
        ({"reflow__augment_pairs": "true"}, "--reflow.augment_pairs=true has no effect without --reflow.pairs_path"),
        ({**TRAINED, "policy__train_state_proj": "false"}, "add --policy.train_state_proj=true, or leave it out"),
        (
            {**TRAINED, "reflow__strategy": "standard"},
            "has no effect with --reflow.strategy=standard, which trains state_proj",
        ),
        ({"reflow__strategy": EXAMPLE}, "--reflow.strategy=.*: add the name of the loss in that file, strategy="),
    ],
)
def test_flags_without_effect_are_refused(workshop, tmp_path, capsys, flags, message):
    """By their names; attach refuses the same ones (test_attach.py)."""
    assert re.search(message, refused(capsys, reflow_train_main, reflow_run(workshop, tmp_path / "run", **flags)))
    assert not (tmp_path / "run").exists()
