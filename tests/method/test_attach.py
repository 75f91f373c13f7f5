"""attach and detach: what they add, what they leave alone, and what they refuse."""

import copy
import dataclasses

import pytest
import torch
from helpers import assert_close, assert_equal, gradients, loss_of
from oracle import inputs_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from smolvla_reflow import Recipe, ReflowError, attach, detach, is_attached
from smolvla_reflow.teacher import follow


def snapshot(policy):
    """All that each module holds, one level into its dictionaries: a hook or a submodule that stayed would show."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in policy.named_modules()
    }


def optimizer_step(policy, batch):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    loss_of(policy, batch).backward()
    optimizer.step()


def test_detach_leaves_no_residue(policy, teacher, batch):
    before, order = snapshot(policy), [list(vars(module)) for module in policy.modules()]
    attach(policy, teacher)
    assert is_attached(policy)
    optimizer_step(policy, batch)
    detach(policy.eval())
    assert not is_attached(policy)
    assert snapshot(policy) == before
    assert [list(vars(module)) for module in policy.modules()] == order


def test_context_manager_detaches_even_after_an_error(policy, teacher):
    before = snapshot(policy)
    with attach(policy, teacher) as attachment:
        assert attachment.policy is policy
        assert attachment.teacher is policy.model.teacher
        for field in dataclasses.fields(attachment):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(attachment, field.name, None)
    assert snapshot(policy) == before
    with pytest.raises(RuntimeError, match="^in the block$"), attach(policy, teacher):
        raise RuntimeError("in the block")
    assert snapshot(policy) == before


def test_training_mode_is_assignable(policy, teacher, batch, noise_and_time):
    attach(policy, teacher)
    reflow = loss_of(policy, batch, *noise_and_time)
    policy.model.training_mode = "standard"
    assert loss_of(policy, batch, *noise_and_time) != reflow
    for name, hint in (("reflo", ". Did you mean 'reflow'"), (None, "")):
        policy.model.training_mode = name
        with pytest.raises(ReflowError, match=f"'{name}'; known are: distill, reflow, standard{hint}"):
            loss_of(policy, batch)


def test_forward_reflow_is_the_reflow_loss_in_any_mode(policy, teacher, batch, noise_and_time):
    """The model alone does not know which dimensions are padded, so they weigh as much as the others."""
    attach(policy, teacher, strategy="distill", recipe=Recipe(padding_weight=1.0))
    torch.manual_seed(0)
    losses = policy.model.forward_reflow(*inputs_of(policy, batch), policy.prepare_action(batch), *noise_and_time)
    policy.model.training_mode = "reflow"
    torch.manual_seed(0)
    assert torch.equal(losses.mean(), loss_of(policy, batch, *noise_and_time))


# --- the teacher is invisible ---------------------------------------------------------------------------------


def test_teacher_is_in_nothing_that_is_saved_or_trained(policy, teacher, batch, tmp_path):
    def names():
        return [
            [n for n, _ in policy.named_parameters()],
            [n for n, _ in policy.named_modules()],
            [*policy.state_dict()],
        ]

    before = names()
    policy.save_pretrained(tmp_path / "before")
    attach(policy, teacher)
    assert names() == before
    teacher_owned = {id(p) for p in policy.model.teacher.parameters()} - {id(p) for p in policy.parameters()}
    assert teacher_owned
    optimizer = torch.optim.AdamW(policy.get_optim_params())
    assert not teacher_owned & {id(p) for group in optimizer.param_groups for p in group["params"]}

    policy.save_pretrained(tmp_path / "after")
    saved = [tmp_path / which / "model.safetensors" for which in ("before", "after")]
    assert_equal(*map(load_file, saved))
    assert saved[0].with_name("config.json").read_bytes() == saved[1].with_name("config.json").read_bytes()


@pytest.mark.parametrize("given", [True, False], ids=["another", "itself"])
def test_teacher_stays_frozen_and_in_eval_mode(policy, teacher, batch, given):
    """The student is in train mode already, and is trained."""
    attach(policy.train(), teacher if given else None)
    frozen = policy.model.teacher
    before, start = (copy.deepcopy(each.state_dict()) for each in (frozen, policy))
    for _ in range(3):
        optimizer_step(policy, batch)
        assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert_equal(frozen.state_dict(), before)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in policy.state_dict().items())
    if not given:
        assert_equal(before, start)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("assigned", ["another", None])
def test_assigning_a_teacher_is_refused_and_changes_nothing(policy, teacher, batch, mode, assigned):
    """PyTorch takes the assignment. The next forward pass undoes it before anything is computed, and so does detach."""
    before = snapshot(policy)
    attach(policy, teacher)
    frozen = policy.model.teacher
    policy.model.teacher = teacher if assigned else None
    with pytest.raises(ReflowError, match=r"Do not assign policy.model.teacher.*detach\(policy\)"):
        policy.train(mode).forward(dict(batch))
    assert policy.model.teacher is frozen
    assert "teacher" not in dict(policy.model.named_children())
    loss_of(policy, batch)
    policy.model.teacher = teacher if assigned else None
    detach(policy.eval())
    assert snapshot(policy) == before


# --- everyday operations on an attached policy ----------------------------------------------------------------


def test_deepcopy_is_an_independent_attached_policy(policy, teacher, batch, noise_and_time):
    attach(policy, teacher, solver="midpoint")
    twin = copy.deepcopy(policy)
    expected = loss_of(policy, batch, *noise_and_time)
    optimizer_step(policy, batch)
    assert torch.equal(loss_of(twin, batch, *noise_and_time), expected)
    detach(policy)
    assert is_attached(twin)
    assert torch.equal(loss_of(twin, batch, *noise_and_time), expected)
    detach(twin)


def test_to_moves_policy_and_teacher_follows(policy, teacher):
    """Moving the student leaves the teacher's own parameters where they are, until the next coupling asks for them."""
    attach(policy, teacher)
    assert policy.to("cpu") is policy
    policy.to("meta")
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    frozen = policy.model.teacher
    assert frozen.model.action_in_proj.weight.device.type == "cpu"
    follow(frozen, torch.device("meta"))  # the first call of each coupling; SmolVLA itself computes nothing on "meta"
    assert {tensor.device.type for tensor in (*frozen.parameters(), *frozen.buffers())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teacher_follows_to_the_gpu(policy, teacher, batch):
    attach(policy, teacher)
    policy.to("cuda").config.device = "cuda"
    loss_of(policy, {name: tensor.to("cuda") for name, tensor in batch.items()}).backward()
    assert {p.device.type for p in policy.model.teacher.parameters()} == {"cuda"}


def test_sampling_is_untouched(policy, teacher, batch, noise):
    """By no solver of the teacher either."""
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    attach(policy, teacher, solver="rk4")
    policy.train()
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise), expected)
    policy.reset()
    assert policy.select_action(dict(batch)).shape == (4, 2)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_policy(make_policy, policy, teacher, batch, noise_and_time, monkeypatch, backend):
    """`compile_model=true` puts a compiled forward on the instance, which attach keeps and calls. attach also compiles
    the `denoise_step` that student and teacher share, and the sampler that encodes the prefix, in the config's mode."""
    compile_, calls, used = torch.compile, [], set()

    def compile_quickly(function, mode=None):
        """Capture the graph as always, if at all, and leave out generating machine code for it, minutes of work."""
        calls.append((function, mode))
        quick = compile_(function, backend=backend) if backend else function
        return lambda *args, **kwargs: used.add(function.__name__) or quick(*args, **kwargs)

    with attach(policy, teacher, solver="midpoint"):
        expected = loss_of(policy, batch, *noise_and_time)
        wanted = gradients(policy, expected)
    monkeypatch.setattr(torch, "compile", compile_quickly)
    compiled = make_policy(seed=0, compile_model=True, compile_mode="reduce-overhead")
    compiled.load_state_dict(policy.state_dict())
    before = snapshot(compiled)
    calls.clear()
    attach(compiled, teacher, solver="midpoint")
    flow = type(policy.model)
    assert calls == [(flow.denoise_step, "reduce-overhead"), (flow.sample_actions, "reduce-overhead")]
    assert compiled.model.forward_standard is before["model"]["forward"]
    assert "sample_actions" not in vars(compiled.model.teacher.model)
    loss = loss_of(compiled, batch, *noise_and_time)
    assert used == {"denoise_step", "sample_actions"}
    assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    assert_close(gradients(compiled, loss), wanted, rtol=1e-2, atol=1e-4)
    detach(compiled.eval())
    assert snapshot(compiled) == before


def test_peft_policy(make_policy, policy, teacher, batch, noise_and_time, tmp_path):
    """The teacher of a LoRA student is its base model, without the adapter."""
    teacher.save_pretrained(tmp_path)
    policy.load_state_dict(teacher.state_dict())
    with attach(policy, tmp_path, solver="midpoint"):
        expected = loss_of(policy, batch, *noise_and_time)

    student = make_policy(seed=0)
    student.load_state_dict(teacher.state_dict())
    wrapped = get_peft_model(student, LoraConfig(target_modules=r".*lm_expert\..*\.q_proj", init_lora_weights=False))
    before = snapshot(wrapped.eval())
    attach(wrapped, tmp_path, solver="midpoint")
    assert is_attached(wrapped)
    assert is_attached(student)
    # All but the adapter is frozen in the student, and the teacher has no adapter: nothing is held twice.
    assert {id(p) for p in student.model.teacher.parameters()} < {id(p) for p in wrapped.parameters()}
    assert not any("lora" in name for name in student.model.teacher.state_dict())
    loss = loss_of(wrapped, batch, *noise_and_time)
    assert loss != expected  # the adapter moves the student, not the teacher
    with wrapped.disable_adapter():
        torch.testing.assert_close(loss_of(wrapped, batch, *noise_and_time), expected)
    assert {n for n, _ in wrapped.named_parameters() if "lora_B" in n} <= gradients(wrapped, loss).keys()
    detach(wrapped.eval())
    assert snapshot(wrapped) == before


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "nope"}, "Unknown loss strategy 'nope'; known are: distill, reflow, standard"),
        ({"strategy": None}, "Unknown loss strategy 'None'"),
        ({"strategy": 3}, "Unknown loss strategy '3'"),
        ({"pairs": 5}, "pairs is a int; give a folder of pairs, or a function that couples"),
        ({"recipe": {"couplings_per_frame": 2}}, "recipe is a dict; give a Recipe"),
        (
            {"strategy": "distill", "recipe": Recipe(time_sampling="beta")},
            "time_sampling=beta has no effect with strategy=distill; leave it out",
        ),
        ({"strategy": "standard", "recipe": Recipe(time_sampling="beta")}, "no effect with strategy=standard"),
        ({"strategy": "standard", "recipe": Recipe(real_data_ratio=0.5)}, "real_data_ratio=0.5 has no effect"),
        ({"strategy": "standard", "solver": "rk4"}, "solver has no effect with strategy=standard, which asks for no"),
        ({"strategy": "standard", "pairs": print}, "pairs has no effect with strategy=standard, which asks for no"),
    ],
)
def test_arguments_are_refused_before_anything_happens(policy, arguments, message):
    before = snapshot(policy)
    with pytest.raises(ReflowError, match=message):
        attach(policy, **arguments)
    assert snapshot(policy) == before


def test_attaching_twice_and_detaching_nothing_are_refused(policy):
    with pytest.raises(ReflowError, match="nothing to detach"):
        detach(policy)
    attach(policy)
    with pytest.raises(ReflowError, match=r"already has a teacher attached; call detach\(policy\)"):
        attach(policy)


def test_only_smolvla_can_be_attached(policy):
    with pytest.raises(ReflowError, match="Only a SmolVLAPolicy can be attached, this is a Linear"):
        attach(torch.nn.Linear(1, 1))
    with pytest.raises(ReflowError, match="this is a DataParallel; attach before wrapping it"):
        attach(torch.nn.DataParallel(policy))


def test_detach_under_a_later_wrapper_is_refused(policy, teacher):
    attach(policy, teacher)
    bound = policy.forward
    policy.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    with pytest.raises(ReflowError, match="wrapped after attach; unwrap it first"):
        detach(policy)
    policy.forward = bound
    detach(policy)
