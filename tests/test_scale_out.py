"""Several processes: DDP by the command, and FSDP2 as far as CPUs go. Gloo, no GPU."""

import re
import subprocess
import sys
import textwrap

import torch
from helpers import reflow_run, torchrun
from safetensors.torch import load_file

from smolvla_reflow.demo.flags import LAST


def test_two_processes_train_and_only_the_main_one_logs(workshop, tmp_path):
    flags = reflow_run(workshop, tmp_path / "run", steps=2, batch_size=4)
    result = torchrun("-m", "smolvla_reflow.commands.train", *flags)
    output = result.stdout + result.stderr
    assert len(re.findall(r"Effective batch size: 4 x 2 .*= 8", output)) == 1
    assert output.count("Reflow: teacher") == 1
    assert output.count("Teacher shares") == 1
    before, after = (load_file(run / LAST / "model.safetensors") for run in (workshop / "1rf", tmp_path / "run"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_two_processes_compute_the_gradient_of_one(workshop, tmp_path):
    """Equal global batch, noise and time: the averaged gradient of two halves is the gradient of the whole."""
    script = tmp_path / "gradient.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import functools, sys, torch
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
            from safetensors.torch import save_file
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
            from smolvla_reflow import attach
            from smolvla_reflow.training.accelerator import hook

            checkpoint = {str(workshop / "1rf" / LAST)!r}
            policy = SmolVLAPolicy.from_pretrained(checkpoint)
            torch.manual_seed(0)
            with torch.no_grad():  # a student that has moved away from its teacher
                for p in policy.parameters():
                    p.add_(0.02 * torch.randn_like(p) * p.requires_grad)
            n, chunk, width = 8, policy.config.chunk_size, policy.config.max_action_dim
            batch = {{
                "observation.state": torch.randn(n, 2),
                "observation.images.top": torch.rand(n, 3, 32, 32),
                "observation.language.tokens": torch.randint(0, 200, (n, 4)),
                "observation.language.attention_mask": torch.ones(n, 4, dtype=torch.bool),
                "action": torch.randn(n, chunk, 2),
            }}
            noise, time = torch.randn(n, chunk, width), torch.rand(n)
            attach_to = functools.partial(attach, teacher=checkpoint)
            ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
            accelerator = hook(Accelerator(cpu=True, kwargs_handlers=[ddp]), on_policy=attach_to, on_loss=float)
            optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
            wrapped, optimizer = accelerator.prepare(policy, optimizer)
            share = slice(accelerator.process_index, None, accelerator.num_processes)
            wrapped.train()
            loss, _ = wrapped.forward({{k: v[share] for k, v in batch.items()}}, noise=noise[share], time=time[share])
            accelerator.backward(loss)
            teacher = dict(policy.model.teacher.named_parameters())
            for name, p in policy.named_parameters():
                assert (teacher[name] is p) is not p.requires_grad, name
            if accelerator.is_main_process:
                assert accelerator.num_processes == int(sys.argv[1])
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


def test_fsdp2_computes_the_gradient_of_one(workshop, tmp_path):
    """An attached policy sharded in place: the student's parameters are, the teacher's stay whole."""
    script = tmp_path / "sharded.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch, torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import DTensor
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
            from smolvla_reflow import attach, detach

            dist.init_process_group("gloo")
            checkpoint = {str(workshop / "1rf" / LAST)!r}
            policy = SmolVLAPolicy.from_pretrained(checkpoint)
            torch.manual_seed(0)
            with torch.no_grad():  # a student that has moved away from its teacher
                for p in policy.parameters():
                    p.add_(0.02 * torch.randn_like(p) * p.requires_grad)
            n, chunk, width = 4, policy.config.chunk_size, policy.config.max_action_dim
            batch = {{
                "observation.state": torch.randn(n, 2),
                "observation.images.top": torch.rand(n, 3, 32, 32),
                "observation.language.tokens": torch.randint(0, 200, (n, 4)),
                "observation.language.attention_mask": torch.ones(n, 4, dtype=torch.bool),
                "action": torch.randn(n, chunk, 2),
            }}
            fixed = {{"noise": torch.randn(n, chunk, width), "time": torch.rand(n)}}
            attach(policy, checkpoint)
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
