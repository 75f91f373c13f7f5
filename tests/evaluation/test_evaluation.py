"""Metrics against flows with known answers, the evaluation against stock LeRobot, and the command as a user runs it."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import change_config, eval_flags, eval_main, reflow_run, reflow_train_main, refused, write_smooth_workshop
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from oracle import Flow
from safetensors.torch import load_file, save_file

from smolvla_reflow import Solver
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import REPO_ID
from smolvla_reflow.distance import FrameFlow, absolute_error, energy_distance, frame_flow, spread, squared_error
from smolvla_reflow.evaluation import latency, measure
from smolvla_reflow.evaluation import run as eval_run
from smolvla_reflow.evaluation.latency import ChunkTime, left_to_gain, measure_rounds
from smolvla_reflow.evaluation.measure import Cell, Settings, measure_batch, summary
from smolvla_reflow.evaluation.policy import MeasuredPolicy, load_measured_policy
from smolvla_reflow.noise import EVALUATION, pair_noise
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of


def raw_frames(workshop: Path, positions: Sequence[int]) -> dict:
    """A raw batch of these frames with their chunks, as LeRobot reads them."""
    deltas = {"action": [i / 10 for i in range(6)]}
    dataset = LeRobotDataset(REPO_ID, root=workshop / "dataset", delta_timestamps=deltas)
    return torch.utils.data.default_collate([dataset[i] for i in positions])


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_flow_error_of_a_linear_field(n):
    """dx/dt = a x takes x to x e^-a, n Euler steps take it to x (1 - a/n)^n."""
    a, noise = 0.8, torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = Solver("euler", num_steps=n).integrate(lambda x, t: a * x, noise)
    exact = (math.exp(-a) - (1 - a / n) ** n) ** 2 * noise.square().mean(dim=(-2, -1))
    torch.testing.assert_close(squared_error(samples, noise * math.exp(-a)), exact)


def test_straightness_of_a_linear_field():
    """S = x^2 (a (1 - e^-2a) / 2 - (1 - e^-a)^2), by integrating (x_1 - x_0 - a x_t)^2 with x_t = x e^(a (t - 1))."""
    a = 1.3
    noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = noise.square().mean(dim=(-2, -1)) * (a * (1 - math.exp(-2 * a)) / 2 - (1 - math.exp(-a)) ** 2)
    ends, bends = FrameFlow(lambda x, t: a * x, noise, per_frame=1).solve_finely(16, lambda x: x)
    torch.testing.assert_close(bends[:, 0], exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(ends[:, 0], noise * math.exp(-a), rtol=1e-6, atol=0)


def test_the_flow_to_a_point_is_straight():
    point = 0.7
    noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends, bends = FrameFlow(lambda x, t: noise - point, noise, per_frame=2).solve_finely(4, lambda x: x)
    torch.testing.assert_close(ends, torch.full((1, 2, 5, 3), point, dtype=torch.float64))
    assert bends.abs().max() < 1e-20


def test_a_frame_flow_is_the_oracles_from_noises_of_the_seed_and_the_frame(workshop, measured):
    batch = measured.preprocessor(raw_frames(workshop, [3, 40]))
    noise = torch.stack([pair_noise(7, frame, k, (6, 4), EVALUATION) for frame in (3, 40) for k in range(2)])
    repeated = {k: v.repeat_interleave(2, dim=0) for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim}
    with torch.no_grad():
        flow = frame_flow(velocity_of(measured.policy.model, observe(measured.policy, batch)), [3, 40], 2, seed=7)
        expected = Flow(measured.policy, repeated).euler(noise, 3).unflatten(0, (2, 2))
        torch.testing.assert_close(flow.solve(Solver("euler", num_steps=3)), expected, rtol=1e-4, atol=1e-5)
        fine, _ = flow.solve_finely(16, lambda x: x)
        torch.testing.assert_close(fine, flow.solve(Solver("rk4", num_steps=16)), rtol=0, atol=0)


def energy_of_gaussians(shift: float, one: float, other: float) -> float:
    """In one dimension, where E|N(m, s)| = s sqrt(2/pi) e^(-m^2 / 2 s^2) + m erf(m / s sqrt 2)."""

    def mean_size(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))

    return 2 * mean_size(shift, math.hypot(one, other)) - mean_size(0, one * 2**0.5) - mean_size(0, other * 2**0.5)


@pytest.mark.parametrize(("shift", "one", "other"), [(0, 1, 1), (0.5, 1, 1), (0, 1, 0.5), (0.2, 2, 1)])
@pytest.mark.parametrize("same_noise", [False, True])
def test_energy_distance_of_two_gaussians(shift, one, other, same_noise):
    """Without bias, whether what comes from one noise in both sets is alike, or has nothing to do with it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 4, 1, 1, generator=generator)
    another = noise if same_noise else torch.randn(20000, 4, 1, 1, generator=generator)
    found = energy_distance(shift + one * noise, other * another)
    four_sigma = 4 * found.std().item() / 20000**0.5 + 1e-12
    assert found.mean().item() == pytest.approx(energy_of_gaussians(shift, one, other), abs=four_sigma)


def test_a_policy_that_averages_two_modes_is_far_and_one_that_swaps_them_is_not():
    """Ways left and right, of equal worth: -1 and 1. E = 2 E|0 - Y| - 0 - E|Y - Y'| = 2 - 1."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(0, 2, (4000, 4, 1, 1), generator=generator) * 2.0 - 1.0
    teacher, averaging, swapping = sides.expand(-1, -1, 5, 2), torch.zeros(4000, 4, 5, 2), -sides.expand(-1, -1, 5, 2)
    assert energy_distance(averaging, teacher).mean().item() == pytest.approx(1.0, abs=0.02)
    found = energy_distance(swapping, teacher)
    assert found.mean().item() == pytest.approx(0.0, abs=4 * found.std().item() / 4000**0.5)
    assert squared_error(swapping, teacher).mean().item() == 4.0  # as far as it can be, noise by noise


def test_a_student_that_averages_two_modes_has_no_spread():
    sides = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1, 1).expand(6, 4, 5, 2)
    jitter = 0.01 * torch.randn(6, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    assert (spread(jitter).mean() / spread(sides + jitter).mean()).item() < 1e-3
    torch.testing.assert_close(spread(sides), torch.full((6,), 4 / 3))  # unbiased: 4 / (4 - 1)


def test_action_error_leaves_out_the_steps_that_were_not_recorded():
    """Worked by hand: two noises, two steps of which the second frame has one, two dimensions."""
    actions = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]], [[3.0, 4.0], [0.0, 0.0]]]]).repeat(2, 1, 1, 1)
    recorded = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).repeat(2, 1, 1)
    exists = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(absolute_error(actions, recorded, exists), torch.tensor([[1.0 + 1.0, 2.0], [1.0, 2.0]]))


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory):
    return write_smooth_workshop(workshop, tmp_path_factory.mktemp("smooth"))


@pytest.fixture(scope="module")
def student(workshop, tmp_path_factory):
    run = tmp_path_factory.mktemp("student") / "run"
    reflow_train_main(reflow_run(workshop, run, steps=10))
    return run / LAST


def run_eval(workshop: Path, output_dir: Path, **changes) -> dict:
    return eval_main(eval_flags(workshop, output_dir, **changes))


@pytest.fixture(scope="module")
def against(workshop, student):
    """Flags that measure the student against the teacher."""
    return {"policy__path": student, "teacher_path": workshop / "1rf" / LAST}


@pytest.fixture(scope="module")
def report(workshop, against, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    run_eval(workshop, folder, **against)
    return folder


def row_of(report: dict, policy: str, num_steps: int) -> dict:
    (row,) = [row for row in report["rows"] if (row["policy"], row["num_steps"]) == (policy, num_steps)]
    return row


def test_numbers_equal_an_independent_derivation(workshop, student, report):
    """Stock processors and sampler, the oracle's flow in many Euler steps as the fine solution, numpy for the rest.

    The velocities are smooth in time, so both fine solutions are exact to a few digits beyond these tolerances.
    """
    found = json.loads((report / "report.json").read_text())
    frames, noises = [0, 9, 19, 28, 38, 47], 3
    meta, raw = LeRobotDataset(REPO_ID, root=workshop / "dataset").meta, raw_frames(workshop, frames)
    std, there, bends = np.asarray(meta.stats["action"]["std"]), ~raw["action_is_pad"].numpy(), {}

    def bend(flow, noise, num_steps):
        """Mean over the path of (x_1 - x_0 - v)^2 in the robot's dimensions, which the policies normalise by `std`."""
        x, points, velocities = noise, [], []
        for step in range(num_steps + 1):
            points.append(x)
            velocities.append(flow.velocity(x, torch.full((len(x),), 1 - step / num_steps)))
            x = x - velocities[-1] / num_steps
        off = (points[0] - points[-1] - torch.stack(velocities))[..., :2].square().mean(dim=(1, 2, 3))
        return torch.trapezoid(off, dx=1 / num_steps).item()

    def chunks(path, num_steps):
        """(noises, frames, T, D) in robot units; num_steps=None for the fine solution."""
        policy = SmolVLAPolicy.from_pretrained(path).eval()
        preprocessor, postprocessor = make_pre_post_processors(policy.config, str(path))
        batch = preprocessor(dict(raw))
        result = []
        for k in range(noises):
            noise = torch.stack([pair_noise(0, frame, k, (6, 4), EVALUATION) for frame in frames])
            if num_steps is None:
                with torch.no_grad():
                    # Richardson's extrapolation cancels the error of order two.
                    flow = Flow(policy, batch)
                    chunk = ((4 * flow.midpoint(noise, 80) - flow.midpoint(noise, 40)) / 3)[..., :2]
                    bends.setdefault(path, []).append(bend(flow, noise, 200))
            else:
                policy.config.num_steps = num_steps
                chunk = policy.predict_action_chunk(batch, noise=noise)
            result.append(torch.stack([postprocessor(chunk[:, i]) for i in range(6)], dim=1).numpy())
        return np.stack(result)

    paths = {"teacher": workshop / "1rf" / LAST, "student": student}
    fine = {name: chunks(path, None) for name, path in paths.items()}
    for name, path in paths.items():
        for n in (1, 2, 10):
            row, sampled, taught = row_of(found, name, n), chunks(path, n), fine["teacher"]
            off = np.abs(sampled - raw["action"].numpy())
            spread_ratio = np.divide(*((each / std).var(axis=0, ddof=1).mean() for each in (sampled, taught)))
            # An energy distance is a small difference of large ones.
            distance = pytest.approx(energy_of_chunks(sampled / std, taught / std), rel=1e-3, abs=1e-6)
            assert row["energy_distance"]["value"] == distance, (name, n)
            expected = {
                "flow_rmse": (np.sqrt((((sampled - taught) / std) ** 2).mean()), 1e-4),
                "own_flow_rmse": (np.sqrt((((sampled - fine[name]) / std) ** 2).mean()), 1e-4),
                "spread_ratio": (spread_ratio, 1e-4),
                "straightness": (np.mean(bends[path]), 0.01),
                "action_mae": (off[:, there].mean(), 1e-4),
                "action_mae_executed": (off[:, :, :2][:, there[:, :2]].mean(), 1e-4),
                "action_mae_per_dim": (off[:, there].mean(axis=(0, 1)).tolist(), 1e-4),
            }
            for key, (value, rel) in expected.items():
                assert row[key] == pytest.approx(value, rel=rel), (name, n, key)


def energy_of_chunks(x: np.ndarray, y: np.ndarray) -> float:
    """From (noises, frames, T, D): mean over frames of 2 |x - y| - |x - x'| - |y - y'| over pairs of other noises."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]

    def mean_size(a, b):
        return np.mean([np.sqrt(((a[i] - b[j]) ** 2).mean(axis=(1, 2))).mean() for i, j in pairs])

    return float(2 * mean_size(x, y) - mean_size(x, x) - mean_size(y, y))


def test_the_report_says_what_it_was_made_with(workshop, student, report):
    found = json.loads((report / "report.json").read_text())
    assert found["complete"]
    names = "policy num_steps energy_distance flow_rmse own_flow_rmse action_mae action_mae_executed action_mae_per_dim"
    names += " spread_ratio straightness latency_ms_p50 latency_ms_p95 speedup delay success"
    assert list(found["rows"][0]) == names.split()
    assert list(found["rows"][0]["energy_distance"]) == ["value", "low", "high"]
    cells = [(name, n) for name in ("teacher", "student") for n in (1, 2, 10)]
    assert [(r["policy"], r["num_steps"]) for r in found["rows"]] == cells
    assert found["made_with"]["student's path"] == str(student.resolve())
    assert found["made_with"]["teacher's path"] == str((workshop / "1rf" / LAST).resolve())
    assert found["made_with"]["version of smolvla-reflow"]
    assert found["references"]["teacher"]["steps"] == 20
    assert 0 < found["references"]["teacher"]["rmse"] < found["rows"][0]["flow_rmse"]
    reference = row_of(found, "teacher", 10)
    assert reference["speedup"] == 1
    for r in found["rows"]:
        assert 0 < r["latency_ms_p50"] <= r["latency_ms_p95"]
        assert r["speedup"] * r["latency_ms_p50"] == pytest.approx(reference["latency_ms_p50"])
    in_words = (report / "report.md").read_text()
    assert found["recommendation"] in in_words
    assert "| teacher | 10 |" in in_words
    # The width is 3.4 inches, a paper's column, at 300 dots an inch.
    assert matplotlib.image.imread(report / "report.png").shape[:2] == (1290, 1020)


def test_another_seed_gives_another_report(workshop, against, report, tmp_path):
    """The same seed gives the same report (test_unfinished.py)."""
    first = json.loads((report / "report.json").read_text())
    found = run_eval(workshop, tmp_path / "seed", seed=1, **against)
    assert row_of(found, "student", 2)["action_mae"] != row_of(first, "student", 2)["action_mae"]


def test_a_policy_alone(workshop, tmp_path, capsys):
    found, said = run_eval(workshop, tmp_path / "alone", reference_steps=64), capsys.readouterr().out
    assert {row["policy"] for row in found["rows"]} == {"policy"}
    assert all(row["flow_rmse"] == row["own_flow_rmse"] for row in found["rows"])
    assert found["decision"]["bar"] == ["policy", 10]
    assert found["two_errors"] == {}
    assert found["recommended_num_steps"] is None
    assert "Nothing is recommended: 6 frames of 6 episodes are too few" in said
    assert "give --reference_steps" not in said


def test_rounds_in_one_report(workshop, student, against, tmp_path):
    """Each round has the rows it has when it is measured alone against the same teacher; the last is judged."""
    reflow_train_main(reflow_run(workshop, tmp_path / "run", reflow__teacher_path=student))
    of_last = {**against, "policy__path": tmp_path / "run" / LAST}
    rounds = {"round 1": against, "student": of_last}
    alone = {name: run_eval(workshop, tmp_path / name, **flags) for name, flags in rounds.items()}
    found = run_eval(workshop, tmp_path / "all", earlier_rounds=f"[{student}]", **of_last)
    assert list(dict.fromkeys(row["policy"] for row in found["rows"])) == ["teacher", *rounds]
    for n in (1, 2, 10):
        for name in rounds:
            assert row_of(found, name, n)["flow_rmse"] == row_of(alone[name], "student", n)["flow_rmse"]
        assert row_of(found, "round 1", n)["flow_rmse"] != row_of(found, "student", n)["flow_rmse"]
    assert found["made_with"]["round 1's path"] == str(student.resolve())
    assert found["recommended_num_steps"] == alone["student"]["recommended_num_steps"]
    assert matplotlib.image.imread(tmp_path / "all" / "report.png").shape[:2] == (1290, 1020)


def test_the_reference_is_not_moved_by_the_students_statistics(workshop, student, against, tmp_path):
    """A student whose statistics are scaled by 2 acts twice as far in robot units, and is measured so."""
    other = Path(shutil.copytree(student, tmp_path / "other"))
    (file,) = other.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    stats = load_file(file)
    stats["action.std"] *= 2
    save_file(stats, file)
    plain = run_eval(workshop, tmp_path / "a", **against)
    scaled = run_eval(workshop, tmp_path / "b", **{**against, "policy__path": other})
    assert row_of(scaled, "teacher", 2)["flow_rmse"] == row_of(plain, "teacher", 2)["flow_rmse"]
    for name, n, rel in (("spread_ratio", 2, 1e-3), ("straightness", 1, 1e-6)):
        assert row_of(scaled, "student", n)[name] / row_of(plain, "student", n)[name] == pytest.approx(4, rel=rel)


def test_each_policy_is_judged_by_the_steps_that_it_executes(workshop):
    """A copy of the teacher that looks again after other steps has the error of those steps."""
    checkpoint = open_checkpoint(workshop / "1rf" / LAST)
    batch, settings = raw_frames(workshop, [0, 10]), Settings(torch.ones(2), [2], 2, reference_steps=2, seed=0)

    def executed_error(policies):
        rows = summary(measure_batch(policies, batch, settings), Cell(policies[0].name, 10))
        return row_of({"rows": rows}, policies[-1].name, 2)["action_mae_executed"]

    teacher, student = (load_measured_policy(name, checkpoint, "cpu", {}) for name in ("teacher", "student"))
    student.policy.config.n_action_steps = 5
    assert executed_error([teacher, student]) == pytest.approx(executed_error([student]))
    assert executed_error([student]) != pytest.approx(executed_error([teacher]))


def test_a_dimension_that_never_moves_counts_in_the_action_error_alone():
    """Against the same solutions cut to the dimension that moves."""
    n, k, t = 2, 3, 4
    fine, sampled, reference = torch.randn(3, n, k, t, 2, generator=torch.Generator().manual_seed(0))
    batch = {"action": torch.zeros(n, t, 2), "action_is_pad": torch.zeros(n, t, dtype=torch.bool)}

    def metrics(std):
        width, settings = len(std), Settings(torch.tensor(std), [1], k, 2, seed=0)
        cut = [actions[..., :width] for actions in (fine, sampled, reference)]
        solved = measure.Solutions({1: cut[1]}, cut[0], torch.zeros(n, k))
        of_width = {**batch, "action": batch["action"][..., :width]}
        return measure.frame_metrics(solved, 1, cut[2], of_width, executed=2, settings=settings)

    found, expected = metrics([0.5, 0.0]), metrics([0.5])
    for name in ("flow_error", "own_flow_error", "spread", "fine_spread", "energy_distance"):
        assert torch.equal(found[name], expected[name])
        assert (found[name] != 0).all()
    assert torch.equal(found["action_error"][:, :1], expected["action_error"])
    assert found["action_error"].shape == found["action_error_executed"].shape == (n, 2)


def test_the_error_of_the_fine_solutions_is_the_change_by_the_last_doubling(workshop, measured):
    """And by the triangle inequality no flow error is off by more than the fine solutions are."""
    batch, tables, ends = raw_frames(workshop, [0, 9]), {}, {}
    for steps in (2, 4, 64):
        settings = Settings(torch.ones(2), [1, 10], 2, steps, seed=0)
        tables[steps] = measure_batch([measured], batch, settings, check_fine=steps == 4)
        with measured.inference(10):
            ends[steps] = measure.solve(measured, batch, [1], settings, check_fine=False).fine
    change, off = ((ends[4] - ends[steps]).square().mean().sqrt().item() for steps in (2, 64))
    assert measure.fine_errors(tables[4]) == {"policy": pytest.approx(change, rel=1e-2)}
    for row, true in zip(*(summary(tables[steps], Cell("policy", 10)) for steps in (4, 64)), strict=True):
        assert row["flow_rmse"] == pytest.approx(true["flow_rmse"], abs=off + 1e-6)
    assert "fine_error" not in tables[2]


def test_coarse_fine_solutions_are_called_out(workshop, tmp_path, capsys):
    """Only the first batch is solved again with half the steps."""
    found = run_eval(workshop, tmp_path / "r", reference_steps=2, batch_size=3)
    assert found["references"]["policy"]["steps"] == 2
    assert found["references"]["policy"]["rmse"] > 0.2 * min(row["flow_rmse"] for row in found["rows"])
    assert "give --reference_steps=4." in capsys.readouterr().out


class Clock:
    """A clock that only the policies move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: 0.0))

    def taking(self, seconds, function):
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


def test_chunks_are_timed_in_rounds_after_a_warm_up(policy, monkeypatch):
    """Two policies at two numbers of steps each; a robot has no recorded actions to prepare."""
    clock, seen = Clock(monkeypatch), []
    monkeypatch.setattr(latency, "os", SimpleNamespace(getloadavg=lambda: (5.0, 2.0, 1.0), cpu_count=lambda: 4))

    def chunk(observation):
        seen.append((policy.config.num_steps, sorted(observation)))
        clock.now += len(seen) / 1e3

    vars(policy)["predict_action_chunk"] = chunk
    measured = MeasuredPolicy("policy", policy, lambda frame: frame, None, None, 10)
    frame = {"observation.state": torch.zeros(1, 3), "action": torch.zeros(1), "action_is_pad": torch.zeros(1)}
    found = measure_rounds([(measured, [1, 4]), (measured, [2, 3])], frame)
    in_turn = [(n, ["observation.state"]) for n in (1, 4, 2, 3)]
    assert seen == in_turn * 33
    expected = [[[4 * turn + place for turn in range(3, 33)] for place in places] for places in ((1, 2), (3, 4))]
    np.testing.assert_allclose(found.times, expected)
    assert found.load == 1.25
    assert policy.config.num_steps == 10


def test_slow_chunks_are_timed_in_five_rounds(policy, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(latency.time, "monotonic", lambda: clock.now)
    vars(policy)["predict_action_chunk"] = clock.taking(20.0, lambda observation: None)
    measured = MeasuredPolicy("policy", policy, lambda frame: frame, None, None, 10)
    ((times,),), _ = measure_rounds([(measured, [1])], {"observation.state": torch.zeros(1, 3)})
    assert times == pytest.approx([20e3] * 5)


def test_prefix_and_step_are_told_apart(workshop, measured, monkeypatch):
    """By a clock that each part of the real policy moves by its own amount."""
    model, clock = measured.policy.model, Clock(monkeypatch)
    monkeypatch.setitem(vars(model), "embed_prefix", clock.taking(0.030, model.embed_prefix))
    monkeypatch.setitem(vars(model), "denoise_step", clock.taking(0.007, model.denoise_step))
    (times,), _ = measure_rounds([(measured, [1, 3, 10])], raw_frames(workshop, [0]))
    chunk = ChunkTime.fit([1, 3, 10], times)
    assert (chunk.prefix, chunk.step, chunk.late) == pytest.approx((30, 7, 0), abs=1e-6)
    assert (chunk.p50(3), chunk.p95(3)) == pytest.approx((51, 51))


def test_a_busy_machine_does_not_put_two_steps_behind_five(capsys):
    """A third of the calls take up to three times as long. The line is found to 3 %, and the busy machine is said."""
    generator, steps = np.random.default_rng(0), [1, 2, 5, 10]
    times = np.array([[20 + 4 * n] * 30 for n in steps]) * (1 + 0.01 * generator.standard_normal((4, 30)))
    held_up = times * np.where(generator.random((4, 30)) < 1 / 3, generator.uniform(1, 3, (4, 30)), 1.0)
    idle, busy = ChunkTime.fit(steps, times), ChunkTime.fit(steps, held_up)
    for found, within in ((idle, 0.01), (busy, 0.12)):
        assert [found.p50(n) for n in steps] == pytest.approx([20 + 4 * n for n in steps], rel=within)
        assert sorted(map(found.p50, steps)) == list(map(found.p50, steps))
    assert idle.late == pytest.approx(0.0165, abs=0.005)  # 1.645 standard deviations
    assert "The machine was busy" not in left_to_gain(idle, 2)
    assert f"The machine was busy (load 0.0 for each processor, one chunk in twenty over {busy.late:.0%} late)" in (
        left_to_gain(busy, 2)
    )
    loaded = ChunkTime.fit(steps, times, load=3.4)  # so evenly that the times do not show it
    assert "The machine was busy (load 3.4 for each processor" in left_to_gain(loaded, 2)


def test_what_is_left_to_gain_in_words():
    assert left_to_gain(ChunkTime(60.0, 20.0, 0.1), num_steps=2) == (
        "A chunk at num_steps=2 takes 100.0 ms: 60.0 ms for images, language and state, which are encoded once, and "
        "20.0 ms for each ODE step; one step instead would save another 20.0 ms (20%)."
    )
    assert "Nothing more can be gained by fewer steps." in left_to_gain(ChunkTime(60.0, 20.0, 0.1), num_steps=1)


def test_a_low_bar_is_called_out_and_can_be_raised(workshop, checkpoint, against, tmp_path, capsys):
    """A teacher that --write_num_steps has set to two steps."""
    change_config(checkpoint, num_steps=2)
    flags = {**against, "teacher_path": checkpoint, "num_steps": "[1]", "num_frames": 2}
    low = run_eval(workshop, tmp_path / "low", **flags)
    (note,) = low["notes"]
    assert low["decision"]["bar"] == ["teacher", 2]
    assert "it is the teacher with 2 steps" in note
    assert "--bar_num_steps=10" in note
    assert note in capsys.readouterr().out
    high = run_eval(workshop, tmp_path / "high", bar_num_steps=5, **flags)
    assert (high["decision"]["bar"], high["notes"]) == (["teacher", 5], [])
    assert row_of(high, "teacher", 5)["speedup"] == 1


def test_no_recommendation_says_what_would_help(workshop, student, against, tmp_path, capsys, monkeypatch):
    """With a student measured at 1 step, at the 3 that are its own default, and at the 10 of its teacher."""
    monkeypatch.setattr("smolvla_reflow.evaluation.decision.FEWEST_FRAMES", 6)
    monkeypatch.setattr("smolvla_reflow.evaluation.decision.FEWEST_EPISODES", 5)
    poor = Path(shutil.copytree(student, tmp_path / "poor"))
    change_config(poor, num_steps=3)
    weights = load_file(poor / "model.safetensors")
    weights["model.action_out_proj.bias"] += 3.0  # its actions end some three deviations off, at any number of steps
    save_file(weights, poor / "model.safetensors", {"format": "pt"})
    flags = {**against, "policy__path": poor, "num_steps": "[1]"}
    found = run_eval(workshop, tmp_path / "report", write_num_steps="true", **flags)
    assert [row["num_steps"] for row in found["rows"] if row["policy"] == "student"] == [1, 3, 10]
    assert found["recommended_num_steps"] is None
    said = capsys.readouterr().out
    assert "No number of steps is shown to be as good as the teacher's own 10 steps" in said
    errors = found["two_errors"]["student"]
    assert 2 < errors["r"] < 4
    assert errors["r"] == pytest.approx(row_of(found, "student", 10)["flow_rmse"], rel=0.02)
    assert f"actions in the wrong place (r = {errors['r']:.3f}" in said
    assert errors["holds"]
    assert "Stored num_steps" not in said
    assert json.loads((poor / "config.json").read_text())["num_steps"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"policy__path": None}, "Name the checkpoint to evaluate"),
        ({"dataset__repo_id": None}, "Name the dataset to measure on"),
        ({"output_dir": None}, "Name a folder for the report"),
        ({"output_dir": "{workshop}"}, "exists already; name a new folder"),
        ({"num_steps": "[0,1]"}, "num_steps=0: "),
        ({"num_noises": 1}, "--num_noises=1: at least 2 is needed"),
        ({"reference_steps": 1}, "--reference_steps=1: at least 2 is needed"),
        ({"energy_margin": 0}, "--energy_margin=0.0: give a number above 0"),
        ({"success_margin": 5}, "--success_margin=5.0: give a share between 0 and 1"),
        ({"reward_margin": -1}, "--reward_margin=-1.0: give a number above 0"),
        ({"seed": -1}, "--seed=-1: at least 0 is needed"),
        ({"decide_by": "reward"}, "--decide_by=reward is unknown; known are: success, best_reward, energy_distance"),
        ({"decide_by": "best_reward"}, "--decide_by=best_reward needs a simulator"),
        ({"env_task": "drive"}, "--env_task has no effect without --env.type"),
        ({"env__type": "drive_past", "env__max_parallel_tasks": 2}, "--env.max_parallel_tasks=2 would mix the tasks'"),
        ({"policy__device": "abacus"}, "abacus"),
        ({"earlier_rounds": "[a]"}, "--earlier_rounds needs --teacher_path"),
        ({"tolerance": 0.1}, "unrecognized arguments: --tolerance=0.1"),  # and not the beginning of --tolerance_s
        ({"policy__path": "me/there", "write_num_steps": "true"}, "name a folder as --policy.path"),
        ({"teacher_path": "{of_another_shape}"}, "chunk_size is 6 in it and 4 in the teacher"),
    ],
)
def test_user_errors(workshop, checkpoint, tmp_path, capsys, flags, message):
    change_config(checkpoint, chunk_size=4)
    folders = {"workshop": workshop, "of_another_shape": checkpoint}
    flags = {k: v.format(**folders) if isinstance(v, str) else v for k, v in flags.items()}
    line = refused(capsys, eval_main, eval_flags(workshop, **{"output_dir": tmp_path / "r", **flags}))
    assert line.startswith("smolvla-reflow-eval: error:")
    assert message in line
    assert not (tmp_path / "r").exists()


def test_a_single_frame_is_too_few(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_run, "evenly_spaced", lambda *args: [0])
    assert "have a single frame" in refused(capsys, eval_main, eval_flags(workshop, tmp_path / "r"))
    assert not (tmp_path / "r").exists()
