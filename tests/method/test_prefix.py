"""The prefix (images, language, state), encoded once for teacher and student: against stock LeRobot's own forward."""

import contextlib
import copy
import json
import logging
import shutil

import pytest
import torch
from helpers import (
    CHUNK,
    WIDTH,
    assert_close,
    assert_equal,
    attach_plain,
    gradients,
    loss_of,
    losses_of,
    plain,
    prefixes_encoded,
    reads,
    reflow_run,
    reflow_train_main,
)
from oracle import inputs_of, repeated
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from smolvla_reflow import Coupling, ReflowError, Solver, detach, register_loss_strategy
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.prefix import encode
from smolvla_reflow.smolvla.velocity import Velocity


def stock(policy, batch, lines, autocast=contextlib.nullcontext):
    """Loss and gradients by stock LeRobot's training forward, of frames that stand as often as they have lines."""
    actions, noise, time = lines
    policy.train()
    with autocast():
        inputs = inputs_of(policy, repeated(batch, len(time) // 4))
        loss = policy.model.forward(*inputs, actions, noise, time).mean()
    return loss.detach(), gradients(policy, loss)


def behind_the_prefix(found):
    """All gradients but the gradient of `state_proj`."""
    return {name: gradient for name, gradient in found.items() if "state_proj" not in name}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def random_lines(observation, *, frames, noise, per_frame):
    """A source of couplings that stands for stored pairs."""
    return Coupling(*torch.randn(2, len(observation.state) * per_frame, CHUNK, WIDTH))


@pytest.mark.parametrize("per_frame", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "distill"}, {"teacher": None, "pairs": random_lines}, {"train_state_proj": True}],
    ids=["reflow", "distill", "stored couplings", "state_proj trained"],
)
def test_loss_and_gradients_are_those_of_the_stock_forward(policy, teacher, batch, asked, options, per_frame):
    """`state_proj` has a gradient only if the user asks to train it."""
    recipe = plain(couplings_per_frame=per_frame)
    with attach_plain(policy, recipe=recipe, **{"teacher": teacher, **options}) as attachment:
        trained = "train_state_proj" in options
        assert attachment.sharing.why_not_shared == ("train_state_proj=true" if trained else None)
        loss = loss_of(policy, batch)
        found = gradients(policy, loss)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert len(found) > 10
    assert_close(found, wanted if trained else behind_the_prefix(wanted), rtol=1e-3, atol=1e-5)


def test_under_autocast_it_is_as_close_to_stock_as_rounding_allows(policy, teacher, batch, asked):
    with attach_plain(policy, teacher), bfloat16():
        loss = loss_of(policy, batch)
    found = gradients(policy, loss)
    exact, wanted = stock(policy, batch, asked[0])
    rounded, roughly = stock(policy, batch, asked[0], bfloat16)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 3 * abs(rounded - exact) + 1e-2 * exact
    assert found.keys() == behind_the_prefix(roughly).keys()
    for name in found:
        off = (roughly[name] - wanted[name]).norm()
        assert (found[name] - wanted[name]).norm() <= 3 * off + 1e-3 * wanted[name].norm(), name


def test_a_look_without_gradient_takes_none_from_the_loss_under_autocast(policy, teacher, batch, registry):
    """Autocast caches the weights that it has cast. Up to PyTorch 2.10 it also caches them in a call without gradient."""

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
            loss = loss_of(policy, batch)
        found.append(gradients(policy, loss))
    assert_equal(*found)


# --- when it is shared, and when not ------------------------------------------------------------------------------


def test_state_proj_is_frozen_until_detach(policy, teacher, batch):
    before = policy.model.state_proj.weight.clone()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.1)
    attach_plain(policy, teacher)
    for _ in range(2):
        loss_of(policy, batch).backward()
        optimizer.step()
    assert torch.equal(policy.model.state_proj.weight, before)
    assert policy.config.train_state_proj is True
    detach(policy)
    assert all(p.requires_grad for p in policy.model.state_proj.parameters())
    loss_of(policy, batch).backward()
    optimizer.step()
    assert not torch.equal(policy.model.state_proj.weight, before)


def test_detach_thaws_only_what_attach_froze(make_policy):
    policy = make_policy(seed=0, train_state_proj=False)
    with pytest.raises(ReflowError, match="train_state_proj has no effect on a policy whose own state_proj is frozen"):
        attach_plain(policy, train_state_proj=True)
    with attach_plain(policy) as attachment:
        assert attachment.sharing.why_not_shared is None
    assert not any(p.requires_grad for p in policy.model.state_proj.parameters())
    policy.model.state_proj.weight.requires_grad_(True)
    with attach_plain(policy):
        assert not policy.model.state_proj.weight.requires_grad
    assert policy.model.state_proj.weight.requires_grad
    assert not policy.model.state_proj.bias.requires_grad


CONNECTOR = "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"
TRAINS = "the student trains part of the vision-language model"
DIFFERS = "the student's {} is not the teacher's"


@pytest.mark.parametrize(
    ("overrides", "adapted", "changed", "options", "why"),
    [
        ({"train_expert_only": False}, None, None, {}, TRAINS),
        ({"train_expert_only": False, "freeze_vision_encoder": False}, None, None, {}, TRAINS),
        ({}, r".*text_model.*\.q_proj", None, {}, TRAINS),
        ({}, r".*state_proj", "model.action_out_proj.bias", {}, DIFFERS.format("state_proj")),
        ({}, None, "model.state_proj.bias", {}, DIFFERS.format("state_proj")),
        ({}, None, CONNECTOR, {}, DIFFERS.format("vision-language model")),
        ({"use_cache": False}, None, None, {}, "the policy's use_cache=false"),
        ({}, None, None, {"strategy": "standard"}, "strategy=standard trains it with the rest"),
        ({}, None, None, {"train_state_proj": True}, "train_state_proj=true"),
    ],
)
def test_where_it_is_not_shared_the_log_says_why(make_policy, batch, caplog, overrides, adapted, changed, options, why):
    """The student may have an adapter on some modules, and one of the teacher's parameters may be changed. The same
    parameters are trained as without the package, `state_proj` among them."""
    policy = make_policy(seed=0, **overrides)
    teacher = None
    if changed:
        teacher = copy.deepcopy(policy)
        teacher.get_parameter(changed).data.add_(0.1)
    student = get_peft_model(policy, LoraConfig(target_modules=adapted)) if adapted else policy
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    caplog.set_level(logging.INFO, logger="smolvla_reflow")
    attachment = attach_plain(student, teacher, **options)
    assert attachment.sharing.why_not_shared == why
    assert f"The student encodes the prefix (images, language, state) for itself, because {why}." in caplog.text
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
    if policy.config.use_cache:  # stock LeRobot's sampler needs a cache, too
        found = gradients(student, loss_of(student, batch))
        in_prefix = [name for name in trained if "state_proj" in name]
        assert in_prefix == [] or any(found[name].any() for name in in_prefix if name in found)


def test_where_it_is_shared_the_log_says_so(policy, caplog):
    caplog.set_level(logging.INFO, logger="smolvla_reflow")
    with attach_plain(policy):
        assert "The prefix (images, language, state) is encoded once for teacher and student" in caplog.text
    attach_plain(policy, pairs=random_lines)
    assert "The prefix (images, language, state) is encoded once for the student" in caplog.text


def test_what_is_unfrozen_later_is_trained(policy, teacher, batch, asked):
    """By the student's own forward. The teacher has another state_proj."""
    attach_plain(policy, teacher, solver="midpoint")
    of_student, of_teacher = (each.model.state_proj.weight for each in (policy, policy.model.teacher))
    assert torch.equal(of_student, of_teacher)
    assert of_student.data_ptr() != of_teacher.data_ptr()
    policy.model.state_proj.requires_grad_(True)
    loss = loss_of(policy, batch)
    found = gradients(policy, loss)
    detach(policy)
    expected, wanted = stock(policy, batch, asked[0])
    torch.testing.assert_close(loss, expected)
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_loss_may_need_the_whole_forward(policy, teacher, batch, registry):
    """A third party's loss that trains the prefix. Its name alone decides, also if it is chosen after attach."""
    register_loss_strategy("whole", joint_forward=True)(lambda step: step.losses(step.coupling()))

    def joint_passes(strategy):
        called, forward = [], policy.model.forward_standard
        policy.model.forward_standard = lambda *inputs: called.append(1) or forward(*inputs)
        policy.model.training_mode = strategy
        loss_of(policy, batch).backward()
        policy.model.forward_standard = forward
        return len(called)

    with attach_plain(policy, teacher, strategy="whole"):
        assert joint_passes("whole") == 1
        assert policy.model.state_proj.weight.grad.any()
        assert joint_passes("reflow") == 1  # since state_proj is trained
    with attach_plain(policy, teacher):
        assert joint_passes("reflow") == 0
        assert joint_passes("whole") == 1


# --- several times on a line, and rows that need no coupling -------------------------------------------------------


def test_several_times_on_each_line_cost_an_expert_pass_each(policy, teacher, batch, registry):
    """The prefix is encoded once; the losses can be weighed and added up."""
    times, weights, seen = torch.rand(2, 4), torch.rand(2, 4, 1, 1), []

    @register_loss_strategy("twice")
    def twice(step):
        seen.append(step.coupling())
        return sum(w * step.losses(seen[0], times=t) for w, t in zip(weights, times, strict=True))

    attach_plain(policy, teacher, strategy="twice")
    prefixes = prefixes_encoded(policy.model)
    losses = losses_of(policy, batch)
    assert prefixes == [4]
    detach(policy)
    lines = seen[0].actions, seen[0].noise
    by_time = [
        w * policy.model.forward(*inputs_of(policy, batch), *lines, t) for w, t in zip(weights, times, strict=True)
    ]
    assert_close(losses, sum(by_time).mean(dim=(1, 2)))


@pytest.mark.parametrize(("ratio", "solved"), [(0.0, 4), (0.25, 3), (0.75, 1), (1.0, 0)])
@pytest.mark.parametrize("train_state_proj", [False, True])
def test_recorded_rows_are_not_solved(policy, teacher, batch, ratio, solved, train_state_proj):
    recipe = plain(real_data_ratio=ratio, couplings_per_frame=2)
    attach_plain(policy, teacher, recipe=recipe, solver=Solver("euler", num_steps=3), train_state_proj=train_state_proj)
    rows, model = [], policy.model.teacher.model
    denoise = model.denoise_step
    vars(model)["denoise_step"] = lambda **given: rows.append(len(given["x_t"])) or denoise(**given)
    loss_of(policy, batch).backward()
    expected = [] if not solved else [2 * solved] * 3
    assert rows == expected or rows == [solved, *expected]  # encoding its own prefix asks once


# --- waiting for the device ----------------------------------------------------------------------------------------


def test_reads_are_counted():
    assert reads(lambda: torch.ones(1).item()) == 1
    assert reads(lambda: bool((torch.ones(1) > 0).all())) == 1
    assert reads(lambda: torch.ones(3).tolist()) == 1
    assert reads(lambda: torch.ones(3) + 1) == 0


def test_fixed_steps_never_wait_for_the_device_and_an_adaptive_solver_does(policy, batch):
    noise = torch.randn(4, CHUNK, WIDTH)
    velocity = Velocity(policy.model, encode(policy.model, observe(policy, batch)))
    with torch.no_grad():
        for method in ("euler", "midpoint", "rk4"):
            assert reads(lambda method=method: Solver(method, num_steps=10).integrate(velocity, noise)) == 0
        assert reads(lambda: Solver("dopri5", rtol=0.1, atol=0.1).integrate(velocity, noise)) > 10


@pytest.mark.parametrize("per_frame", [1, 4])
def test_a_step_waits_no_more_often_than_a_standard_one(policy, batch, per_frame):
    """LeRobot reads the loss for its metrics. Teacher and student read nothing more."""
    standard = reads(lambda: loss_of(policy, batch))
    attach_plain(policy, recipe=plain(couplings_per_frame=per_frame))
    assert 1 <= reads(lambda: loss_of(policy, batch)) <= standard


def test_recorded_rows_wait_no_more_often_than_a_standard_step(policy, batch, noise_and_time):
    """LeRobot counts the rows' entries, and reads a loss there that nobody asked for. (Times are drawn on the CPU.)"""
    standard = reads(lambda: loss_of(policy, batch, *noise_and_time))
    attach_plain(policy, recipe=plain(real_data_ratio=0.5))
    assert 1 <= reads(lambda: loss_of(policy, batch, *noise_and_time)) <= standard


# --- in the command -------------------------------------------------------------------------------------------------


def state_proj_of(folder):
    return load_file(folder / LAST / "model.safetensors")["model.state_proj.weight"]


@pytest.fixture
def train(workshop, capsys):
    """Train, or resume, in a folder; returns what is printed, in one line."""

    def run(folder, **flags):
        capsys.readouterr()
        if folder.exists():
            reflow_train_main([f"--config_path={folder}", "--resume=true", "--steps=3"])
        else:
            reflow_train_main(reflow_run(workshop, folder, **{"steps": 2, **flags}))
        return " ".join(capsys.readouterr().err.split())

    return run


def test_a_run_leaves_state_proj_as_the_teachers_unless_the_user_says_otherwise(workshop, tmp_path, train):
    teachers = state_proj_of(workshop / "1rf")
    for _ in ("trained", "resumed"):
        assert "is encoded once for teacher and student, and state_proj is frozen." in train(tmp_path / "frozen")
        assert torch.equal(state_proj_of(tmp_path / "frozen"), teachers)
    assert "because train_state_proj=true." in train(tmp_path / "trained", reflow__train_state_proj="true")
    assert not torch.equal(state_proj_of(tmp_path / "trained"), teachers)
    for run in ("frozen", "trained"):
        config = json.loads((tmp_path / run / LAST / "config.json").read_text())
        assert config["train_state_proj"] is True  # for whoever fine-tunes it next


def test_a_student_of_pairs_leaves_it_if_it_starts_as_their_teacher(workshop, stored, tmp_path, train):
    """Else it learns it, which is another state to the expert; also where the run is resumed."""
    for _ in ("trained", "resumed"):
        said = train(tmp_path / "run", reflow__pairs_path=stored)
        assert "is encoded once for the student, and state_proj is frozen" in said
        assert torch.equal(state_proj_of(tmp_path / "run"), state_proj_of(workshop / "1rf"))

    start = shutil.copytree(workshop / "1rf" / LAST, tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    before = weights["model.state_proj.weight"].mul_(1.5)
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    for _ in ("trained", "resumed"):
        said = train(tmp_path / "other", reflow__pairs_path=stored, policy__path=start)
        assert "the student's state_proj is not that of the pairs' teacher" in said
        after = state_proj_of(tmp_path / "other")
        assert not torch.equal(after, before)
        before = after
