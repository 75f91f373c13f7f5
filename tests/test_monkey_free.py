"""No class, function or module of LeRobot, accelerate or transformers is ever reassigned."""

import subprocess
import sys
import textwrap

from helpers import reflow_run


def test_every_attribute_is_the_object_it_was(workshop, tmp_path):
    """In a fresh process: record before importing this package; compare after attach, training and detach."""
    flags = reflow_run(workshop, tmp_path / "run", steps=2)
    code = f"""
        import inspect, sys
        import accelerate, torch, transformers
        from accelerate.utils import DistributedDataParallelKwargs
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
        from lerobot.scripts import lerobot_train

        ROOTS = ("lerobot", "accelerate", "transformers")

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

        from smolvla_reflow import attach, detach
        from smolvla_reflow.commands import train

        train.main({flags!r})
        policy = SmolVLAPolicy.from_pretrained({str(tmp_path / "run/checkpoints/last/pretrained_model")!r})
        with attach(policy):
            policy.save_pretrained({str(tmp_path / "saved")!r})
        after = record()

        # Lazily imported submodules appear, caches and counters tick; functions and classes must not change.
        def is_code(value):
            return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, (property, staticmethod))

        changed = [key for key, value in before.items() if is_code(value) and after.get(key) is not value]
        assert not changed, changed
        added = [k for k in after.keys() - before.keys() if len(k) == 3 and k[:2] in {{b[:2] for b in before if len(b) == 3}}]
        allowed = [k for k in added if k[2].startswith("__") or k[2].startswith("_abc")]
        assert added == allowed, set(added) - set(allowed)
        print("unchanged:", len(before))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "unchanged:" in result.stdout
