"""Several processes: DDP by the command, and FSDP as far as CPUs go. Gloo, no GPU."""

import re
import subprocess
import sys
import textwrap

import lerobot
import pytest
import torch
from helpers import reflow_run, same_tensors, saved_weights, torchrun
from packaging.version import Version
from safetensors.torch import load_file

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.pairs.store import Pairs

pytestmark = pytest.mark.slow
STEPS = 12  # two epochs of the workshop's 48 frames, by two processes with 4 each
COMMAND = ("-m", "smolvla_reflow.commands.train")


@pytest.fixture(scope="module")
def noting(tmp_path_factory):
    """A file with a loss, reflow, that keeps what each process draws in each step; and a function to read it."""
    folder = tmp_path_factory.mktemp("noting")
    text = f"""
        import os, torch
        from smolvla_reflow import Recipe

        kept, recorded, stock = [], [], Recipe.recorded_frames

        def noted(recipe, batch_size):
            recorded.append(stock(recipe, batch_size))
            return recorded[-1]

        Recipe.recorded_frames = noted

        def noting(step):
            coupling, times = step.coupling(), step.times()
            losses = step.losses(coupling, times=times)
            kept.append(dict(frames=step.frames, noise=coupling.noise, times=times))
            torch.save((kept, recorded), {str(folder)!r} + "/" + os.environ["RANK"] + ".pt")
            return losses
    """
    (folder / "noting.py").write_text(textwrap.dedent(text))

    def notes():
        """What each of the two processes drew, step by step, and its numbers of recorded rows."""
        return zip(*[torch.load(folder / f"{rank}.pt") for rank in (0, 1)], strict=True)

    return f"{folder}/noting.py:noting", notes


@pytest.fixture(scope="module")
def by_two(workshop, tmp_path_factory, noting):
    """A run of two processes: its folder, what it printed, and what each process drew."""
    strategy, notes = noting
    run = tmp_path_factory.mktemp("by_two") / "run"
    flags = reflow_run(workshop, run, steps=STEPS, batch_size=4, save_freq=STEPS // 2)
    flags += [f"--reflow.strategy={strategy}"]
    result = torchrun(*COMMAND, *flags)
    return run, result.stdout + result.stderr, next(notes()), flags


def drawn(steps, name):
    """All that a process drew under one name."""
    return torch.cat([step[name] for step in steps])


def test_two_processes_train_and_only_the_main_one_logs(workshop, by_two):
    run, output, _, _ = by_two
    assert len(re.findall(r"Effective batch size: 4 x 2 .*= 8", output)) == 1
    assert output.count("Reflow: teacher") == 1
    assert output.count("Teacher shares") == 1
    assert not same_tensors(saved_weights(workshop / "1rf"), saved_weights(run))


def test_two_processes_see_each_frame_once_in_an_epoch(by_two):
    """Whatever else they draw apart, they agree on the order of the frames."""
    by_process = [drawn(steps, "frames").chunk(2) for steps in by_two[2]]
    for epoch in (0, 1):
        seen = torch.cat([frames[epoch] for frames in by_process])
        assert sorted(seen.tolist()) == list(range(48))
    assert by_process[0][0].tolist() != by_process[0][1].tolist()  # shuffled anew


def test_two_processes_draw_apart(by_two, workshop, noting):
    """Noise, times, and which rows are recorded ones; also after resuming, where LeRobot gives all one state."""
    run, _, first, _ = by_two
    config = run / f"checkpoints/{STEPS // 2:06d}/pretrained_model/train_config.json"
    strategy, notes = noting
    flags = [f"--config_path={config}", "--resume=true", f"--steps={STEPS}", "--save_checkpoint=false"]
    torchrun(*COMMAND, *flags, f"--reflow.strategy={strategy}", "--reflow.real_data_ratio=0.3")
    resumed, recorded = notes()
    assert [len(steps) for steps in resumed] == [STEPS // 2] * 2
    for name in ("noise", "times"):
        values = [value for steps in (*first, resumed[1]) for value in drawn(steps, name).flatten().tolist()]
        repeated = len(values) - len(set(values))
        assert repeated <= sum(value in (0, 1) for value in values)  # half of the times are 1, some noise is zero
    assert not torch.equal(drawn(first[0], "times") == 1, drawn(first[1], "times") == 1)
    assert recorded[0] != recorded[1]


def test_two_processes_choose_pairs_apart(workshop, stored, tmp_path, noting):
    strategy, notes = noting
    flags = reflow_run(workshop, tmp_path / "run", steps=STEPS, batch_size=4, save_checkpoint="false")
    torchrun(*COMMAND, *flags, f"--reflow.strategy={strategy}", f"--reflow.pairs_path={stored}")
    pairs, chosen = Pairs(stored), []
    count = pairs.manifest.provenance.couplings_per_frame
    for process in next(notes()):
        drew = zip(drawn(process, "frames").tolist(), drawn(process, "noise"), strict=True)
        matches = ([torch.equal(pairs.lookup(frame, k).noise, noise) for k in range(count)] for frame, noise in drew)
        chosen.append([of.index(True) for of in matches])
    assert set(chosen[0]) == set(chosen[1]) == set(range(count))
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("one_prefix", [True, False], ids=["one prefix", "own prefix"])
def test_two_processes_compute_the_gradient_of_one(workshop, tmp_path, one_prefix):
    """With DDP each draws noise and time for its half, and the averaged gradient is one process's on both halves.

    Were both to draw the same, the gradient would be that of half as many noises. Sharded in place (FSDP2), the student
    has this gradient too, and the teacher stays complete.
    """
    script = tmp_path / "gradient.py"
    text = f"""
        import functools, os, sys, torch, torch.distributed as dist
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
        from safetensors.torch import load_file, save_file
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor
        from smolvla_reflow import Step, attach, detach
        from smolvla_reflow.attachment import attachment_of
        from smolvla_reflow.training.accelerator import hook

        how, folder, rank = sys.argv[1], {str(tmp_path)!r}, int(os.environ.get("RANK", 0))
        checkpoint = {str(workshop / "1rf" / LAST)!r}
        config = PreTrainedConfig.from_pretrained(checkpoint)
        config.train_expert_only = config.freeze_vision_encoder = {one_prefix}
        policy = SmolVLAPolicy.from_pretrained(checkpoint, config=config)
        torch.manual_seed(0)  # of all processes, as LeRobot does
        with torch.no_grad():  # a student that has moved away from its teacher
            for name, p in policy.named_parameters():
                if p.requires_grad and "state_proj" not in name:
                    p.add_(0.02 * torch.randn_like(p))
        batch = {{
            "observation.state": torch.randn(8, 2),
            "observation.images.top": torch.rand(8, 3, 32, 32),
            "observation.language.tokens": torch.randint(0, 200, (8, 4)),
            "observation.language.attention_mask": torch.ones(8, 4, dtype=torch.bool),
            "action": torch.randn(8, policy.config.chunk_size, 2),
        }}
        attach_to = functools.partial(attach, teacher=checkpoint, solver="midpoint")
        if how == "ddp":
            ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
            accelerator = hook(Accelerator(cpu=True, kwargs_handlers=[ddp]), on_policy=attach_to, on_loss=float)
            wrapped, _ = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=0.0))
            assert accelerator.num_processes == 2
            drawn, errors = [], Step.squared_errors
            Step.squared_errors = lambda step, line, t: drawn.append((line.noise, t)) or errors(step, line, t)
            wrapped.train()
            loss, _ = wrapped.forward({{name: value.chunk(2)[rank] for name, value in batch.items()}})
            accelerator.backward(loss)
            save_file(dict(zip(("noise", "time"), drawn[0])), f"{{folder}}/{{rank}}.safetensors")
        else:
            given = [load_file(f"{{folder}}/{{rank}}.safetensors") for rank in (0, 1)]
            fixed = {{name: torch.cat([one[name] for one in given]) for name in ("noise", "time")}}
            random = fixed["noise"][fixed["noise"] != 0]  # some noise is zero by the recipe
            assert len(random.unique()) == random.numel() > 0
            attach_to(policy)
            policy.train()
        assert (attachment_of(policy).sharing.why_not_shared is None) is {one_prefix}
        teacher = dict(policy.model.teacher.named_parameters())
        for name, p in policy.named_parameters():
            assert (teacher[name] is p) is not (p.requires_grad or "state_proj" in name), name
        if how == "fsdp2":
            dist.init_process_group("gloo")
            fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
            assert all(isinstance(p, DTensor) for p in policy.parameters())
            assert not any(isinstance(p, DTensor) for p in policy.model.teacher.parameters())
        if how != "ddp":
            loss, _ = policy(dict(batch), **fixed)
            loss.backward()
        gradient = {{name: p.grad for name, p in policy.named_parameters() if p.grad is not None}}
        gradient = {{name: g.full_tensor() if how == "fsdp2" else g.clone() for name, g in gradient.items()}}
        if rank == 0:
            save_file(gradient, f"{{folder}}/{{how}}.safetensors")
        detach(policy)
        if how != "alone":
            dist.barrier()  # a process that ends while the other still talks to it can abort
            dist.destroy_process_group()
    """
    script.write_text(textwrap.dedent(text))
    torchrun(str(script), "ddp")
    subprocess.run([sys.executable, str(script), "alone"], check=True, timeout=300)
    torchrun(str(script), "fsdp2")
    ddp, alone, fsdp2 = (load_file(tmp_path / f"{how}.safetensors") for how in ("ddp", "alone", "fsdp2"))
    assert ddp.keys() == alone.keys() == fsdp2.keys()
    assert max(g.abs().max() for g in alone.values()) > 1e-3
    for name, gradient in alone.items():
        torch.testing.assert_close(ddp[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fsdp2[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    not Version("0.6.0") <= Version(lerobot.__version__) < Version("0.6.2"), reason="LeRobot has no FSDP1"
)
def test_fsdp1_trains_what_ddp_trains(by_two, tmp_path):
    """Its student has the weights of DDP's, and its processes hold the teacher whole.

    accelerate offers FSDP1 on GPUs only, and PyTorch gathers its weights into a CPU's memory from GPUs only.
    """
    script = tmp_path / "fsdp1.py"
    text = f"""
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
    script.write_text(textwrap.dedent(text))
    _, _, _, flags = by_two
    kept = [flag for flag in flags if not flag.startswith(("--output_dir", "--save_freq"))]
    fsdp = {"VERSION": "1", "SHARDING_STRATEGY": "FULL_SHARD", "USE_ORIG_PARAMS": "true"}
    fsdp |= {"STATE_DICT_TYPE": "FULL_STATE_DICT", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    fsdp |= {"TRANSFORMER_CLS_TO_WRAP": "SmolVLMEncoderLayer"}
    environment = {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{name}": value for name, value in fsdp.items()}}
    torchrun(str(script), *kept, f"--output_dir={tmp_path}/run", "--save_checkpoint=false", env=environment)
    of_fsdp = load_file(tmp_path / "weights.safetensors")
    for name, value in saved_weights(by_two[0]).items():
        torch.testing.assert_close(of_fsdp[name], value, rtol=1e-4, atol=1e-6)
