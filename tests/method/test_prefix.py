"""The prefix (images, language, state), encoded once for teacher and student: against stock LeRobot's own forward."""

import contextlib
import json
import logging
import shutil

import pytest
import torch
from helpers import CHUNK, WIDTH, attach_plain, plain, reflow_run, reflow_train_main, refused
from oracle import Flow
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from smolvla_reflow import Coupling, ReflowError, Solver, detach, register_loss_strategy
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.prefix import encode
from smolvla_reflow.smolvla.velocity import Velocity


@pytest.fixture
def teacher(make_policy, policy):
    """A teacher as a user's: the student's own weights, but for the action expert."""
    other = make_policy(seed=0)
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad and "state_proj" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def stock(policy, batch, lines, autocast=contextlib.nullcontext):
    """Loss and gradients by stock LeRobot's training forward, of frames that stand as often as they have lines."""
    actions, noise, time = lines
    repeated = {name: value.repeat_interleave(len(time) // 4, dim=0) for name, value in batch.items()}
    policy.train().zero_grad()
    with autocast():
        loss = policy.model.forward(*observe(policy, repeated), actions, noise, time).mean()
    return loss.detach(), gradients(policy, loss)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("per_frame", [1, 3])
@pytest.mark.parametrize("strategy", ["reflow", "distill"])
def test_loss_and_gradients_are_those_of_the_stock_forward(policy, teacher, batch, asked, strategy, per_frame):
    with attach_plain(policy, teacher, strategy=strategy, recipe=plain(couplings_per_frame=per_frame)) as attachment:
        assert attachment.sharing.why_not_shared is None
        loss, _ = policy.train().forward(dict(batch))
        found = gradients(policy, loss)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() - {"model.state_proj.weight", "model.state_proj.bias"}
    assert len(found) > 10
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_frame", [1, 2])
def test_so_are_they_where_state_proj_is_trained(policy, teacher, batch, asked, per_frame):
    recipe = plain(couplings_per_frame=per_frame)
    with attach_plain(policy, teacher, recipe=recipe, train_state_proj=True) as attachment:
        assert attachment.sharing.why_not_shared == "train_state_proj=true"
        loss, _ = policy.train().forward(dict(batch))
        found = gradients(policy, loss)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_couplings_on_the_shared_prefix_are_the_teachers_own(policy, teacher, batch, asked):
    attach_plain(policy, teacher, recipe=plain(couplings_per_frame=3), solver=Solver("midpoint", num_steps=4))
    policy.train().forward(dict(batch))
    ((actions, noise, _),) = asked
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(actions, Flow(teacher, repeated).midpoint(noise, 4), rtol=1e-4, atol=1e-5)


def test_under_autocast_it_is_as_close_to_stock_as_rounding_allows(policy, teacher, batch, asked):
    with attach_plain(policy, teacher), bfloat16():
        loss, _ = policy.train().forward(dict(batch))
    found = gradients(policy, loss)
    lines = asked[0]
    exact, wanted = stock(policy, batch, lines)
    rounded, roughly = stock(policy, batch, lines, bfloat16)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 3 * abs(rounded - exact) + 1e-2 * exact
    assert found.keys() == roughly.keys() - {"model.state_proj.weight", "model.state_proj.bias"}
    for name in found:
        off = (roughly[name] - wanted[name]).norm()
        assert (found[name] - wanted[name]).norm() <= 3 * off + 1e-3 * wanted[name].norm(), name


def test_a_look_without_gradient_takes_none_from_the_loss_under_autocast(policy, teacher, batch, registry):
    """Autocast keeps the weights that it has cast, up to PyTorch 2.10 those of a call without gradient too."""

    @register_loss_strategy("looking")
    def looking(step):
        coupling = step.coupling()
        with torch.no_grad():
            step.student_velocity(coupling.noise, torch.ones(len(coupling.noise)))
        return step.losses(coupling)

    found = []
    for strategy in ("reflow", "looking"):
        with attach_plain(policy, teacher, strategy=strategy), bfloat16():
            torch.manual_seed(0)
            loss, _ = policy.train().forward(dict(batch))
        found.append(gradients(policy, loss))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- when it is shared, and when not ------------------------------------------------------------------------------


def test_state_proj_is_frozen_until_detach(policy, teacher, batch):
    before = policy.model.state_proj.weight.clone()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1)
    attach_plain(policy, teacher)
    for _ in range(2):
        policy.train().forward(dict(batch))[0].backward()
        optimizer.step()
    assert torch.equal(policy.model.state_proj.weight, before)
    assert policy.config.train_state_proj is True
    detach(policy)
    assert all(p.requires_grad for p in policy.model.state_proj.parameters())
    policy.train().forward(dict(batch))[0].backward()
    optimizer.step()
    assert not torch.equal(policy.model.state_proj.weight, before)


def test_detach_thaws_only_what_attach_froze(make_policy):
    policy = make_policy(seed=0, train_state_proj=False)
    with attach_plain(policy) as attachment:
        assert attachment.sharing.why_not_shared is None
    assert not any(p.requires_grad for p in policy.model.state_proj.parameters())
    policy.model.state_proj.weight.requires_grad_(True)
    with attach_plain(policy):
        assert not policy.model.state_proj.weight.requires_grad
    assert policy.model.state_proj.weight.requires_grad
    assert not policy.model.state_proj.bias.requires_grad


def lora(target):
    return lambda policy: get_peft_model(policy, LoraConfig(target_modules=target))


def another(name):
    def change(policy):
        teacher = policy.__class__(policy.config)
        teacher.load_state_dict(policy.state_dict())
        with torch.no_grad():
            dict(teacher.named_parameters())[name].add_(0.1)
        return teacher

    return change


@pytest.mark.parametrize(
    ("overrides", "wrap", "of", "options", "why"),
    [
        ({"train_expert_only": False}, None, None, {}, "the student trains part of the vision-language model"),
        (
            {"train_expert_only": False, "freeze_vision_encoder": False},
            *(None, None, {}, "the student trains part of the vision-language model"),
        ),
        ({}, lora(r".*text_model.*\.q_proj"), None, {}, "the student trains part of the vision-language model"),
        (
            {},
            lora(r".*state_proj"),
            another("model.action_out_proj.bias"),
            {},
            "the student's state_proj is not the teacher's",
        ),
        ({}, None, another("model.state_proj.bias"), {}, "the student's state_proj is not the teacher's"),
        (
            *({}, None, another("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight")),
            *({}, "the student's vision-language model is not the teacher's"),
        ),
        ({"use_cache": False}, None, None, {}, "the policy's use_cache=false"),
        ({}, None, None, {"strategy": "standard"}, "strategy=standard trains it with the rest"),
        ({}, None, None, {"train_state_proj": True}, "train_state_proj=true"),
    ],
)
def test_where_it_is_not_shared_the_log_says_why(make_policy, batch, caplog, overrides, wrap, of, options, why):
    """And what is trained is what would have been, `state_proj` among it."""
    policy = make_policy(seed=0, **overrides)
    teacher = of(policy) if of else None
    student = wrap(policy) if wrap else policy
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    caplog.set_level(logging.INFO, logger="smolvla_reflow")
    attachment = attach_plain(student, teacher, **options)
    assert attachment.sharing.why_not_shared == why
    assert f"The student encodes the prefix (images, language, state) for itself, because {why}." in caplog.text
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
    if not overrides.get("use_cache", True):
        return  # a sampler without a cache, which stock LeRobot has no more than this package
    loss, _ = student.train().forward(dict(batch))
    loss.backward()
    in_prefix = [p for name, p in student.named_parameters() if p.requires_grad and "state_proj" in name]
    assert in_prefix == [] or any(p.grad is not None and p.grad.any() for p in in_prefix)


def test_where_it_is_shared_the_log_says_so(policy, caplog):
    caplog.set_level(logging.INFO, logger="smolvla_reflow")
    attach_plain(policy)
    assert "The prefix (images, language, state) is encoded once for teacher and student" in caplog.text
    detach(policy)
    attach_plain(policy, pairs=lambda *_, **__: None)
    assert "The prefix (images, language, state) is encoded once for the student" in caplog.text


def test_what_is_unfrozen_later_is_trained(policy, teacher, batch, asked):
    """By the student's own forward; the teacher has a state_proj of its own."""
    attach_plain(policy, teacher, solver="midpoint")
    kept = policy.model.teacher.model.state_proj.weight.clone()
    policy.model.state_proj.requires_grad_(True)
    loss, _ = policy.train().forward(dict(batch))
    found = gradients(policy, loss)
    with torch.no_grad():
        policy.model.state_proj.weight.add_(1.0)
    assert torch.equal(policy.model.teacher.model.state_proj.weight, kept)
    with torch.no_grad():
        policy.model.state_proj.weight.sub_(1.0)
    detach(policy)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        found["model.state_proj.weight"], wanted["model.state_proj.weight"], rtol=1e-3, atol=1e-5
    )


def test_training_what_is_frozen_is_refused(make_policy):
    policy = make_policy(seed=0, train_state_proj=False)
    with pytest.raises(ReflowError, match="train_state_proj has no effect on a policy whose own state_proj is frozen"):
        attach_plain(policy, train_state_proj=True)


def test_a_loss_may_need_the_whole_forward(policy, teacher, batch, registry):
    """A third party's that trains the prefix; its name alone decides, also if it is chosen after attach."""

    @register_loss_strategy("whole", joint_forward=True)
    def whole(step):
        return step.losses(step.coupling())

    attach_plain(policy, teacher, strategy="whole")
    called, forward = [], policy.model.forward_standard
    policy.model.forward_standard = lambda *inputs: called.append(1) or forward(*inputs)
    policy.train().forward(dict(batch))[0].backward()
    assert called == [1]
    assert policy.model.state_proj.weight.grad.any()
    policy.model.training_mode = "reflow"
    policy.forward(dict(batch))
    assert called == [1, 1]  # state_proj is trained now
    detach(policy)
    attach_plain(policy, teacher)
    policy.model.forward_standard = lambda *inputs: called.append(2) or forward(*inputs)
    policy.forward(dict(batch))
    policy.model.training_mode = "whole"
    policy.forward(dict(batch))
    assert called == [1, 1, 2]


# --- from stored couplings ----------------------------------------------------------------------------------------


def test_from_stored_couplings_the_student_encodes_it_without_gradient(policy, batch, asked):
    lines = Coupling(torch.randn(4, CHUNK, WIDTH), torch.randn(4, CHUNK, WIDTH))
    with attach_plain(policy, pairs=lambda *_, **__: lines):
        loss, _ = policy.train().forward(dict(batch))
        found = gradients(policy, loss)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() - {"model.state_proj.weight", "model.state_proj.bias"}
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


# --- several times on a line, and rows that need no coupling -------------------------------------------------------


def test_several_times_on_each_line_cost_an_expert_pass_each(policy, teacher, batch, registry, monkeypatch):
    """The prefix is encoded once; the losses can be weighed and added up."""
    times, weights = torch.rand(4, 2), torch.rand(2, 4, 1, 1)
    seen = []

    @register_loss_strategy("twice")
    def twice(step):
        seen.append(step.coupling())
        return sum(w * step.losses(seen[0], times=t) for w, t in zip(weights, times.unbind(dim=1), strict=True))

    attach_plain(policy, teacher, strategy="twice")
    prefixes, embed = [], policy.model.embed_prefix
    monkeypatch.setitem(vars(policy.model), "embed_prefix", lambda *a, **k: prefixes.append(1) or embed(*a, **k))
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    assert prefixes == [1]
    detach(policy)
    inputs = observe(policy, batch), seen[0].actions, seen[0].noise
    by_time = [
        policy.model.forward(*inputs[0], *inputs[1:], times[:, i]).mean(dim=(1, 2)) * weights[i, :, 0, 0]
        for i in (0, 1)
    ]
    torch.testing.assert_close(losses, by_time[0] + by_time[1], rtol=1e-4, atol=1e-5)


def test_times_of_another_number_of_lines_are_refused(policy, batch, registry):
    register_loss_strategy("odd")(lambda step: step.losses(step.coupling(), times=torch.rand(3, 2)))
    attach_plain(policy, strategy="odd")
    with pytest.raises(ReflowError, match=r"times of shape \(3, 2\) were given for 4 lines"):
        policy.train().forward(dict(batch))


@pytest.mark.parametrize(("ratio", "solved"), [(0.0, 4), (0.25, 3), (0.75, 1), (1.0, 0)])
@pytest.mark.parametrize("train_state_proj", [False, True])
def test_recorded_rows_are_not_solved(policy, teacher, batch, ratio, solved, train_state_proj):
    recipe = plain(real_data_ratio=ratio, couplings_per_frame=2)
    attach_plain(policy, teacher, recipe=recipe, solver=Solver("euler", num_steps=3), train_state_proj=train_state_proj)
    rows, model = [], policy.model.teacher.model
    denoise = model.denoise_step
    vars(model)["denoise_step"] = lambda **given: rows.append(len(given["x_t"])) or denoise(**given)
    policy.train().forward(dict(batch))[0].backward()
    expected = [] if not solved else [2 * solved] * 3
    assert rows == expected or rows == [solved, *expected]  # encoding its own prefix asks once


# --- waiting for the device ----------------------------------------------------------------------------------------


class ListReads(TorchFunctionMode):
    """Counts how often the host reads all of a tensor's values, which reaches no dispatch on the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.tolist
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Counts how often the host reads a tensor's value, for which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "masked_select", "unique")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def reads(function):
    with Reads() as mode, ListReads() as lists:
        function()
    return mode.count + lists.count


def test_reads_are_counted():
    assert reads(lambda: torch.ones(1).item()) == 1
    assert reads(lambda: bool((torch.ones(1) > 0).all())) == 1
    assert reads(lambda: torch.ones(3).tolist()) == 1
    assert reads(lambda: torch.ones(3) + 1) == 0


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps_never_wait_for_the_device(policy, batch, method):
    observation, noise = observe(policy, batch), torch.randn(4, CHUNK, WIDTH)
    velocity = Velocity(policy.model, encode(policy.model, observation))
    with torch.no_grad():
        assert reads(lambda: Solver(method, num_steps=10).integrate(velocity, noise)) == 0


def test_an_adaptive_solver_does(policy, batch):
    velocity = Velocity(policy.model, encode(policy.model, observe(policy, batch)))
    with torch.no_grad():
        solver = Solver("dopri5", rtol=0.1, atol=0.1)
        assert reads(lambda: solver.integrate(velocity, torch.randn(4, CHUNK, WIDTH))) > 10


@pytest.mark.parametrize("per_frame", [1, 4])
def test_a_step_waits_no_more_often_than_a_standard_one(policy, batch, per_frame):
    """LeRobot reads the loss for its metrics; neither teacher nor student adds to that."""
    standard = reads(lambda: policy.train().forward(dict(batch)))
    attach_plain(policy, recipe=plain(couplings_per_frame=per_frame))
    assert 1 <= reads(lambda: policy.forward(dict(batch))) <= standard


# --- compiled -------------------------------------------------------------------------------------------------------


def test_the_one_denoise_step_of_both_is_compiled(make_policy, policy, teacher, batch, noise_and_time, monkeypatch):
    modes = []

    def compile_quickly(function, mode=None, **options):
        modes.append((function, mode))
        return compile_(function, backend="aot_eager", **options)

    compile_ = torch.compile
    noise, time = noise_and_time
    with attach_plain(policy, teacher, solver="midpoint"):
        loss, _ = policy.train().forward(dict(batch), noise=noise, time=time)
        expected = gradients(policy, loss)
    monkeypatch.setattr(torch, "compile", compile_quickly)
    compiled = make_policy(seed=0, compile_model=True, compile_mode="reduce-overhead")
    compiled.load_state_dict(policy.state_dict())
    modes.clear()
    attach_plain(compiled, teacher, solver="midpoint")
    assert modes == [(type(policy.model).denoise_step, "reduce-overhead")]
    found, _ = compiled.train().forward(dict(batch), noise=noise, time=time)
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-4)
    by_compiled = gradients(compiled, found)
    assert by_compiled.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(by_compiled[name], gradient, rtol=1e-2, atol=1e-4)
    detach(compiled)
    assert "denoise_step" not in vars(compiled.model)


# --- in the command -------------------------------------------------------------------------------------------------

SHARED = "The prefix (images, language, state) is encoded once for teacher and student, and state_proj is frozen."


def state_proj_of(folder):
    return load_file(folder / LAST / "model.safetensors")["model.state_proj.weight"]


def trained(workshop, run, **flags):
    """Whether a run changed `state_proj`."""
    reflow_train_main(reflow_run(workshop, run, **{"steps": 2, **flags}))
    return not torch.equal(state_proj_of(run), state_proj_of(workshop / "1rf"))


def test_a_run_leaves_state_proj_as_the_teachers_unless_told_otherwise(workshop, tmp_path, capsys):
    assert not trained(workshop, tmp_path / "frozen")
    assert SHARED in " ".join(capsys.readouterr().err.split())
    assert trained(workshop, tmp_path / "trained", reflow__train_state_proj="true")
    assert "because train_state_proj=true." in " ".join(capsys.readouterr().err.split())
    for run in ("frozen", "trained"):
        config = json.loads((tmp_path / run / LAST / "config.json").read_text())
        assert config["train_state_proj"] is True  # for whoever fine-tunes it next
    reflow_train_main([f"--config_path={tmp_path / 'frozen'}", "--resume=true", "--steps=3"])
    assert SHARED in " ".join(capsys.readouterr().err.split())
    assert torch.equal(state_proj_of(tmp_path / "frozen"), state_proj_of(workshop / "1rf"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"policy__train_state_proj": "false"}, "add --policy.train_state_proj=true, or leave it out"),
        ({"reflow__strategy": "standard"}, "has no effect with --reflow.strategy=standard, which trains it anyway"),
    ],
)
def test_a_flag_without_effect_is_refused(workshop, tmp_path, capsys, flags, message):
    flags = reflow_run(workshop, tmp_path / "run", reflow__train_state_proj="true", **flags)
    assert message in refused(capsys, reflow_train_main, flags)
    assert not (tmp_path / "run").exists()


def test_a_student_of_pairs_that_starts_as_their_teacher_leaves_it_too(workshop, stored, tmp_path, capsys):
    assert not trained(workshop, tmp_path / "run", reflow__pairs_path=stored)
    assert "is encoded once for the student, and state_proj is frozen" in " ".join(capsys.readouterr().err.split())
    reflow_train_main([f"--config_path={tmp_path / 'run'}", "--resume=true", "--steps=3"])
    assert torch.equal(state_proj_of(tmp_path / "run"), state_proj_of(workshop / "1rf"))


def test_one_that_starts_with_another_learns_it(workshop, stored, tmp_path, capsys):
    """It would be another state to the expert; also where the run is resumed."""
    start = tmp_path / "start"
    shutil.copytree(workshop / "1rf" / LAST, start)
    weights = load_file(start / "model.safetensors")
    started = weights["model.state_proj.weight"].mul_(1.5)
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    flags = {"reflow__pairs_path": stored, "policy__path": start, "steps": 2}
    reflow_train_main(reflow_run(workshop, tmp_path / "run", **flags))
    said = "the student's state_proj is not that of the pairs' teacher"
    assert said in " ".join(capsys.readouterr().err.split())
    after_two = state_proj_of(tmp_path / "run")
    assert not torch.equal(after_two, started)
    reflow_train_main([f"--config_path={tmp_path / 'run'}", "--resume=true", "--steps=4"])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not torch.equal(state_proj_of(tmp_path / "run"), after_two)
