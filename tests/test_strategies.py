"""The registry: by decorator, by entry point, and what it refuses."""

import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from smolvla_reflow import (
    ReflowError,
    attach,
    available_loss_strategies,
    get_loss_strategy,
    register_loss_strategy,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "late_time_loss.py"


pytestmark = pytest.mark.usefixtures("registry")


def test_built_in_strategies():
    assert available_loss_strategies() == ("distill", "reflow", "standard")
    assert get_loss_strategy("reflow").whole_chunk
    assert not get_loss_strategy("standard").whole_chunk


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ReflowError, match="Unknown loss strategy 'standart'; known are: distill, reflow, standard. Did you mean"
    ):
        get_loss_strategy("standart")


def test_a_name_is_taken_once():
    with pytest.raises(ReflowError, match="'reflow' is already registered"):
        register_loss_strategy("reflow")(lambda *args: None)


def test_a_registered_loss_is_the_one_computed(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time

    @register_loss_strategy("at_noise")
    def at_noise(model, observation, actions, noise=None, time=None):
        return model.forward_standard(*observation, actions, noise, torch.ones(len(actions)))

    stock, _ = policy.train().forward(dict(batch), noise=noise, time=torch.ones(4))
    attach(policy, teacher, strategy="at_noise")
    assert torch.equal(policy.forward(dict(batch), noise=noise)[0], stock)


def test_example_is_short_and_trains(policy, teacher, batch):
    assert len(EXAMPLE.read_text().splitlines()) < 30
    runpy.run_path(str(EXAMPLE))
    attach(policy, teacher, strategy="late")
    loss, _ = policy.train().forward(dict(batch))
    loss.backward()
    assert torch.isfinite(loss)


def test_an_installed_package_offers_its_strategy_unimported(tmp_path):
    """A real distribution on the path, in a fresh process."""
    (tmp_path / "their_losses.py").write_text(
        "def doubled(model, observation, actions, noise=None, time=None):\n"
        "    return 2 * model.forward_standard(*observation, actions, noise, time)\n"
    )
    info = tmp_path / "their_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[smolvla_reflow.loss_strategies]\ndoubled = their_losses:doubled\n")
    code = """
        import sys
        from smolvla_reflow import available_loss_strategies, get_loss_strategy
        assert available_loss_strategies() == ("distill", "doubled", "reflow", "standard")
        assert "their_losses" not in sys.modules
        assert get_loss_strategy("doubled").function is sys.modules["their_losses"].doubled
    """
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(code),
        ],
        check=True,
    )
