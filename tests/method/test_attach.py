"""attach and detach: what they add, what they leave alone, and what they refuse."""

import copy
import dataclasses
import functools
import io

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file

from smolvla_reflow import Recipe, ReflowError, attach, detach, is_attached
from smolvla_reflow.teacher import follow


def snapshot(policy):
    """What every module holds, one level into its dictionaries: a hook or a submodule that stayed would show."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in policy.named_modules()
    }


def optimizer_step(policy, batch, lr=1e-2):
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    policy.forward(dict(batch))[0].backward()
    optimizer.step()


def test_detach_leaves_no_residue(policy, teacher, batch):
    before, order = snapshot(policy), [list(vars(module)) for module in policy.modules()]
    attach(policy, teacher)
    assert is_attached(policy)
    optimizer_step(policy, batch)
    policy.eval()
    detach(policy)
    assert not is_attached(policy)
    assert snapshot(policy) == before
    assert [list(vars(module)) for module in policy.modules()] == order


def test_attached_model_has_the_named_members(policy, teacher):
    stock_forward = policy.model.forward
    attach(policy, teacher)
    model = policy.model
    assert model.training_mode == "reflow"
    assert model.forward_standard == stock_forward
    assert isinstance(model.teacher, SmolVLAPolicy)
    assert callable(model.forward_reflow)
    assert callable(model.generate_reflow_target)


def test_context_manager_detaches_even_after_an_error(policy, teacher):
    before = snapshot(policy)
    with attach(policy, teacher) as attachment:
        assert attachment.policy is policy
        assert attachment.teacher is policy.model.teacher
    assert snapshot(policy) == before
    with pytest.raises(RuntimeError, match="^in the block$"), attach(policy, teacher):
        raise RuntimeError("in the block")
    assert snapshot(policy) == before


def test_an_attachment_is_frozen(policy, teacher):
    attachment = attach(policy, teacher)
    for field in dataclasses.fields(attachment):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(attachment, field.name, None)


def test_training_mode_is_assignable(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    attach(policy, teacher)
    policy.train()
    reflow = policy.forward(dict(batch), noise=noise, time=time)[0]
    policy.model.training_mode = "standard"
    standard = policy.forward(dict(batch), noise=noise, time=time)[0]
    assert reflow != standard
    policy.model.training_mode = "reflo"
    with pytest.raises(ReflowError, match="known are: distill, reflow, standard. Did you mean 'reflow'"):
        policy.forward(dict(batch))


def test_forward_reflow_is_the_reflow_loss_in_any_mode(policy, teacher, batch, noise_and_time):
    """The model alone does not know which dimensions are padded, so these weigh as much as the others here."""
    noise, time = noise_and_time
    attach(policy, teacher, strategy="distill", recipe=Recipe(padding_weight=1.0))
    inputs = (
        *policy.prepare_images(batch),
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
    )
    torch.manual_seed(0)
    losses = policy.model.forward_reflow(*inputs, policy.prepare_action(batch), noise, time)
    policy.model.training_mode = "reflow"
    torch.manual_seed(0)
    expected, _ = policy.train().forward(dict(batch), noise=noise, time=time)
    assert torch.equal(losses.mean(), expected)


def test_teacher_none_is_a_frozen_snapshot(policy, batch):
    attach(policy)
    before = {name: p.clone() for name, p in policy.model.teacher.named_parameters()}
    start = {name: p.clone() for name, p in policy.named_parameters()}
    optimizer_step(policy, batch)
    assert any(not torch.equal(p, start[name]) for name, p in policy.named_parameters())
    for name, parameter in policy.model.teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter, start[name])


# --- the teacher is invisible ---------------------------------------------------------------------------------


def test_teacher_is_in_nothing_that_is_saved_or_trained(policy, teacher, batch, tmp_path):
    names = {kind: [n for n, _ in getattr(policy, kind)()] for kind in ("named_parameters", "named_modules")}
    keys = list(policy.state_dict())
    policy.save_pretrained(tmp_path / "before")
    attach(policy, teacher)
    assert {kind: [n for n, _ in getattr(policy, kind)()] for kind in names} == names
    assert list(policy.state_dict()) == keys
    teacher_owned = {id(p) for p in policy.model.teacher.parameters()} - {id(p) for p in policy.parameters()}
    assert teacher_owned
    optimizer = torch.optim.AdamW(policy.get_optim_params())
    assert not teacher_owned & {id(p) for group in optimizer.param_groups for p in group["params"]}

    policy.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (tmp_path / "before/config.json").read_bytes() == (tmp_path / "after/config.json").read_bytes()


def test_teacher_stays_frozen_and_in_eval_mode(policy, teacher, batch):
    """Also of a student that is in train mode already."""
    attach(policy.train(), teacher)
    frozen = policy.model.teacher
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    for _ in range(3):
        optimizer_step(policy, batch)
        assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("assigned", ["another", None])
def test_assigning_a_teacher_is_refused_and_changes_nothing(policy, teacher, batch, mode, assigned):
    """PyTorch takes the assignment; the next forward pass undoes it before anything is computed."""
    attach(policy, teacher)
    frozen = policy.model.teacher
    policy.model.teacher = teacher if assigned else None
    with pytest.raises(ReflowError, match=r"Do not assign policy.model.teacher.*detach\(policy\)"):
        policy.train(mode).forward(dict(batch))
    assert policy.model.teacher is frozen
    assert "teacher" not in dict(policy.model.named_children())
    policy.train().forward(dict(batch))


def test_detach_undoes_an_assigned_teacher(policy, teacher):
    before, names = snapshot(policy), list(policy.state_dict())
    attach(policy, teacher)
    policy.model.teacher = teacher
    detach(policy)
    assert snapshot(policy) == before
    assert list(policy.state_dict()) == names


def test_what_has_no_effect_is_refused(policy, teacher):
    before = snapshot(policy)
    for strategy in ("distill", "standard"):
        with pytest.raises(ReflowError, match=f"time_sampling=beta has no effect with strategy={strategy}"):
            attach(policy, teacher, strategy=strategy, recipe=Recipe(time_sampling="beta"))
    with pytest.raises(ReflowError, match="real_data_ratio=0.5 has no effect with strategy=standard; leave it out"):
        attach(policy, teacher, strategy="standard", recipe=Recipe(real_data_ratio=0.5))
    for name, value in (("solver", "rk4"), ("pairs", lambda observation, **_: None)):
        with pytest.raises(ReflowError, match=f"{name} has no effect with strategy=standard, which asks for no"):
            attach(policy, strategy="standard", **{name: value})
    assert snapshot(policy) == before


# --- everyday operations on an attached policy ----------------------------------------------------------------


def test_deepcopy_is_an_independent_attached_policy(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    attach(policy, teacher, solver="midpoint")
    twin = copy.deepcopy(policy)
    expected = policy.train().forward(dict(batch), noise=noise, time=time)[0]
    optimizer_step(policy, batch)
    assert torch.equal(twin.train().forward(dict(batch), noise=noise, time=time)[0], expected)
    detach(policy)
    assert is_attached(twin)
    assert torch.equal(twin.forward(dict(batch), noise=noise, time=time)[0], expected)
    detach(twin)


def test_state_dict_round_trip(policy, teacher, batch):
    """The student's weights come back, and the teacher keeps its own."""
    attach(policy, teacher)
    saved, frozen = (copy.deepcopy(p.state_dict()) for p in (policy, policy.model.teacher))
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    optimizer_step(policy, batch)
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in policy.state_dict().items())
    policy.load_state_dict(torch.load(file, weights_only=True))
    for module, expected in ((policy, saved), (policy.model.teacher, frozen)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_to_moves_policy_and_teacher_follows(policy, teacher):
    """Moving the student leaves the teacher's own parameters where they are, until the next coupling asks for them."""
    attach(policy, teacher)
    assert policy.to("cpu") is policy
    policy.to("meta")
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    frozen = policy.model.teacher
    assert frozen.model.action_in_proj.weight.device.type == "cpu"
    follow(frozen, torch.device("meta"))  # what each coupling begins with; SmolVLA itself computes nothing there
    assert {tensor.device.type for tensor in (*frozen.parameters(), *frozen.buffers())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teacher_follows_to_the_gpu(policy, teacher, batch):
    attach(policy, teacher)
    policy.to("cuda").train()
    policy.config.device = "cuda"
    policy.forward({name: tensor.to("cuda") for name, tensor in batch.items()})[0].backward()
    assert {p.device.type for p in policy.model.teacher.parameters()} == {"cuda"}


def test_sampling_is_untouched(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    attach(policy, teacher)
    policy.train()
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise), expected)
    policy.reset()
    assert policy.select_action(dict(batch)).shape == (4, 2)


def test_compiled_policy(make_policy, policy, teacher, batch, noise_and_time, monkeypatch):
    """`compile_model=true` puts a compiled forward on the instance; it is kept and called."""
    # The graph is captured as always; only generating machine code for it, minutes of work, is left out.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    noise, time = noise_and_time
    attach(policy, teacher, solver="midpoint")
    expected, _ = policy.train().forward(dict(batch), noise=noise, time=time)
    compiled = make_policy(seed=0, compile_model=True, compile_mode="default")
    compiled.load_state_dict(policy.state_dict())
    before = snapshot(compiled)
    attach(compiled, teacher, solver="midpoint")
    assert compiled.model.forward_standard is before["model"]["forward"]
    assert "sample_actions" not in vars(compiled.model.teacher.model)
    loss, _ = compiled.train().forward(dict(batch), noise=noise, time=time)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    detach(compiled)
    compiled.eval()
    assert snapshot(compiled) == before


def test_peft_policy(make_policy, teacher, batch, noise_and_time, tmp_path):
    """The teacher of a LoRA student is its base model, without the adapter."""
    from peft import LoraConfig, get_peft_model

    noise, time = noise_and_time
    plain = make_policy(seed=0)
    plain.load_state_dict(teacher.state_dict())
    teacher.save_pretrained(tmp_path)
    attach(plain, tmp_path, solver="midpoint")
    expected, _ = plain.train().forward(dict(batch), noise=noise, time=time)

    student = make_policy(seed=0)
    student.load_state_dict(teacher.state_dict())
    wrapped = get_peft_model(student, LoraConfig(target_modules=r".*lm_expert\..*\.q_proj", init_lora_weights=False))
    wrapped.eval()
    before = snapshot(student)
    attach(wrapped, tmp_path, solver="midpoint")
    assert is_attached(wrapped)
    assert is_attached(student)
    # Everything but the adapter is frozen in the student, and the teacher has no adapter: nothing is held twice.
    assert {id(p) for p in student.model.teacher.parameters()} < {id(p) for p in wrapped.parameters()}
    assert not any("lora" in name for name in student.model.teacher.state_dict())
    loss, _ = wrapped.train().forward(dict(batch), noise=noise, time=time)
    assert loss != expected  # the adapter moves the student, not the teacher
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped.forward(dict(batch), noise=noise, time=time)[0], expected)
    loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n)
    wrapped.eval()
    detach(wrapped)
    assert snapshot(student) == before


# --- refusals -------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused(policy):
    attach(policy)
    with pytest.raises(ReflowError, match=r"already has a teacher attached; call detach\(policy\)"):
        attach(policy)


def test_arguments_of_another_kind_are_refused(policy):
    with pytest.raises(ReflowError, match="pairs is a int; give a folder of pairs, or a function that couples"):
        attach(policy, pairs=5)
    with pytest.raises(ReflowError, match="recipe is a dict; give a Recipe"):
        attach(policy, recipe={"couplings_per_frame": 2})


def test_detaching_nothing_is_refused(policy):
    with pytest.raises(ReflowError, match="nothing to detach"):
        detach(policy)


def test_only_smolvla_can_be_attached(policy):
    from lerobot.policies.act.modeling_act import ACTPolicy

    act = ACTPolicy.__new__(ACTPolicy)
    torch.nn.Module.__init__(act)
    act.config = ACTConfig
    with pytest.raises(ReflowError, match="Only a SmolVLAPolicy can be attached, this is a ACTPolicy"):
        attach(act)
    with pytest.raises(ReflowError, match="this is a DataParallel; attach before wrapping it"):
        attach(torch.nn.DataParallel(policy))


def test_unknown_strategy_is_refused_before_anything_happens(policy):
    before = snapshot(policy)
    with pytest.raises(ReflowError, match="Unknown loss strategy 'nope'; known are: distill, reflow, standard"):
        attach(policy, strategy="nope")
    assert snapshot(policy) == before


def test_detach_under_a_later_wrapper_is_refused(policy, teacher):
    attach(policy, teacher)
    bound = policy.forward
    policy.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    with pytest.raises(ReflowError, match="wrapped after attach; unwrap it first"):
        detach(policy)
    policy.forward = bound
    detach(policy)
