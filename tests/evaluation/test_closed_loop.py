"""Closed loop: success and its interval by hand, the drives against a loop of its own, the command as run."""

import sys

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import driven_flags, eval_main, refused, seen_by_the_policy
from lerobot.configs.default import EvalConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.demo.environment import MAX_STEPS, DrivePast, DrivePastConfig
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.demo.task import draw_scenes
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.success import Episodes, Success

# An obstacle out of the way of most drives, so that a barely trained policy arrives in some and not in others.
EASY = {"start_y": 0.05, "obstacle_y": 0.3}
EPISODES = 12


@pytest.mark.parametrize(("k", "n"), [(0, 20), (7, 20), (20, 20), (199, 200)])
def test_the_interval_is_wilsons(k, n):
    """Wilson (1927): the rates p at which |k/n - p| <= z sqrt(p (1 - p) / n), a quadratic in p."""
    found = Success.count({"a": Episodes([True] * k + [False] * (n - k), [0.5] * n)})
    z, p = 1.959963984540054, k / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert found.rate == p
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-12)
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-12)
    assert found.episodes == n


def test_tasks_are_told_apart():
    reach, press = Episodes([True, False], [1.0, 0.25]), Episodes([True] * 4, [3.0, 3.0, 3.0, 4.0])
    found = Success.count({"reach/0": reach, "press/0": press})
    assert found.by_task == {"reach/0": 0.5, "press/0": 1.0}
    assert (found.rate, found.episodes) == (5 / 6, 6)
    assert found.best_reward == 14.25 / 6


def reward_height(monkeypatch):
    """In place of success. Positive, since LeRobot takes 0 for what comes after an episode's end."""
    step = DrivePast.step

    def rewarded(env, action):
        seen, _, *ended = step(env, action)
        return seen, 1.0 + float(seen["agent_pos"][1]), *ended

    monkeypatch.setattr(DrivePast, "step", rewarded)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_drives_are_the_stock_policys(workshop, measured, num_steps, monkeypatch):
    """Stock checkpoint, stock processors, and a loop written here: the same seed, the same episodes and rewards."""
    reward_height(monkeypatch)
    settings = EvalConfig(n_episodes=EPISODES, batch_size=4, use_async_envs=False)
    driven = drive(measured, DrivePastConfig(**EASY), settings, num_steps, seed=5)

    policy = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST).eval()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, str(workshop / "1rf" / LAST))
    policy.config.num_steps = num_steps
    torch.manual_seed(5)
    successes, rewards = [], []
    for _ in range(EPISODES // 4):
        envs = [DrivePast(**EASY) for _ in range(4)]
        positions = np.stack([env.reset()[0]["agent_pos"] for env in envs])
        outcome: list[bool | None] = [None] * 4
        best, counted = [-float("inf")] * 4, [True] * 4
        policy.reset()
        for _ in range(MAX_STEPS):
            if None not in outcome:
                break
            observation = preprocessor(seen_by_the_policy(envs, positions))
            with torch.no_grad():
                actions = postprocessor(policy.select_action(observation)).numpy()
            for i, env in enumerate(envs):
                seen, reward, ended, _, info = env.step(actions[i])
                if counted[i]:  # by LeRobot, one step too many: the first of the episode that follows
                    best[i] = max(best[i], reward)
                counted[i] = outcome[i] is None
                if ended:  # a vector environment starts the next episode at once
                    outcome[i] = info["is_success"] if outcome[i] is None else outcome[i]
                    seen, _ = env.reset()
                positions[i] = seen["agent_pos"]
        successes += [bool(success) for success in outcome]
        rewards += best
    assert driven["drive_past/0"].successes == successes
    assert driven["drive_past/0"].best_rewards == pytest.approx(rewards, abs=1e-6)
    assert driven.keys() == {"drive_past/0"}
    assert 0 < sum(successes) < EPISODES  # or the comparison would say nothing
    assert len({round(reward, 6) for reward in rewards}) > 1
    assert measured.policy.config.num_steps == measured.num_steps


def test_every_episode_has_a_scene_of_its_own_that_the_seed_decides(measured, monkeypatch):
    """The seeds of lerobot-eval, one more for each episode; the same for every policy and number of steps."""
    reset, seen = DrivePast.reset, []

    def note(env, *, seed=None, options=None):
        result = reset(env, seed=seed, options=options)
        if seed is not None:
            seen.append((seed, env.scene))
        return result

    monkeypatch.setattr(DrivePast, "reset", note)
    settings = EvalConfig(n_episodes=6, batch_size=2, use_async_envs=False)
    for num_steps in (1, 2):
        drive(measured, DrivePastConfig(), settings, num_steps, seed=7)
        assert seen == [(seed, draw_scenes(1, seed)[0]) for seed in range(7, 13)]
        seen.clear()


def test_success_is_in_table_report_and_plot(workshop, tmp_path, capsys):
    easy = {f"env__{name}": value for name, value in EASY.items()}
    report = eval_main(driven_flags(workshop, tmp_path, **easy, eval__n_episodes=8))
    assert [row["success"]["episodes"] for row in report["rows"]] == [8, 8, 8]
    of_env = {f"env.{name}": value for name, value in {"type": "drive_past", **EASY}.items()}
    assert of_env.items() <= report["made_with"].items()
    row, in_words = report["rows"][0]["success"], (tmp_path / "report.md").read_text()
    text = f"{row['rate']:.1%} ({row['low']:.0%} to {row['high']:.0%})"
    assert text in capsys.readouterr().out
    assert text in in_words
    assert "best reward" not in in_words  # it is 1 for success and 0 otherwise
    assert matplotlib.image.imread(tmp_path / "report.png").shape[:2] == (1290, 1020)  # a second panel under the first


def test_a_reward_that_says_more_than_success_has_a_column(workshop, tmp_path, monkeypatch):
    reward_height(monkeypatch)
    report = eval_main(driven_flags(workshop, tmp_path))
    table = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table]
    shown = [row[titles.index("best reward")] for row in rows]
    assert shown == [f"{row['success']['best_reward']:.3f}" for row in report["rows"]]


def test_best_reward_decides_and_is_drawn(workshop, tmp_path, monkeypatch):
    """The policy alone at 1 step, against itself at 10 in the same scenes."""
    reward_height(monkeypatch)
    changes = {"eval__n_episodes": 8, "eval__batch_size": 8, "num_steps": "[1]", "reward_margin": 10}
    by_reward = eval_main(driven_flags(workshop, tmp_path / "reward", decide_by="best_reward", **changes))
    by_success = eval_main(driven_flags(workshop, tmp_path / "success", **changes))
    assert (by_reward["decision"]["evidence"], by_reward["recommended_num_steps"]) == ("best_reward", 1)
    one, ten = by_reward["decision"]["comparisons"]
    bests = [row["success"]["best_reward"] for row in by_reward["rows"]]
    assert [one["here"], one["bar"]] == pytest.approx(bests)
    assert (ten["largest_loss"], one["episodes"]) == (0, 8)
    assert by_success["decision"]["evidence"] != "best_reward"
    pictures = [matplotlib.image.imread(tmp_path / name / "report.png") for name in ("reward", "success")]
    assert (pictures[0] != pictures[1]).any()


RENAMED = '{"observation.image": "observation.images.top"}'  # which is all that PushT lacks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env__type": "pusht"}, "cameras observation.images.top, and --env.type=pusht has observation.image"),
        ({"env__type": "pusht", "rename_map": RENAMED}, "While starting --env.type=pusht: ModuleNotFoundError"),
        ({"env__type": "holodeck"}, "holodeck"),
        ({"env__obstakle": 1}, "env.obstakle"),
        (
            {"env__discover_packages_path": "broken_envs"},
            "=broken_envs, the name of a package: RuntimeError: no display",
        ),
    ],
)
def test_user_errors(workshop, tmp_path, capsys, monkeypatch, changes, message):
    """Two packages among them that cannot be imported: PushT's, which is not here, and a broken one."""
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.delitem(gym.registry, "gym_pusht/PushT-v0", raising=False)
    (tmp_path / "broken_envs.py").write_text("raise RuntimeError('no display')")
    monkeypatch.syspath_prepend(tmp_path)
    assert message in refused(capsys, eval_main, driven_flags(workshop, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()
