"""Chunks that arrive late: which action each control step gets, the drives against a loop of the test's own, the report."""

import threading
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import driven_flags, eval_main, refused, seen_by_the_policy
from lerobot.async_inference.configs import get_aggregate_function
from lerobot.async_inference.helpers import TimedAction
from lerobot.configs.default import EvalConfig
from lerobot.envs.configs import LiberoEnv
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.compat import control_frequency
from smolvla_reflow.demo.environment import MAX_STEPS, DrivePast, DrivePastConfig
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.late import Delay, LateChunks, aggregation, chunk_time
from smolvla_reflow.evaluation.latency import ChunkTime

EASY = {"start_y": 0.05, "obstacle_y": 0.3}


class Clockwork:
    """A policy whose chunk says when it was observed, and which of its actions is which."""

    def __init__(self, chunk_size: int, n_action_steps: int):
        self.config = SimpleNamespace(chunk_size=chunk_size, n_action_steps=n_action_steps)

    def reset(self):
        self.observed = []

    def predict_action_chunk(self, batch):
        self.observed.append(batch["now"])
        return torch.stack([torch.tensor([[float(batch["now"]), i]]) for i in range(self.config.chunk_size)], dim=1)


@pytest.fixture
def aggregate_queues(tmp_path, monkeypatch):
    """The robot client's own function, by which its queue takes a chunk."""
    monkeypatch.chdir(tmp_path)  # once imported, the client writes a log into the working directory
    from lerobot.async_inference.robot_client import RobotClient

    return RobotClient._aggregate_action_queues


def robot_client(aggregate_queues, policy, delay: int, mix) -> list[tuple[bool, np.ndarray]]:
    """LeRobot's robot client with its own queue of actions by number, in control steps: if each acts, and its action."""
    lock, size = threading.Lock(), policy.config.chunk_size
    client = SimpleNamespace(action_queue=Queue(), action_queue_lock=lock, latest_action=-1, latest_action_lock=lock)
    sent, coming, done, last = None, None, [], None
    for now in range(100):
        if coming is not None and coming[0] <= now:
            aggregate_queues(client, coming[1], mix)
            coming = None
        observed = client.latest_action + 1
        would_run_out = client.action_queue.qsize() <= min(delay, size // 2)
        if coming is None and (sent is None or observed - sent >= policy.config.n_action_steps or would_run_out):
            chunk = policy.predict_action_chunk({"now": now})[0].numpy()
            actions = [TimedAction(timestamp=0, timestep=observed + i, action=chunk[i]) for i in range(size)]
            if sent is None or delay == 0:  # the robot stands still until the first chunk is there
                aggregate_queues(client, actions, mix)
            else:
                coming = (now + delay, actions)
            sent = observed
        acts = not client.action_queue.empty()
        if acts:
            timed = client.action_queue.get()
            client.latest_action, last = timed.timestep, timed.action
        done.append((acts, last))
    return done


@pytest.mark.parametrize("mix", ["latest_only", "weighted_average"])
@pytest.mark.parametrize("delay", [0, 1, 3, 7, 8, 9, 12, 15, 16, 20])
@pytest.mark.parametrize("n_action_steps", [1, 4, 8, 16])
def test_each_control_step_gets_the_action_of_the_robot_client(aggregate_queues, delay, n_action_steps, mix):
    policy = Clockwork(16, n_action_steps)
    late = LateChunks(policy, delay, aggregation(mix))
    found = [late.select_action({"now": now})[0] for now in range(100)]
    client = robot_client(aggregate_queues, policy, delay, get_aggregate_function(mix))
    np.testing.assert_allclose(np.stack(found), np.stack([action for _, action in client]), rtol=1e-6)
    assert all(acts for acts, _ in client) == (delay <= 8)  # else the robot stands still at times


@pytest.mark.parametrize(("num_steps", "delay"), [(1, 0), (2, 1), (1, 3)])
def test_drives_are_those_of_a_loop_with_late_chunks(workshop, measured, num_steps, delay):
    """Stock checkpoint and processors, 2 actions of 6 executed; each chunk kept in a list with the time it is there."""
    settings = EvalConfig(n_episodes=4, batch_size=4, use_async_envs=False)
    late = LateChunks(measured.policy, delay)
    driven = drive(measured, DrivePastConfig(**EASY), settings, num_steps, seed=5, late=late)

    policy = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST).eval()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, str(workshop / "1rf" / LAST))
    policy.config.num_steps = num_steps
    torch.manual_seed(5)
    envs = [DrivePast(**EASY) for _ in range(4)]
    positions, ends = np.stack([env.reset()[0]["agent_pos"] for env in envs]), [None] * 4
    chunks: list[tuple[int, int, torch.Tensor]] = []  # there from, observed at, actions
    for now in range(MAX_STEPS):
        if None not in ends:
            break
        if not chunks or (now - chunks[-1][1] >= 2 and now >= chunks[-1][0]):
            chunk = policy.predict_action_chunk(preprocessor(seen_by_the_policy(envs, positions)))
            chunks.append((now + delay if chunks else now, now, chunk))
        _, observed, chunk = [each for each in chunks if each[0] <= now][-1]
        actions = postprocessor(chunk[:, now - observed]).numpy()
        for i, env in enumerate(envs):
            seen, _, ended, _, info = env.step(actions[i])
            if ended:
                ends[i] = info["is_success"] if ends[i] is None else ends[i]
                seen, _ = env.reset()
            positions[i] = seen["agent_pos"]
    assert driven["drive_past/0"].successes == [bool(success) for success in ends]
    assert "select_action" not in vars(measured.policy)


def test_without_delay_drives_are_the_stock_policys(measured):
    settings = EvalConfig(n_episodes=8, batch_size=4, use_async_envs=False)
    runs = (None, LateChunks(measured.policy, 0))
    stock, late = (drive(measured, DrivePastConfig(**EASY), settings, 1, seed=3, late=late) for late in runs)
    assert stock == late
    assert 0 < sum(stock["drive_past/0"].successes) < 8


def test_the_first_control_step_after_the_chunk_is_there():
    assert [Delay.of(ms, 10).steps for ms in (0, 1, 99.9, 100, 100.1, 200, 800)] == [0, 1, 1, 1, 2, 2, 8]
    assert Delay.of(3 * 0.1 * 1000, 10).steps == 3  # 300.00000000000006 ms is no fourth step
    assert Delay.of(70, 30).steps == 3
    assert Delay.of(85, 10).in_words() == "1 step (85 ms)"


def test_control_steps_of_libero():
    """LeRobot 0.4 lets robosuite take its 20, and says 30; later versions hand their `fps` over."""
    assert control_frequency(LiberoEnv()) == 20
    assert control_frequency(DrivePastConfig()) == DrivePastConfig().fps
    if LiberoEnv().fps == 20:
        assert control_frequency(LiberoEnv(fps=30)) == 30


def test_latency_by_flag():
    here = ChunkTime(30.0, 17.0, 0.1)
    assert chunk_time("measured", here) == here
    assert [chunk_time("200", here).p50(n) for n in (1, 10)] == [200, 200]
    assert [chunk_time("120+35.5", here).p50(n) for n in (1, 10)] == [155.5, 475]


def test_the_report_has_the_delays_and_recommends_the_best(workshop, tmp_path, capsys):
    """With 100 + 100 ms at the demo's control steps, by hand; success of a policy that is late against itself."""
    fps = DrivePastConfig().fps
    easy = {f"env__{name}": value for name, value in EASY.items()}
    changes = {**easy, "latency_ms": "100+100", "num_steps": "[1,2]", "success_margin": 0.99, "eval__n_episodes": 8}
    report = eval_main(driven_flags(workshop, tmp_path, **changes))
    for row in report["rows"]:
        ms = 100 + 100 * row["num_steps"]
        assert row["delay"] == {"ms": ms, "steps": -(-ms * fps // 1000)}
    rates = {row["num_steps"]: row["success"]["rate"] for row in report["rows"]}
    if report["decision"]["evidence"] == "success":
        assert report["recommended_num_steps"] == max(rates, key=lambda n: (rates[n], -n))
        assert "the best of the numbers" in report["recommendation"]
    assert "200 ms" in (tmp_path / "report.md").read_text()
    assert "--latency_ms=100+100" in capsys.readouterr().out


def test_measured_latency_is_the_reports(workshop, tmp_path):
    report = eval_main(driven_flags(workshop, tmp_path, latency_ms="measured", num_steps="[1]"))
    fps = DrivePastConfig().fps
    for row in report["rows"]:
        assert row["delay"] == {"ms": row["latency_ms_p50"], "steps": Delay.of(row["latency_ms_p50"], fps).steps}


@pytest.mark.parametrize("value", ["soon", "-5", "1+", "nan", "10+-1", "inf"])
def test_a_latency_that_is_none(workshop, tmp_path, capsys, value):
    said = refused(capsys, eval_main, driven_flags(workshop, tmp_path / "r", latency_ms=value))
    assert f"--latency_ms={value} is unknown; give measured" in said
    assert not (tmp_path / "r").exists()


def test_two_chunks_are_mixed_in_the_simulator_too(workshop, tmp_path):
    """The flag changes the drives, and the report names it."""
    flags = {"latency_ms": 50, "num_steps": "[1]", "eval__n_episodes": 8}
    new, mixed = (
        eval_main(driven_flags(workshop, tmp_path / name, **flags, aggregate_fn_name=name))
        for name in ("latest_only", "conservative")
    )
    rewards = [[row["success"]["best_reward"] for row in report["rows"]] for report in (new, mixed)]
    assert rewards[0] != rewards[1]
    assert not new["decision"]["in_time"]  # more steps take no longer here, so the smallest number is the best
    assert "--aggregate_fn_name=conservative" in (tmp_path / "conservative/report.md").read_text()


def test_a_way_to_mix_that_the_client_does_not_have(workshop, tmp_path, capsys):
    flags = driven_flags(workshop, tmp_path / "r", latency_ms=5, aggregate_fn_name="median")
    said = refused(capsys, eval_main, flags)
    assert "looking for --aggregate_fn_name=median" in said
    assert "latest_only" in said
    flags = driven_flags(workshop, tmp_path / "r", aggregate_fn_name="average")
    assert "no effect without --latency_ms" in refused(capsys, eval_main, flags)
    assert not (tmp_path / "r").exists()


def test_latency_needs_a_simulator(workshop, tmp_path, capsys):
    flags = [flag for flag in driven_flags(workshop, tmp_path / "r", latency_ms=5) if not flag.startswith("--e")]
    assert "--latency_ms has no effect without --env.type" in refused(capsys, eval_main, flags)
