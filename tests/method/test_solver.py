"""ODE solvers: their order on a flow whose solution is known, and on SmolVLA against other code."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import SMOOTH
from oracle import Flow
from torchdiffeq import odeint

from smolvla_reflow import ReflowError, Solver, attach
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of
from smolvla_reflow.solver import ADAPTIVE, FIXED_STEP, JITTERED


class RiccatiFlow:
    """dx/dt = t x^2, which carries x at t = 1 to x / (1 + x / 2) at t = 0."""

    def __init__(self):
        self.times = []

    @property
    def evaluations(self):
        return len(self.times)

    def __call__(self, x, t):
        self.times.append(t)
        return t * x**2

    def solution(self, noise):
        return noise / (1 + noise / 2)


@pytest.fixture
def start():
    return torch.linspace(0.1, 2, 24, dtype=torch.float64).reshape(2, 3, 4)


def error(solver, noise):
    flow = RiccatiFlow()
    return (solver.integrate(flow, noise) - flow.solution(noise)).abs().max().item(), flow.evaluations


@pytest.mark.parametrize(("method", "order", "evaluations"), [("euler", 1, 1), ("midpoint", 2, 2), ("rk4", 4, 4)])
def test_a_fixed_step_method_converges_with_its_order(start, method, order, evaluations):
    coarse, used = error(Solver(method, num_steps=160), start)
    fine, _ = error(Solver(method, num_steps=320), start)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert used == 160 * evaluations


@pytest.mark.parametrize("method", [method for method in FIXED_STEP if method != JITTERED])
def test_a_fixed_step_method_is_torchdiffeqs_of_that_name(start, method):
    """On a field that is not linear in anything."""
    expected = odeint(lambda t, x: t * x**2, start, torch.linspace(1, 0, 10, dtype=torch.float64), method=method)
    found = Solver(method, num_steps=9).integrate(RiccatiFlow(), start)
    torch.testing.assert_close(found, expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_jittered_is_the_midpoint_rule_on_a_shifted_grid(start, count):
    """Against the rule written out on the grid on which the velocity was asked for."""
    ends = []
    for seed in range(3):
        torch.manual_seed(seed)
        flow = RiccatiFlow()
        end = Solver(JITTERED, num_steps=count).integrate(flow, start)
        assert flow.evaluations == 2 * count
        times = [*flow.times[::2], 0.0]
        assert times[0] == 1.0
        assert flow.times[1::2] == pytest.approx([(before + after) / 2 for before, after in pairwise(times)])
        lengths = [before - after for before, after in pairwise(times)]
        if count > 1:  # all equal; the first and the last are two parts of one
            assert [*lengths[1:-1], lengths[0] + lengths[-1]] == pytest.approx([1 / (count - 1)] * (count - 1))
        x = start
        for before, after in pairwise(times):
            h = before - after
            half_way = x - h / 2 * before * x**2
            x = x - h * (before - h / 2) * half_way**2
        torch.testing.assert_close(end, x)
        ends.append(end)
    assert count == 1 or not torch.equal(ends[0], ends[1])


def test_shifted_grids_average_out_what_a_fixed_one_repeats():
    """A velocity that is as rough in time as the grid is fine: its integral is 0, and each midpoint sees its crest.

    All that is left is what the two partial steps at the ends do on average, 1 / (4 pi^2) * 2 each.
    """
    noise, rough = torch.zeros(1, 1, 1, dtype=torch.float64), lambda x, t: torch.full_like(x, math.cos(8 * math.pi * t))
    fixed = Solver("midpoint", num_steps=4).integrate(rough, noise).item()
    assert abs(fixed) == pytest.approx(1.0)
    torch.manual_seed(0)
    shifted = [Solver(JITTERED, num_steps=5).integrate(rough, noise).item() for _ in range(400)]
    assert sum(shifted) / len(shifted) == pytest.approx(1 / math.pi**2, abs=0.1)  # 4 standard errors


def test_jittered_takes_as_many_evaluations_as_the_stock_sampler():
    assert Solver(JITTERED).resolved(10) == Solver(JITTERED, num_steps=5)
    assert Solver(JITTERED).resolved(1) == Solver(JITTERED, num_steps=1)
    assert Solver(JITTERED, num_steps=3).resolved(10) == Solver(JITTERED, num_steps=3)
    flow = RiccatiFlow()
    Solver(JITTERED).integrate(flow, torch.ones(1, 1, 1), num_steps=10)
    assert flow.evaluations == 10


def test_dopri5_meets_its_tolerance_at_the_cost_of_a_fifth_order_method(start):
    """Such a method needs tolerance^(-1/5) steps; one of order 3 would need tolerance^(-1/3)."""
    costs = []
    for tolerance in (1e-7, 1e-9, 1e-11):
        off, evaluations = error(Solver("dopri5", rtol=tolerance, atol=tolerance), start)
        assert off < 30 * tolerance
        costs.append(evaluations)
    assert math.log(costs[-1] / costs[0]) / math.log(1e4) == pytest.approx(1 / 5, abs=0.05)


def test_the_default_tolerance_is_1e_5(start):
    assert error(Solver("dopri5"), start) == error(Solver("dopri5", rtol=1e-5, atol=1e-5), start)


def test_each_tolerance_is_its_own(start):
    """Against torchdiffeq asked directly, with tolerances that are far apart."""
    for tolerances in ({"rtol": 1e-3, "atol": 1e-8}, {"rtol": 1e-8, "atol": 1e-3}):
        found = Solver("dopri5", **tolerances).integrate(RiccatiFlow(), start)
        times = torch.tensor([1.0, 0.0], dtype=torch.float64)
        expected = odeint(lambda t, x: t * x**2, start, times, method="dopri5", **tolerances)[-1]
        assert torch.equal(found, expected)


def test_what_is_left_open_is_filled_in():
    """As a manifest stores it; what is given stays."""
    assert Solver("midpoint").resolved(7) == Solver("midpoint", num_steps=7)
    assert Solver("rk4", num_steps=3).resolved(7) == Solver("rk4", num_steps=3)
    assert Solver("dopri5", rtol=1e-3).resolved(7) == Solver("dopri5", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri"}, "solver=dopri is unknown; known are: euler, .*dopri5. Did you mean 'dopri5'"),
        ({"num_steps": 0}, "num_steps=0: the teacher needs at least one ODE step"),
        ({"method": "rk4", "num_steps": -3}, "at least one ODE step"),
        ({"method": "dopri5", "num_steps": 5}, "chooses its own steps; give rtol and atol"),
        ({"method": "midpoint", "rtol": 1e-3}, "has fixed steps; give num_steps instead"),
        ({"method": "dopri5", "atol": 0.0}, "atol=0.0: a tolerance is a positive number"),
        ({"method": "dopri5", "rtol": float("nan")}, "rtol=nan"),
        ({"method": "dopri5", "rtol": float("inf")}, "rtol=inf: a tolerance is a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ReflowError, match=message):
        Solver(**arguments)


def test_a_velocity_that_is_not_finite_is_an_error(start):
    with pytest.raises(ReflowError, match="cannot be solved by dopri5"):
        Solver("dopri5").integrate(lambda x, t: x * float("nan"), start)


# --- on SmolVLA -----------------------------------------------------------------------------------------------


@torch.no_grad()
def solve(policy, observation, noise, solver):
    return solver.integrate(velocity_of(policy.model, observation), noise, policy.config.num_steps)


def midpoint(v, x, t, h):
    return x - h * v(x - h / 2 * v(x, t), t - h / 2)


def three_eighths(v, x, t, h):
    k1 = v(x, t)
    k2 = v(x - h * k1 / 3, t - h / 3)
    k3 = v(x - h * (k2 - k1 / 3), t - 2 * h / 3)
    k4 = v(x - h * (k1 - k2 + k3), t - h)
    return x - h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


@pytest.mark.parametrize(("method", "step"), [("midpoint", midpoint), ("rk4", three_eighths)])
def test_couplings_equal_an_independent_solution(policy, teacher, batch, noise_and_time, method, step):
    noise, _ = noise_and_time
    attach(policy, teacher, solver=Solver(method, num_steps=3))
    coupling = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise)

    flow, x = Flow(teacher, batch), noise
    with torch.no_grad():
        for i in range(3):
            x = step(lambda x, t: flow.velocity(x, torch.full((len(x),), t)), x, 1 - i / 3, 1 / 3)
    torch.testing.assert_close(coupling.actions, x, rtol=1e-4, atol=1e-5)
    assert coupling.actions.dtype == torch.float32


def test_dopri5_finds_the_solution_that_euler_creeps_up_to(make_policy, batch, noise_and_time):
    noise, _ = noise_and_time
    policy, teacher = make_policy(seed=0, **SMOOTH), make_policy(seed=1, **SMOOTH)
    attach(policy, teacher, solver=Solver("dopri5", rtol=1e-6, atol=1e-6))
    actions = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise).actions
    flow = Flow(teacher, batch)
    with torch.no_grad():
        distances = [(flow.euler(noise, n) - actions).abs().max().item() for n in (25, 50, 100)]
    assert distances[0] / distances[1] == pytest.approx(2, abs=0.2)
    assert distances[1] / distances[2] == pytest.approx(2, abs=0.2)


def test_couplings_take_at_least_ten_steps_whatever_the_teachers_config_says():
    """One that `--write_num_steps` made 1 or 2. What is asked for is done."""
    for own, taken in ((1, 10), (2, 10), (10, 10), (12, 12)):
        assert Solver("euler").of_couplings(own) == Solver("euler", num_steps=taken)
        assert Solver(JITTERED).of_couplings(own) == Solver(JITTERED, num_steps=taken // 2)
        assert Solver(num_steps=3).of_couplings(own) == Solver(num_steps=3)
        assert Solver("dopri5").of_couplings(own) == Solver("dopri5", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (Solver("midpoint", num_steps=10), "midpoint with num_steps 10 (20 velocity evaluations)"),
        (Solver(JITTERED, num_steps=5), "jittered with num_steps 5 (10 velocity evaluations)"),
        (Solver("rk4", num_steps=1), "rk4 with num_steps 1 (4 velocity evaluations)"),
        (Solver("dopri5", rtol=1e-3, atol=1e-5), "dopri5 with rtol 0.001 and atol 1e-05"),
    ],
)
def test_a_solver_in_words(solver, words):
    assert solver.in_words() == words
    if solver.method in FIXED_STEP:
        flow = RiccatiFlow()
        solver.integrate(flow, torch.ones(1, 1, 1))
        assert f"({flow.evaluations} velocity evaluations)" in words


def test_a_teacher_of_few_steps_couples_in_ten(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time
    observation = observe(policy, batch)
    with torch.no_grad():
        stock = teacher.model.sample_actions(*observation, noise=noise)  # in ten
    teacher.config.num_steps = 2
    with attach(policy, teacher, solver="euler"):
        assert torch.equal(policy.model.generate_reflow_target(*observation, noise=noise).actions, stock)
    with torch.no_grad():
        stock = teacher.model.sample_actions(*observation, noise=noise)
    with attach(policy, teacher, solver=Solver("euler", num_steps=2)):
        assert torch.equal(policy.model.generate_reflow_target(*observation, noise=noise).actions, stock)
    assert torch.equal(solve(teacher, observation, noise, Solver("euler")), stock)  # which is for evaluation


def test_euler_is_the_stock_sampler_with_the_teachers_own_steps(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time
    teacher.config.num_steps = 12
    observation = observe(policy, batch)
    with torch.no_grad():
        stock = teacher.model.sample_actions(*observation, noise=noise)
    for solver in ("euler", Solver("euler", num_steps=12)):
        with attach(policy, teacher, solver=solver):
            assert torch.equal(policy.model.generate_reflow_target(*observation, noise=noise).actions, stock)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_solvers_own_number_of_steps_comes_before_the_policys(make_policy, batch, noise_and_time, method):
    teacher = make_policy(seed=1, **SMOOTH)
    noise, flow = noise_and_time[0].requires_grad_(), Flow(teacher, batch)
    found = solve(teacher, observe(teacher, batch), noise, Solver(method, num_steps=3))
    with torch.no_grad():
        expected = getattr(flow, method)(noise, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad  # whatever the noise does
    assert teacher.config.num_steps == 10


def test_by_default_it_is_jittered_with_as_many_evaluations_as_the_teachers_own_steps(
    policy, teacher, batch, noise_and_time
):
    noise, _ = noise_and_time
    teacher.config.num_steps = 14
    attach(policy, teacher)
    torch.manual_seed(0)
    found = policy.model.generate_reflow_target(*observe(policy, batch), noise=noise).actions
    flow, x, shift = Flow(teacher, batch), noise, torch.manual_seed(0) and torch.rand(()).item()
    ends = [1.0, *(1 - (k + shift) / 6 for k in range(6)), 0.0]
    with torch.no_grad():
        for before, after in pairwise(ends):
            x = midpoint(lambda x, t: flow.velocity(x, torch.full((len(x),), t)), x, before, before - after)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*FIXED_STEP, *ADAPTIVE])
def test_the_prefix_is_encoded_once_per_solve(make_policy, batch, noise_and_time, method):
    noise, _ = noise_and_time
    teacher = make_policy(seed=1, **SMOOTH)
    model, encoded, evaluated = teacher.model, [], []
    embed_prefix, embed_suffix = model.embed_prefix, model.embed_suffix
    vars(model)["embed_prefix"] = lambda *a, **k: encoded.append(1) or embed_prefix(*a, **k)
    vars(model)["embed_suffix"] = lambda *a: evaluated.append(1) or embed_suffix(*a)
    before = dict(vars(model))
    solve(teacher, observe(teacher, batch), noise, Solver(method, num_steps=None if method in ADAPTIVE else 4))
    assert len(encoded) == 1
    assert len(evaluated) >= 4
    assert vars(model) == before


def test_a_solver_for_the_teacher_does_not_change_the_policys_own_sampling(policy, teacher, batch, noise_and_time):
    noise, _ = noise_and_time
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    attach(policy, teacher, solver=Solver("rk4", num_steps=2))
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise), expected)
