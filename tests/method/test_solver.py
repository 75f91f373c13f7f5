"""ODE solvers: their order on a flow whose solution is known, and on SmolVLA against other code."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import SMOOTH, assert_close, prefixes_encoded
from oracle import Flow, euler, inputs_of, midpoint, three_eighths
from torchdiffeq import odeint

from smolvla_reflow import ReflowError, Solver, attach
from smolvla_reflow.smolvla.observation import Observation
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


@pytest.fixture
def draw(monkeypatch):
    """Fixes the random number of `jittered`."""
    return lambda u: monkeypatch.setattr(torch, "rand", lambda size: torch.full(size, u, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
def test_jittered_reads_the_velocity_once_in_each_interval_of_a_shifted_grid(start, draw, count, u):
    """Against the rule written out. There are two intervals for each step."""
    draw(u)
    flow, h = RiccatiFlow(), 1 / (2 * count - 1)
    end = Solver(JITTERED, num_steps=count).integrate(flow, start)
    ends = [1.0, *(1 - (k + u) * h for k in range(2 * count - 1)), 0.0]
    middles = [(before + after) / 2 for before, after in pairwise(ends)]
    read_at = [1 - u**2 * h / 2, *middles[1:-1], (1 - u) ** 2 * h / 2]
    assert flow.times == pytest.approx(read_at)
    x, slope = start, torch.zeros_like(start)
    for (before, after), t in zip(pairwise(ends), read_at, strict=True):
        slope = t * (x - (before - t) * slope) ** 2
        x = x - (before - after) * slope
    torch.testing.assert_close(end, x)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_jittered_gives_every_time_the_same_weight(draw, count):
    """The weight of each fortieth of the time in the actions, averaged over its random number."""
    bins, draws = 40, 4000

    def indicator(x, t):
        return torch.nn.functional.one_hot(torch.tensor(min(bins - 1, int(bins * t))), bins).double().expand_as(x)

    total = torch.zeros(bins, dtype=torch.float64)
    for k in range(draws):
        draw((k + 0.5) / draws)
        noise = torch.zeros(1, 1, bins, dtype=torch.float64)
        total -= Solver(JITTERED, num_steps=count).integrate(indicator, noise)[0, 0]
    torch.testing.assert_close(total / draws, torch.full_like(total, 1 / bins), rtol=0.02, atol=0)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
def test_jittered_is_of_second_order_wherever_its_grid_lies(start, draw, u):
    draw(u)
    errors = [error(Solver(JITTERED, num_steps=count), start)[0] for count in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_shifted_grids_average_out_what_a_fixed_one_repeats():
    """A velocity that is as rough in time as the grid is fine: its integral is 0, and each midpoint sees its crest."""
    noise, rough = torch.zeros(1, 1, 1, dtype=torch.float64), lambda x, t: torch.full_like(x, math.cos(8 * math.pi * t))
    fixed = Solver("midpoint", num_steps=4).integrate(rough, noise).item()
    assert abs(fixed) == pytest.approx(1.0)
    torch.manual_seed(0)
    shifted = [Solver(JITTERED, num_steps=5).integrate(rough, noise).item() for _ in range(400)]
    assert len(set(shifted)) == 400
    assert sum(shifted) / len(shifted) == pytest.approx(0, abs=0.05)


def test_dopri5_meets_its_tolerance_at_the_cost_of_a_fifth_order_method(start):
    """Such a method needs tolerance^(-1/5) steps; one of order 3 would need tolerance^(-1/3)."""
    costs = []
    for tolerance in (1e-7, 1e-9, 1e-11):
        off, evaluations = error(Solver("dopri5", rtol=tolerance, atol=tolerance), start)
        assert off < 30 * tolerance
        costs.append(evaluations)
    assert math.log(costs[-1] / costs[0]) / math.log(1e4) == pytest.approx(1 / 5, abs=0.05)


@pytest.mark.parametrize("given", [{}, {"rtol": 1e-3, "atol": 1e-8}, {"rtol": 1e-8, "atol": 1e-3}])
def test_each_tolerance_is_its_own_and_by_default_1e_5(start, given):
    """Against torchdiffeq asked directly."""
    tolerances, times = {"rtol": 1e-5, "atol": 1e-5, **given}, torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = odeint(lambda t, x: t * x**2, start, times, method="dopri5", **tolerances)[-1]
    assert torch.equal(Solver("dopri5", **given).integrate(RiccatiFlow(), start), expected)


@pytest.mark.parametrize(
    ("solver", "own", "resolved", "of_couplings"),
    [
        (Solver("midpoint"), 7, {"num_steps": 7}, {"num_steps": 10}),
        (Solver("euler"), 12, {"num_steps": 12}, {"num_steps": 12}),
        (Solver("rk4", num_steps=3), 7, {"num_steps": 3}, {"num_steps": 3}),
        (Solver(JITTERED), 1, {"num_steps": 1}, {"num_steps": 5}),
        (Solver(JITTERED), 12, {"num_steps": 6}, {"num_steps": 6}),
        (Solver(JITTERED, num_steps=3), 10, {"num_steps": 3}, {"num_steps": 3}),
        (Solver("dopri5", rtol=1e-3), 7, {"rtol": 1e-3, "atol": 1e-5}, {"rtol": 1e-3, "atol": 1e-5}),
    ],
)
def test_open_values_are_filled_in(solver, own, resolved, of_couplings):
    """As a manifest stores them, from the `num_steps` of a config. Couplings take at least ten steps, also of a teacher
    whose config `--write_num_steps` made 1 or 2. `jittered` takes half as many steps, of two evaluations each."""
    assert solver.resolved(own) == Solver(solver.method, **resolved)
    assert solver.of_couplings(own) == Solver(solver.method, **of_couplings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri"}, "solver=dopri is unknown; known are: euler, .*dopri5. Did you mean 'dopri5'"),
        ({"num_steps": 0}, "num_steps=0: a solver needs at least one ODE step"),
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


@torch.no_grad()
def solve(policy, batch, noise, solver):
    velocity = velocity_of(policy.model, Observation(*inputs_of(policy, batch)))
    return solver.resolved(policy.config.num_steps).integrate(velocity, noise)


def couplings(policy, batch, noise, teacher, solver=None):
    with attach(policy, teacher, solver=solver):
        return policy.model.generate_reflow_target(*inputs_of(policy, batch), noise=noise).actions


@pytest.mark.parametrize(("method", "step"), [("euler", euler), ("midpoint", midpoint), ("rk4", three_eighths)])
def test_couplings_equal_an_independent_solution(policy, teacher, batch, noise, method, step):
    """The solver's own number of steps comes before the teacher's."""
    noise.requires_grad_()
    found = couplings(policy, batch, noise, teacher, Solver(method, num_steps=3))
    assert_close(found, Flow(teacher, batch).solved(noise, 3, step))
    assert_close(found, solve(teacher, batch, noise, Solver(method, num_steps=3)))
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert teacher.config.num_steps == 10


def test_dopri5_finds_the_solution_that_euler_creeps_up_to(make_policy, batch, noise):
    policy, teacher = make_policy(seed=0, **SMOOTH), make_policy(seed=1, **SMOOTH)
    actions = couplings(policy, batch, noise, teacher, Solver("dopri5", rtol=1e-6, atol=1e-6))
    flow = Flow(teacher, batch)
    distances = [(flow.solved(noise, n, euler) - actions).abs().max().item() for n in (25, 50, 100)]
    assert distances[0] / distances[1] == pytest.approx(2, abs=0.2)
    assert distances[1] / distances[2] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("own", "solver", "taken"),
    [
        (12, "euler", 12),
        (10, Solver("euler", num_steps=12), 12),
        (2, "euler", 10),
        (2, Solver("euler", num_steps=2), 2),
    ],
)
def test_euler_is_the_stock_sampler_with_the_teachers_own_steps_but_at_least_ten(
    policy, teacher, batch, noise, own, solver, taken
):
    teacher.config.num_steps = taken
    with torch.no_grad():
        stock = teacher.model.sample_actions(*inputs_of(policy, batch), noise=noise)
    assert torch.equal(solve(teacher, batch, noise, Solver("euler")), stock)  # evaluations take the config's number
    teacher.config.num_steps = own
    assert torch.equal(couplings(policy, batch, noise, teacher, solver), stock)


def test_by_default_it_is_jittered_with_as_many_evaluations_as_the_teachers_own_steps(policy, teacher, batch, noise):
    teacher.config.num_steps = 14
    torch.manual_seed(0)
    u = torch.rand(()).item()
    torch.manual_seed(0)
    found = couplings(policy, batch, noise, teacher)
    velocity = Flow(teacher, batch).velocity
    with torch.no_grad():
        x = noise - u / 13 * (slope := velocity(noise, 1 - u**2 / 26))
        for k in range(12):
            x = x - (slope := velocity(x - slope / 26, 1 - (u + k + 0.5) / 13)) / 13
        left, read = (1 - u) / 13, (1 - u) ** 2 / 26
        x = x - left * velocity(x - (left - read) * slope, read)
    assert_close(found, x)


@pytest.mark.parametrize("method", [*FIXED_STEP, *ADAPTIVE])
def test_the_prefix_is_encoded_once_per_solve(make_policy, batch, noise, method):
    teacher = make_policy(seed=1, **SMOOTH)
    model, evaluated, embed = teacher.model, [], teacher.model.embed_suffix
    vars(model)["embed_suffix"] = lambda *a: evaluated.append(1) or embed(*a)
    encoded, before = prefixes_encoded(model), dict(vars(model))
    solve(teacher, batch, noise, Solver(method, num_steps=None if method in ADAPTIVE else 4))
    assert encoded == [4]
    assert len(evaluated) >= 4
    assert vars(model) == before
