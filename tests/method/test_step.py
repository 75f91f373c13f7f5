"""What a loss can ask a step for: velocities, the batch, metrics; and what stands in the way of misuse."""

import inspect
import re

import pytest
import torch
from helpers import CHUNK, WIDTH, attach_plain, plain
from lerobot.scripts import lerobot_train
from lerobot.utils.logging_utils import MetricsTracker
from oracle import Flow

from smolvla_reflow import Coupling, Recipe, ReflowError, detach, register_loss_strategy

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(params=[False, True], ids=["one prefix", "own prefix"])
def own_prefix(request):
    return request.param


@pytest.fixture
def steps(policy, teacher, batch, registry):
    """Call a function with the step of one forward pass; returns what it returns."""

    def run(function, recipe=None, batch=batch, **options):
        found = []
        registry.pop("asking", None)

        @register_loss_strategy("asking")
        def asking(step):
            found.append(function(step))
            return step.losses(step.recorded())

        attach_plain(policy, **({"teacher": teacher} | options), strategy="asking", recipe=recipe)
        result = policy.train().forward({**batch})
        detach(policy)
        return (*found, result)

    return run


def test_students_velocity_and_its_gradient_equal_an_independent_derivation(policy, batch, steps, noise_and_time):
    x, t = noise_and_time
    parameters = dict(policy.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad]

    def gradients(velocity):
        found = torch.autograd.grad(velocity.square().sum(), [parameters[n] for n in trained], allow_unused=True)
        return dict(zip(trained, found, strict=True))

    def ask(step):
        with torch.no_grad():
            before = step.student_velocity(x, t)
        velocity = step.student_velocity(x, t)  # a call without gradient before it takes none away
        assert not before.requires_grad
        assert torch.equal(before, velocity)
        return velocity, gradients(velocity)

    (velocity, found), _ = steps(ask, train_state_proj=True)
    expected = Flow(policy, batch).velocity(x, t)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    wanted = gradients(expected)
    for name in trained:
        assert (found[name] is None) == (wanted[name] is None), name
        if found[name] is not None:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)
    assert found["model.state_proj.weight"].abs().max() > 0  # of the prefix
    assert found["model.action_in_proj.weight"].abs().max() > 0


@pytest.mark.parametrize("per_frame", [1, 3])
def test_teachers_velocity(teacher, batch, steps, per_frame):
    x, t = torch.randn(4 * per_frame, CHUNK, WIDTH), torch.rand(4 * per_frame)
    (velocity, coupling), _ = steps(
        lambda step: (step.teacher_velocity(x, t), step.coupling()), plain(couplings_per_frame=per_frame)
    )
    repeated = {name: value.repeat_interleave(per_frame, dim=0) for name, value in batch.items()}
    with torch.no_grad():
        expected = Flow(teacher, repeated).velocity(x, t)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert not velocity.requires_grad
    assert coupling.noise.shape == (4 * per_frame, CHUNK, WIDTH)


@pytest.mark.parametrize("per_frame", [1, 3])
def test_students_velocity_of_several_lines_for_each_frame(policy, batch, steps, per_frame):
    x, t = torch.randn(4 * per_frame, CHUNK, WIDTH), torch.rand(4 * per_frame)
    velocity, _ = steps(lambda step: step.student_velocity(x, t), plain(couplings_per_frame=per_frame))
    repeated = {name: value.repeat_interleave(per_frame, dim=0) for name, value in batch.items()}
    torch.testing.assert_close(velocity, Flow(policy, repeated).velocity(x, t), rtol=1e-4, atol=1e-5)
    assert velocity.requires_grad


def test_the_batch_is_at_hand(batch, steps):
    whole = {**batch, "task": ["push"] * 4, "index": torch.arange(4)}
    (seen, frames), _ = steps(lambda step: (step.batch, step.frames), batch=whole)
    assert seen["task"] == ["push"] * 4
    assert torch.equal(seen["action_is_pad"], batch["action_is_pad"])
    assert torch.equal(frames, torch.arange(4))


def test_logged_metrics_stand_beside_the_loss(policy, steps):
    def ask(step):
        step.log("late_error", torch.tensor(0.25, requires_grad=True))
        step.log("share", 3)

    _, (loss, metrics) = steps(ask)
    assert metrics["late_error"] == 0.25
    assert metrics["share"] == 3.0
    assert isinstance(metrics["late_error"], float)
    assert metrics["loss"] == pytest.approx(loss.item())
    _, (_, without) = steps(lambda step: None)
    assert "late_error" not in without


def test_no_metric_has_a_name_of_lerobots_own(steps):
    """Whatever the installed LeRobot's training averages, or counts, under a name of its own."""
    training = inspect.getsource(inspect.getmodule(lerobot_train.train)).partition("eval_metrics = {")[0]
    averaged = re.findall(r'"(\w+)"\]?[:= ]+AverageMeter', training)
    counted = MetricsTracker(1, 1, 1, {}).to_dict()
    assert {"loss", "grad_norm", "update_s"} <= set(averaged)
    assert {"steps", "samples", "episodes", "epochs"} <= set(counted)

    def ask(step):
        for name in (*averaged, *counted):
            with pytest.raises(ReflowError, match=f"LeRobot reports '{name}' itself; choose another name"):
                step.log(name, 1.0)
        return "asked"

    assert steps(ask)[0] == "asked"


def test_several_numbers_are_no_metric(policy, steps):
    with pytest.raises(ReflowError, match=r"The metric 'errors' has 4 numbers; log one, such as its mean"):
        steps(lambda step: step.log("errors", torch.zeros(4)))


def test_times_are_the_recipes(steps):
    times, _ = steps(lambda step: step.times(), plain(time_sampling="grid:2", couplings_per_frame=20))
    assert times.shape == (80,)
    assert set(times.tolist()) == {0.5, 1.0}


@pytest.mark.parametrize("name", ["noise", "time"])
@pytest.mark.parametrize("strategy", ["reflow", "standard"])
def test_what_the_caller_fixes_is_one_for_each_frame(policy, teacher, batch, noise_and_time, strategy, name, asked):
    """Either of the two by itself makes the recipe's number of couplings one."""
    fixed = {"noise": noise_and_time[0], "time": noise_and_time[1]}[name]
    attach_plain(policy, teacher, strategy=strategy, recipe=Recipe(couplings_per_frame=3))
    losses, _ = policy.train().forward(dict(batch), **{name: fixed}, reduction="none")
    ((_, noise, time),) = asked
    assert torch.equal({"noise": noise, "time": time}[name], fixed)
    assert len(noise) == len(time) == len(losses) == 4


def test_standard_draws_the_noise_and_the_times_of_stock_training(policy, teacher, batch):
    """Same seed, same loss, whatever distribution of t the recipe has for couplings."""
    policy.train()
    torch.manual_seed(0)
    stock, _ = policy.forward(dict(batch))
    attach_plain(policy, teacher, strategy="standard")
    torch.manual_seed(0)
    assert torch.equal(policy.forward(dict(batch))[0], stock)


def test_a_weighted_loss_leaves_recorded_frames_alone(policy, teacher, batch, noise_and_time):
    noise, time = noise_and_time
    weight = torch.linspace(0.0, 3.0, WIDTH)[None, None, :]

    @register_loss_strategy("weighed")
    def weighed(step):
        return weight * step.losses(step.coupling())

    def per_frame(strategy, **recipe):
        with attach_plain(policy, teacher, strategy=strategy, recipe=plain(**recipe), solver="midpoint"):
            return policy.train().forward(dict(batch), noise=noise, time=time, reduction="none")[0]

    with attach_plain(policy, teacher, solver="midpoint") as attached:
        inputs = (*policy.prepare_images(batch), batch["observation.language.tokens"])
        inputs += (batch["observation.language.attention_mask"], policy.prepare_state(batch))
        unreduced = attached.policy.model.forward_reflow(*inputs, policy.prepare_action(batch), noise, time)
    unweighed_alone, weighed_alone = per_frame("reflow"), per_frame("weighed")
    torch.testing.assert_close(weighed_alone, (unreduced * weight).mean(dim=(1, 2)))
    unweighed, mixed = (per_frame(strategy, real_data_ratio=0.5) for strategy in ("reflow", "weighed"))
    torch.testing.assert_close(mixed[2:] / unweighed[2:], weighed_alone[2:] / unweighed_alone[2:])
    torch.testing.assert_close(mixed[:2], unweighed[:2])
    assert not torch.isclose(weighed_alone, unweighed_alone).any()


def test_standard_takes_several_noises_for_each_frame(policy, teacher, batch, asked):
    """Against LeRobot's own loss of a batch in which each frame stands three times, with the same noise and times."""
    attach_plain(policy, teacher, strategy="standard", recipe=Recipe(couplings_per_frame=3))
    losses, _ = policy.train().forward(dict(batch), reduction="none")
    ((_, noise, time),) = asked
    detach(policy)
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in batch.items()}
    stock, _ = policy.train().forward(repeated, noise=noise, time=time, reduction="none")
    torch.testing.assert_close(losses, stock.unflatten(0, (4, 3)).mean(dim=1))


def test_no_teacher_no_velocity(steps):
    def source(observation, *, frames, noise, per_frame):
        raise AssertionError

    with pytest.raises(ReflowError, match="No teacher is attached whose velocity could be asked for"):
        steps(
            lambda step: step.teacher_velocity(torch.zeros(4, CHUNK, WIDTH), torch.ones(4)), teacher=None, pairs=source
        )


def test_a_source_of_ones_own(policy, teacher, batch, noise_and_time):
    """Any function that couples: the loss is that of the same couplings made online."""
    noise, time = noise_and_time
    with attach_plain(policy, teacher, solver="midpoint") as attached:
        expected, _ = policy.train().forward(dict(batch), noise=noise, time=time)
        online = attached.source

    def source(observation, *, frames, noise, per_frame):
        asked.append((frames, per_frame))
        return online(observation, frames=frames, noise=noise, per_frame=per_frame)

    asked = []
    with attach_plain(policy, pairs=source):
        loss, _ = policy.train().forward({**batch, "index": torch.arange(4)}, noise=noise, time=time)
        assert policy.model.teacher is None
    ((frames, per_frame),) = asked
    assert torch.equal(frames, torch.arange(4))
    assert per_frame == 1
    torch.testing.assert_close(loss, expected)


def test_recorded_actions_meet_noise_of_their_own(policy, batch, asked):
    """Not the source's, which may have few for each frame."""
    stored = Coupling(torch.randn(2, CHUNK, WIDTH), torch.randn(2, CHUNK, WIDTH))  # of the frames that need some
    attach_plain(policy, pairs=lambda observation, **_: stored, recipe=plain(real_data_ratio=0.5))
    policy.train().forward(dict(batch))
    (recorded, other_noise, _), (actions, noise, _) = asked
    assert torch.equal(actions, stored.actions)
    assert torch.equal(noise, stored.noise)
    assert torch.equal(recorded, policy.prepare_action(batch)[:2])
    assert not torch.isclose(noise, other_noise).all(dim=(1, 2)).any()


def test_a_source_of_another_shape_is_refused(policy, batch):
    attach_plain(
        policy, pairs=lambda observation, **_: Coupling(torch.zeros(4, CHUNK, 2), torch.zeros(4, CHUNK, WIDTH))
    )
    with pytest.raises(ReflowError, match=r"gave noise of shape \(4, 5, 2\); \(4, 5, 6\) was asked for"):
        policy.train().forward(dict(batch))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((torch.zeros(4, CHUNK, WIDTH),) * 2, "gave a tuple; return a Coupling"),
        (
            Coupling(*(torch.zeros(4, CHUNK, WIDTH).double(),) * 2),
            "gave noise in torch.float64; torch.float32 was asked for",
        ),
    ],
)
def test_a_source_of_something_else_is_refused(policy, batch, made, message):
    attach_plain(policy, pairs=lambda observation, **_: made)
    with pytest.raises(ReflowError, match=message):
        policy.train().forward(dict(batch))


def three(coupling):
    return Coupling(coupling.noise[:3], coupling.actions[:3])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda step: step.losses(step.coupling(), times=torch.ones(4)),
            r"times of shape \(4,\) were given for 8 lines",
        ),
        (lambda step: step.losses(step.coupling(), times="betta"), "time_sampling 'betta' is unknown"),
        (lambda step: step.losses(three(step.coupling())), "3 lines for 4 frames: each frame needs as many"),
    ],
)
def test_times_and_lines_of_another_shape_are_refused(steps, ask, message):
    with pytest.raises(ReflowError, match=message):
        steps(ask, plain(couplings_per_frame=2))


def test_one_time_for_all_and_one_weight_for_each_frame(policy, teacher, batch, noise_and_time, registry):
    """Against the unweighed losses of each frame at that time."""
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None]

    @register_loss_strategy("each")
    def each(step):
        return weights * step.losses(step.coupling(), times=0.75)

    fixed = {"noise": noise_and_time[0], "reduction": "none"}
    with attach_plain(policy, teacher, solver="midpoint"):
        unweighed, _ = policy.train().forward(dict(batch), time=torch.full((4,), 0.75), **fixed)
    with attach_plain(policy, teacher, strategy="each", solver="midpoint"):
        weighed, _ = policy.train().forward(dict(batch), **fixed)
    torch.testing.assert_close(weighed, weights[:, 0, 0] * unweighed)


def test_the_teachers_velocity_follows_the_student_and_is_never_trained(
    policy, teacher, batch, noise_and_time, registry
):
    x, t = noise_and_time

    @register_loss_strategy("asking")
    def asking(step):
        inner = x.clone().requires_grad_()
        velocity = step.teacher_velocity(inner, t)
        (gradient,) = torch.autograd.grad(velocity.sum(), inner)
        assert gradient.abs().max() > 0
        assert not step.teacher_velocity(x, t).requires_grad
        return step.losses(step.recorded())

    attach_plain(policy, teacher, strategy="asking")
    policy.train().forward(dict(batch))
    policy.requires_grad_(True)
    with pytest.raises(ReflowError, match="unfrozen after attach"):
        policy.train().forward(dict(batch))
