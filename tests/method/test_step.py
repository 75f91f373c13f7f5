"""A loss can ask a step for velocities, couplings, the batch and metrics; misuse is refused."""

import inspect
import math
import re

import pytest
import torch
from helpers import CHUNK, WIDTH, assert_close, attach_plain, loss_of, losses_of, plain
from lerobot.scripts import lerobot_train
from lerobot.utils.logging_utils import MetricsTracker
from oracle import Flow, by_frame, reflow_losses, repeated

from smolvla_reflow import Coupling, Recipe, ReflowError, detach, register_loss_strategy

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(params=[False, True], ids=["one prefix", "own prefix"])
def own_prefix(request):
    return request.param


@pytest.fixture
def steps(policy, teacher, batch, registry):
    """Call a function with the step of one forward pass. Return its result, and what the pass returned."""

    def run(function, recipe=None, batch=batch, **options):
        found = []
        registry.pop("asking", None)

        @register_loss_strategy("asking")
        def asking(step):
            found.append(function(step))
            return step.losses(step.recorded())

        with attach_plain(policy, **({"teacher": teacher} | options), strategy="asking", recipe=recipe):
            result = policy.train().forward({**batch})
        return (*found, result)

    return run


def test_students_velocity_and_its_gradient_equal_an_independent_derivation(policy, batch, steps, noise_and_time):
    x, t = noise_and_time
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    def gradients(velocity):
        found = torch.autograd.grad(velocity.square().sum(), [*trained.values()], allow_unused=True)
        return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}

    def ask(step):
        with torch.no_grad():
            before = step.student_velocity(x, t)
        velocity = step.student_velocity(x, t)  # a call without gradient before it takes none away
        assert not before.requires_grad
        assert torch.equal(before, velocity)
        return velocity, gradients(velocity)

    (velocity, found), _ = steps(ask, train_state_proj=True)
    expected = Flow(policy, batch).velocity(x, t)
    assert_close(velocity, expected)
    assert_close(found, gradients(expected), rtol=1e-3, atol=1e-4)
    assert found["model.state_proj.weight"].abs().max() > 0  # of the prefix
    assert found["model.action_in_proj.weight"].abs().max() > 0


@pytest.mark.parametrize("per_frame", [1, 3])
def test_velocities_of_several_lines_for_each_frame(policy, teacher, batch, steps, per_frame):
    """The teacher's is never trained, and has a gradient to x, if x wants one."""
    x, t = torch.randn(4 * per_frame, CHUNK, WIDTH), torch.rand(4 * per_frame)

    def ask(step):
        inner = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(step.teacher_velocity(inner, t).sum(), inner)
        assert gradient.abs().max() > 0
        return step.student_velocity(x, t), step.teacher_velocity(x, t), step.coupling()

    (students, teachers, coupling), _ = steps(ask, plain(couplings_per_frame=per_frame))
    frames = repeated(batch, per_frame)
    assert_close(students, Flow(policy, frames).velocity(x, t))
    assert_close(teachers, Flow(teacher, frames).velocity(x, t))
    assert students.requires_grad
    assert not teachers.requires_grad
    assert coupling.noise.shape == (4 * per_frame, CHUNK, WIDTH)


def test_the_batch_is_at_hand(batch, steps):
    whole = {**batch, "task": ["push"] * 4, "index": torch.arange(4)}
    (seen, frames), _ = steps(lambda step: (step.batch, step.frames), batch=whole)
    assert seen["task"] == ["push"] * 4
    assert torch.equal(seen["action_is_pad"], batch["action_is_pad"])
    assert torch.equal(frames, torch.arange(4))


@pytest.mark.parametrize(
    ("name", "indices", "said"),
    [
        ("observation.state", torch.arange(40, 44), "the batch's state of the frames 41, 43"),
        ("observation.images.top", torch.arange(40, 44), "the batch's image 1 of the frames 41, 43"),
        ("observation.state", None, "the batch's state of the rows 1, 3"),
        ("action", torch.arange(40, 44), "the batch's recorded actions of the frames 41, 43"),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named(policy, batch, name, indices, said):
    sound = {**batch, name: batch[name].clone()}
    batch[name][[1, 3]] = math.nan
    if indices is not None:
        batch["index"] = indices
    strategy = "standard" if name == "action" else "reflow"
    with attach_plain(policy, strategy=strategy) as attachment:
        assert math.isnan(loss_of(policy, batch))
        assert attachment.step_metrics.not_finite == said
        assert math.isfinite(loss_of(policy, sound))  # of the next step, which nothing is to be blamed for
        assert attachment.step_metrics.not_finite is None


def test_couplings_that_are_not_finite_are_named(policy, batch):
    """Two for each frame, and recorded rows before them."""

    def source(observation, *, frames, noise, per_frame, prefix=None):
        noise = torch.randn(len(observation.state) * per_frame, CHUNK, WIDTH)
        actions = noise.clone()
        actions[3] = math.inf  # the second coupling of the second frame
        return Coupling(noise, actions)

    batch["index"] = torch.arange(40, 44)
    recipe = plain(couplings_per_frame=2, real_data_ratio=0.25)
    with attach_plain(policy, pairs=source, recipe=recipe) as attachment:
        assert not math.isfinite(loss_of(policy, batch))
        assert attachment.step_metrics.not_finite == "the teacher's actions of the frames 42"


def test_logged_metrics_stand_beside_the_loss(steps):
    def ask(step):
        step.log("late_error", torch.tensor(0.25, requires_grad=True))
        step.log("share", 3)

    _, (loss, metrics) = steps(ask)
    assert metrics == {"loss": pytest.approx(loss.item()), "late_error": 0.25, "share": 3.0}
    assert isinstance(metrics["late_error"], float)
    _, (_, without) = steps(lambda step: None)
    assert "late_error" not in without


def test_no_metric_has_a_name_of_lerobots_own_or_of_every_loss(steps):
    """LeRobot's own names are all that the training of the installed LeRobot averages or counts."""
    training = inspect.getsource(inspect.getmodule(lerobot_train.train)).partition("eval_metrics = {")[0]
    averaged = re.findall(r'"(\w+)"\]?[:= ]+AverageMeter', training)
    counted = MetricsTracker(1, 1, 1, {}).to_dict()
    assert {"loss", "grad_norm", "update_s"} <= set(averaged)
    assert {"steps", "samples", "episodes", "epochs"} <= set(counted)
    every_loss = ("one_step_error", "velocity_mse_t3", "flow_error_1")

    def ask(step):
        for name in (*averaged, *counted, *every_loss):
            with pytest.raises(ReflowError, match=f"'{name}' is reported already; choose another name"):
                step.log(name, 1.0)
        return "asked"

    assert steps(ask)[0] == "asked"


@pytest.mark.parametrize("name", ["noise", "time"])
@pytest.mark.parametrize("strategy", ["reflow", "standard"])
def test_what_the_caller_fixes_is_one_for_each_frame(policy, teacher, batch, noise_and_time, strategy, name, asked):
    """Either of the two by itself makes the recipe's number of couplings one."""
    fixed = dict(zip(("noise", "time"), noise_and_time, strict=True))[name]
    attach_plain(policy, teacher, strategy=strategy, recipe=Recipe(couplings_per_frame=3))
    losses = losses_of(policy, batch, **{name: fixed})
    ((_, noise, time),) = asked
    assert torch.equal({"noise": noise, "time": time}[name], fixed)
    assert len(noise) == len(time) == len(losses) == 4


def test_standard_draws_the_noise_and_the_times_of_stock_training(policy, teacher, batch):
    """Same seed, same loss, whatever distribution of t the recipe has for couplings."""
    torch.manual_seed(0)
    stock = loss_of(policy, batch)
    attach_plain(policy, teacher, strategy="standard")
    torch.manual_seed(0)
    assert torch.equal(loss_of(policy, batch), stock)


def test_standard_takes_several_noises_for_each_frame(policy, teacher, batch, asked):
    """Against LeRobot's own loss of a batch in which each frame stands three times, with the same noise and times."""
    attach_plain(policy, teacher, strategy="standard", recipe=Recipe(couplings_per_frame=3))
    losses = losses_of(policy, batch)
    ((_, noise, time),) = asked
    detach(policy)
    torch.testing.assert_close(losses, by_frame(losses_of(policy, repeated(batch, 3), noise, time)))


def test_a_weighted_loss_leaves_recorded_frames_alone(policy, teacher, batch, noise_and_time):
    weight = torch.linspace(0.0, 3.0, WIDTH)[None, None, :]
    register_loss_strategy("weighed")(lambda step: weight * step.losses(step.coupling()))

    def per_frame(strategy, **recipe):
        with attach_plain(policy, teacher, strategy=strategy, recipe=plain(**recipe), solver="midpoint"):
            return losses_of(policy, batch, *noise_and_time)

    losses = reflow_losses(policy, teacher, batch, *noise_and_time)
    unweighed_alone, weighed_alone = by_frame(losses), by_frame(weight * losses)
    assert not torch.isclose(weighed_alone, unweighed_alone).any()
    assert_close(per_frame("weighed"), weighed_alone)
    unweighed, mixed = (per_frame(strategy, real_data_ratio=0.5) for strategy in ("reflow", "weighed"))
    assert_close(mixed[2:] / unweighed[2:], weighed_alone[2:] / unweighed_alone[2:])
    torch.testing.assert_close(mixed[:2], unweighed[:2])


def test_one_time_for_all_and_one_weight_for_each_frame(policy, teacher, batch, noise):
    """Against the unweighed losses of each frame at that time."""
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None]
    register_loss_strategy("each")(lambda step: weights * step.losses(step.coupling(), times=0.75))
    with attach_plain(policy, teacher, solver="midpoint"):
        unweighed = losses_of(policy, batch, noise, torch.full((4,), 0.75))
    attach_plain(policy, teacher, strategy="each", solver="midpoint")
    torch.testing.assert_close(losses_of(policy, batch, noise), weights[:, 0, 0] * unweighed)


def test_a_source_of_ones_own(policy, teacher, batch, noise_and_time):
    """Any function that couples: the loss is that of the same couplings made online."""
    with attach_plain(policy, teacher, solver="midpoint") as attached:
        expected, online = loss_of(policy, batch, *noise_and_time), attached.source

    def source(observation, *, frames, noise, per_frame):
        assert torch.equal(frames, torch.arange(4))
        assert per_frame == 1
        return online(observation, frames=frames, noise=noise, per_frame=per_frame)

    attach_plain(policy, pairs=source)
    assert policy.model.teacher is None
    torch.testing.assert_close(loss_of(policy, {**batch, "index": torch.arange(4)}, *noise_and_time), expected)


def test_recorded_actions_meet_noise_of_their_own(policy, batch, asked):
    """Not the source's, which may have few for each frame."""
    stored = Coupling(*torch.randn(2, 2, CHUNK, WIDTH))  # of the two frames that need a coupling
    attach_plain(policy, pairs=lambda observation, **_: stored, recipe=plain(real_data_ratio=0.5))
    loss_of(policy, batch)
    (recorded, other_noise, _), (actions, noise, _) = asked
    assert torch.equal(actions, stored.actions)
    assert torch.equal(noise, stored.noise)
    assert torch.equal(recorded, policy.prepare_action(batch)[:2])
    assert not torch.isclose(noise, other_noise).all(dim=(1, 2)).any()


FULL = torch.zeros(4, CHUNK, WIDTH)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((FULL, FULL), "gave a tuple; return a Coupling"),
        (Coupling(FULL[..., :2], FULL), r"gave noise of shape \(4, 5, 2\); \(4, 5, 6\) was asked for"),
        (Coupling(FULL.double(), FULL.double()), "gave noise in torch.float64; torch.float32 was asked for"),
    ],
)
def test_a_source_of_something_else_is_refused(policy, batch, made, message):
    attach_plain(policy, pairs=lambda observation, **_: made)
    with pytest.raises(ReflowError, match=message):
        loss_of(policy, batch)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda step: step.losses(step.coupling(), times=torch.ones(4)),
            r"times of shape \(4,\) were given for 8 lines",
        ),
        (lambda step: step.losses(step.coupling(), times="betta"), "time_sampling 'betta' is unknown"),
        (lambda step: step.losses(Coupling(FULL[:3], FULL[:3])), "3 lines for 4 frames: each frame needs as many"),
        (
            lambda step: step.log("errors", torch.zeros(4)),
            "The metric 'errors' has 4 numbers; log one, such as its mean",
        ),
    ],
)
def test_misuse_is_refused(steps, ask, message):
    with pytest.raises(ReflowError, match=message):
        steps(ask, plain(couplings_per_frame=2))


def test_no_teacher_no_velocity(steps):
    with pytest.raises(ReflowError, match="No teacher is attached whose velocity could be asked for"):
        steps(lambda step: step.teacher_velocity(FULL, torch.ones(4)), teacher=None, pairs=lambda *_, **__: None)
