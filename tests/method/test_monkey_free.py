"""No class, function or module of another package is ever reassigned, also during a training step."""

import subprocess
import sys
import textwrap

import pytest
from helpers import reflow_run


@pytest.mark.slow
def test_every_attribute_is_the_object_it_was(workshop, tmp_path):
    """In a fresh process: record before importing this package; compare in a training step, and after detach."""
    flags = reflow_run(workshop, tmp_path / "run", steps=2, reflow__strategy="looking", reflow__num_steps=2)
    code = f"""
        import inspect, sys, types
        import accelerate, draccus, gymnasium, safetensors.torch, torch, torchdiffeq, transformers
        from accelerate.utils import DistributedDataParallelKwargs
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
        from lerobot.scripts import lerobot_train

        ROOTS = ("lerobot", "accelerate", "transformers", "torch", "torchdiffeq", "draccus", "safetensors", "gymnasium")

        def record():
            seen = {{}}
            for module_name, module in list(sys.modules.items()):
                if module is None or module_name.partition(".")[0] not in ROOTS:
                    continue
                for name, value in list(vars(module).items()):
                    seen[module_name, name] = value
                    if inspect.isclass(value) and value.__module__.partition(".")[0] in ROOTS:
                        for attribute, member in list(vars(value).items()):
                            seen[value.__module__, value.__qualname__, attribute] = member
            return seen

        before = record()
        assert len(before) > 5000

        from smolvla_reflow import attach, detach, register_loss_strategy
        from smolvla_reflow.commands import train

        # Lazily imported submodules appear, caches and counters tick; functions, classes and modules must not change.
        CODE = (type, types.ModuleType, property, staticmethod)

        def changed():
            after = record()
            return [
                key
                for key, value in before.items()
                if (inspect.isroutine(value) or isinstance(value, CODE)) and after.get(key) is not value
            ]

        looks = []

        @register_loss_strategy("looking")
        def looking(step):
            # Where student and teacher are busy: while the prefix is encoded, and in each velocity.
            for model in (step.model, step.source.policy.model):
                for name in ("embed_prefix", "embed_suffix"):
                    vars(model)[name] = lambda *given, model=model, name=name, **named: (
                        looks.append(changed()) or getattr(type(model), name)(model, *given, **named)
                    )
            return step.losses(step.coupling())

        train.main({flags!r})
        assert looks == [[]] * 2 * (1 + 4 + 1), looks  # two steps, each with four velocities of the teacher
        policy = SmolVLAPolicy.from_pretrained({str(tmp_path / "run/checkpoints/last/pretrained_model")!r})
        with attach(policy):
            policy.save_pretrained({str(tmp_path / "saved")!r})
        after = record()

        assert not changed(), changed()
        added = [k for k in after.keys() - before.keys() if len(k) == 3 and k[:2] in {{b[:2] for b in before if len(b) == 3}}]
        # To torch's own classes transformers and torch's learning rate schedules add.
        allowed = [k for k in added if k[2].startswith(("__", "_abc")) or k[0].startswith("torch.")]
        assert added == allowed, set(added) - set(allowed)
        print("unchanged:", len(before))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "unchanged:" in result.stdout
