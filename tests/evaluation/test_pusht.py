"""PushT with the block's pose: what the policy sees, against the recordings, and the wrapper by itself."""

import importlib.util
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from lerobot.configs.parser import load_plugin
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.factory import make_env

EXAMPLES = Path(__file__).parents[2] / "examples"
RECORDED = Path(__file__).parents[3] / "shared" / "data" / "pusht_pose"
STOCK_ID = "gym_pusht/PushT-v0"
INSTALLED = importlib.util.find_spec("gym_pusht") is not None


class StandIn(gym.Env):
    """What the wrapper asks of gym-pusht: agent, block and angle as `state`, and its picture as `pixels`."""

    def __init__(self, obs_type="state", render_mode=None):
        self.obs_type, self.render_mode, self.drawn = obs_type, render_mode, 0
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float64)
        self.action_space = spaces.Box(0, 512, (2,), np.float32)

    def get_obs(self):
        if self.obs_type == "state":
            return np.array([10.0, 20.0, 30.0 + self.count, 40.0, np.pi / 6])
        self.drawn += 1
        return np.full((96, 96, 3), 10 * self.count, dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.get_obs(), {"is_success": False}

    def step(self, action):
        self.count += 1
        return self.get_obs(), 0.1 * self.count, False, False, {"is_success": False}


@pytest.fixture(scope="module")
def environment():
    """The example's module, as `--env.discover_packages_path=pusht` imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        if not INSTALLED:
            patch.setitem(sys.modules, "gym_pusht", types.ModuleType("gym_pusht"))
        load_plugin("pusht")
        yield sys.modules["pusht.environment"]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(gym.registry, STOCK_ID, gym.envs.registration.EnvSpec(STOCK_ID, entry_point=StandIn))


@pytest.mark.parametrize("every", [1, 3])
def test_it_shows_the_pose_and_an_image_now_and_then(environment, stand_in, every):
    env = environment.PushTPose(image_every=every)
    seen, _ = env.reset(seed=0)
    for step in range(7):
        np.testing.assert_allclose(seen["agent_pos"], [10, 20, 30 + step, 40, 50 * 3**0.5, 50])
        assert seen["pixels"].shape == (32, 32, 3)
        assert (seen["pixels"] == 10 * (step - step % every)).all()
        assert seen["pixels"].dtype == np.uint8
        assert env.observation_space.contains(seen)
        assert env.unwrapped.drawn == step // every + 1
        seen, reward, *_ = env.step(np.zeros(2, dtype=np.float32))
        assert reward == pytest.approx(0.1 * (step + 1))
    seen, _ = env.reset(seed=0)
    assert (seen["pixels"] == 0).all()


def test_lerobot_makes_it_with_three_hundred_steps_and_no_sentence(environment, stand_in):
    tasks = make_env(environment.PushTPoseConfig(image_every=8), n_envs=2, use_async_envs=False)["pusht_pose"]
    (envs,) = tasks.values()
    assert envs.call("_max_episode_steps") == (300, 300)
    assert envs.envs[0].unwrapped.obs_type == "state"
    with pytest.raises(AttributeError):
        envs.call("task_description")
    envs.close()


@pytest.mark.skipif(not (INSTALLED and RECORDED.exists()), reason="needs gym-pusht, and ../shared/data/pusht_pose")
def test_it_shows_what_was_recorded(environment):
    """The block put where it was recorded gives the recorded numbers and the recorded picture."""
    env = environment.PushTPose()
    frames = LeRobotDataset("local/pusht_pose", root=RECORDED)
    env.reset(seed=0)
    pusht = env.unwrapped
    for index in (0, 500, 3000, 20000):
        state = frames[index]["observation.state"].double()
        pusht.agent.position, pusht.block.angle = tuple(state[:2].tolist()), float(torch.atan2(state[5], state[4]))
        pusht.block.position = tuple(state[2:4].tolist())
        for body in (pusht.agent, pusht.block):
            pusht.space.reindex_shapes_for_body(body)
        env.steps = 0
        seen = env.observation(pusht.get_obs())
        np.testing.assert_allclose(seen["agent_pos"], state, atol=1e-3)
        picture = frames[index]["observation.image"].permute(1, 2, 0).numpy() * 255
        assert np.abs(seen["pixels"] - picture).mean() < 0.3  # of 255; of another frame's picture 5 and more
        other = frames[index + 100]["observation.image"].permute(1, 2, 0).numpy() * 255
        assert np.abs(seen["pixels"] - other).mean() > 1
