"""Several processes: DDP by the command, and FSDP as far as CPUs go. Gloo, no GPU."""

import re
import subprocess
import sys
import textwrap

import lerobot
import pytest
import torch
from helpers import reflow_run, torchrun
from packaging.version import Version
from safetensors.torch import load_file

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.pairs.store import Pairs

STEPS = 12  # two epochs of the workshop's 48 frames, by two processes with 4 each


@pytest.fixture(scope="module")
def noting(tmp_path_factory):
    """A file with a loss, reflow, that keeps what each process draws in each step; and a function to read it."""
    folder = tmp_path_factory.mktemp("noting")
    (folder / "noting.py").write_text(
        textwrap.dedent(
            f"""
            import os, torch

            kept = []

            def noting(step):
                coupling, times = step.coupling(), step.times()
                losses = step.losses(coupling, times=times)
                recorded = losses.recorded.clone() if torch.is_tensor(losses.recorded) else losses.recorded
                kept.append(dict(frames=step.frames, noise=coupling.noise, times=times, recorded=recorded))
                torch.save(kept, {str(folder)!r} + "/" + os.environ["RANK"] + ".pt")
                return losses
            """
        )
    )

    def notes():
        """By process, then by step."""
        return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

    return f"{folder}/noting.py:noting", notes


@pytest.fixture(scope="module")
def by_two(workshop, tmp_path_factory, noting):
    """A run of two processes: its folder, what it printed, and what each process drew."""
    strategy, notes = noting
    run = tmp_path_factory.mktemp("by_two") / "run"
    flags = reflow_run(workshop, run, steps=STEPS, batch_size=4, save_freq=STEPS // 2)
    flags += [f"--reflow.strategy={strategy}", "--reflow.real_data_ratio=0.3"]
    result = torchrun("-m", "smolvla_reflow.commands.train", *flags)
    return run, result.stdout + result.stderr, notes(), flags


def drawn(notes, name):
    """All that a process drew under one name."""
    return torch.cat([note[name] for note in notes])


def test_two_processes_train_and_only_the_main_one_logs(workshop, by_two):
    run, output, _, _ = by_two
    assert len(re.findall(r"Effective batch size: 4 x 2 .*= 8", output)) == 1
    assert output.count("Reflow: teacher") == 1
    assert output.count("Teacher shares") == 1
    before, after = (load_file(folder / LAST / "model.safetensors") for folder in (workshop / "1rf", run))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_two_processes_see_each_frame_once_in_an_epoch(by_two):
    """Whatever else they draw apart, they agree on the order of the frames."""
    by_process = [drawn(notes, "frames").chunk(2) for notes in by_two[2]]
    for epoch in (0, 1):
        seen = torch.cat([frames[epoch] for frames in by_process])
        assert sorted(seen.tolist()) == list(range(48))
    assert by_process[0][0].tolist() != by_process[0][1].tolist()  # shuffled anew


def test_two_processes_draw_apart(by_two, workshop, noting):
    """Noise, times, and which rows are recorded ones; also after resuming, where LeRobot gives all one state."""
    run, _, first, _ = by_two
    config = run / f"checkpoints/{STEPS // 2:06d}/pretrained_model/train_config.json"
    strategy, notes = noting
    torchrun(
        *("-m", "smolvla_reflow.commands.train", f"--config_path={config}", "--resume=true"),
        *(f"--reflow.strategy={strategy}", f"--steps={STEPS}", "--save_checkpoint=false"),
    )
    resumed = notes()
    assert [len(notes) for notes in resumed] == [STEPS // 2] * 2
    for name in ("noise", "times"):
        values = [value for notes in (*first, resumed[1]) for value in drawn(notes, name).flatten().tolist()]
        repeated = len(values) - len(set(values))
        assert repeated <= sum(value == 1 for value in values)  # half of the times are 1
    for main, other in (first, resumed):
        assert [note["recorded"].sum() for note in main] != [note["recorded"].sum() for note in other]
        assert not torch.equal(drawn(main, "times") == 1, drawn(other, "times") == 1)


def test_two_processes_choose_pairs_apart(workshop, stored, tmp_path, noting):
    strategy, notes = noting
    flags = reflow_run(workshop, tmp_path / "run", steps=STEPS, batch_size=4, save_checkpoint="false")
    torchrun(
        *("-m", "smolvla_reflow.commands.train", *flags),
        *(f"--reflow.strategy={strategy}", f"--reflow.pairs_path={stored}"),
    )
    pairs, chosen = Pairs(stored), []
    for process in notes():
        frames, noises = drawn(process, "frames").tolist(), drawn(process, "noise")
        count = pairs.manifest.provenance.couplings_per_frame
        which = [
            [torch.equal(pairs.lookup(f, k).noise, noise) for k in range(count)].index(True)
            for f, noise in zip(frames, noises, strict=True)
        ]
        chosen.append(which)
    assert set(chosen[0]) == set(chosen[1]) == set(range(count))
    assert chosen[0] != chosen[1]


PREFIXES = pytest.mark.parametrize("one_prefix", [True, False], ids=["one prefix", "own prefix"])


@PREFIXES
def test_two_processes_compute_the_gradient_of_one(workshop, tmp_path, one_prefix):
    """Each draws noise and time for its half; the averaged gradient is one process's on both halves with all of these.

    Were both to draw the same, the gradient would be that of half as many noises.
    """
    script = tmp_path / "gradient.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import functools, sys, torch
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
            from safetensors.torch import save_file
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
            from smolvla_reflow import Step, attach
            from smolvla_reflow.attachment import attachment_of
            from smolvla_reflow.training.accelerator import hook

            checkpoint, folder = {str(workshop / "1rf" / LAST)!r}, {str(tmp_path)!r}
            config = PreTrainedConfig.from_pretrained(checkpoint)
            config.train_expert_only = config.freeze_vision_encoder = {one_prefix}
            policy = SmolVLAPolicy.from_pretrained(checkpoint, config=config)
            torch.manual_seed(0)  # of all processes, as LeRobot does
            with torch.no_grad():  # a student that has moved away from its teacher
                for name, p in policy.named_parameters():
                    if p.requires_grad and "state_proj" not in name:
                        p.add_(0.02 * torch.randn_like(p))
            n, chunk, width = 8, policy.config.chunk_size, policy.config.max_action_dim
            batch = {{
                "observation.state": torch.randn(n, 2),
                "observation.images.top": torch.rand(n, 3, 32, 32),
                "observation.language.tokens": torch.randint(0, 200, (n, 4)),
                "observation.language.attention_mask": torch.ones(n, 4, dtype=torch.bool),
                "action": torch.randn(n, chunk, 2),
            }}
            attach_to = functools.partial(attach, teacher=checkpoint, solver="midpoint")
            ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
            accelerator = hook(Accelerator(cpu=True, kwargs_handlers=[ddp]), on_policy=attach_to, on_loss=float)
            optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
            wrapped, optimizer = accelerator.prepare(policy, optimizer)
            assert (attachment_of(policy).sharing.why_not_shared is None) is {one_prefix}
            assert accelerator.num_processes == int(sys.argv[1])
            drawn, errors = [], Step.squared_errors
            Step.squared_errors = lambda step, line, t: drawn.append((line.noise, t)) or errors(step, line, t)
            wrapped.train()
            if accelerator.num_processes == 2:
                half = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
                loss, _ = wrapped.forward({{k: v[half] for k, v in batch.items()}})
                ((noise, time),) = drawn
                save_file({{"noise": noise, "time": time}}, f"{{folder}}/{{accelerator.process_index}}.safetensors")
            else:
                from safetensors.torch import load_file
                given = [load_file(f"{{folder}}/{{rank}}.safetensors") for rank in (0, 1)]
                noise, time = (torch.cat([one[name] for one in given]) for name in ("noise", "time"))
                assert len(noise.flatten().unique()) == noise.numel()
                loss, _ = wrapped.forward(batch, noise=noise, time=time)
            accelerator.backward(loss)
            teacher = dict(policy.model.teacher.named_parameters())
            for name, p in policy.named_parameters():
                assert (teacher[name] is p) is not (p.requires_grad or "state_proj" in name), name
            if accelerator.is_main_process:
                grads = {{n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}}
                save_file(grads, sys.argv[2])
            accelerator.end_training()
            """
        )
    )
    torchrun(str(script), "2", str(tmp_path / "two.safetensors"))
    subprocess.run([sys.executable, str(script), "1", str(tmp_path / "one.safetensors")], check=True)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(g.abs().max() for g in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    not Version("0.6.0") <= Version(lerobot.__version__) < Version("0.6.2"), reason="LeRobot has no FSDP1"
)
def test_fsdp1_trains_what_ddp_trains(by_two, tmp_path):
    """Its student has the weights of DDP's, and its processes hold the teacher whole.

    accelerate offers FSDP1 on GPUs only, and PyTorch gathers its weights into a CPU's memory from GPUs only.
    """
    script = tmp_path / "fsdp1.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            from accelerate import Accelerator, PartialState
            from accelerate.state import AcceleratorState
            from accelerate.utils import DistributedType
            from safetensors.torch import save_file
            from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, StateDictType
            from smolvla_reflow.commands.train import main

            stock = AcceleratorState.__init__

            def on_cpus(self, *args, fsdp_plugin=None, **kwargs):
                stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
                if fsdp_plugin is not None:
                    sharded = dict(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
                    PartialState._shared_state.update(sharded)
                    vars(self).update(sharded, fsdp_plugin=fsdp_plugin)

            def gather(self, model):
                policy = model.module
                with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                    weights = {{name: value.clone() for name, value in model.state_dict().items()}}
                assert isinstance(model, FSDP)
                assert sum(p.numel() for p in model.parameters()) < sum(w.numel() for w in weights.values())
                assert all(p.numel() for p in policy.model.teacher.parameters())
                if self.is_main_process:
                    save_file(weights, {str(tmp_path / "weights.safetensors")!r})
                return weights

            AcceleratorState.__init__, Accelerator.get_state_dict = on_cpus, gather
            main(sys.argv[1:])
            """
        )
    )
    _, _, _, flags = by_two
    kept = [flag for flag in flags if not flag.startswith(("--output_dir", "--save_freq"))]
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "1",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "SmolVLMEncoderLayer",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    torchrun(str(script), *kept, f"--output_dir={tmp_path}/run", "--save_checkpoint=false", env=environment)
    of_ddp, of_fsdp = load_file(by_two[0] / LAST / "model.safetensors"), load_file(tmp_path / "weights.safetensors")
    for name, value in of_ddp.items():
        torch.testing.assert_close(of_fsdp[name], value, rtol=1e-4, atol=1e-6)


@PREFIXES
def test_fsdp2_computes_the_gradient_of_one(workshop, tmp_path, one_prefix):
    """An attached policy sharded in place: the student's parameters are, the teacher's stay whole."""
    script = tmp_path / "sharded.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch, torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import DTensor
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
            from smolvla_reflow import attach, detach

            dist.init_process_group("gloo")
            checkpoint = {str(workshop / "1rf" / LAST)!r}
            config = PreTrainedConfig.from_pretrained(checkpoint)
            config.train_expert_only = config.freeze_vision_encoder = {one_prefix}
            policy = SmolVLAPolicy.from_pretrained(checkpoint, config=config)
            torch.manual_seed(0)
            with torch.no_grad():  # a student that has moved away from its teacher
                for name, p in policy.named_parameters():
                    if p.requires_grad and "state_proj" not in name:
                        p.add_(0.02 * torch.randn_like(p))
            n, chunk, width = 4, policy.config.chunk_size, policy.config.max_action_dim
            batch = {{
                "observation.state": torch.randn(n, 2),
                "observation.images.top": torch.rand(n, 3, 32, 32),
                "observation.language.tokens": torch.randint(0, 200, (n, 4)),
                "observation.language.attention_mask": torch.ones(n, 4, dtype=torch.bool),
                "action": torch.randn(n, chunk, 2),
            }}
            fixed = {{"noise": torch.randn(n, chunk, width), "time": torch.rand(n)}}
            assert (attach(policy, checkpoint, solver="midpoint").sharing.why_not_shared is None) is {one_prefix}
            policy.train()
            loss, _ = policy.forward(dict(batch), **fixed)
            loss.backward()
            whole = {{name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}}
            policy.zero_grad()
            fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
            sharded_loss, _ = policy(dict(batch), **fixed)
            sharded_loss.backward()
            torch.testing.assert_close(sharded_loss, loss)
            sharded = {{name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}}
            assert sharded.keys() == whole.keys()
            assert max(g.abs().max() for g in whole.values()) > 1e-3
            for name in whole:
                torch.testing.assert_close(sharded[name], whole[name], rtol=1e-4, atol=1e-6)
            assert all(isinstance(p, DTensor) for p in policy.parameters())
            assert not any(isinstance(p, DTensor) for p in policy.model.teacher.parameters())
            detach(policy)
            dist.destroy_process_group()
            """
        )
    )
    torchrun(str(script))
