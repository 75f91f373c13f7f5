"""The task's sentence: the environment's own by LeRobot's rollout, the warning, and another sentence instead."""

from dataclasses import dataclass, field

import gymnasium as gym
import pytest
import torch
from helpers import driven_flags, eval_main
from lerobot.configs.default import EvalConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env

from smolvla_reflow.checkpoint.backbone import load_tokenizer
from smolvla_reflow.demo.environment import DrivePast, DrivePastConfig
from smolvla_reflow.demo.task import TASK
from smolvla_reflow.evaluation import closed_loop, task_sentence
from smolvla_reflow.evaluation.closed_loop import drive
from smolvla_reflow.evaluation.task_sentence import in_words, shown_sentences, unseen_sentences, with_sentence

SAYING_ID = "smolvla_reflow/Saying-v0"
SETTINGS = EvalConfig(n_episodes=2, batch_size=2, use_async_envs=False)


class Saying(DrivePast):
    """The demo's environment with attributes of its own in place of its sentence, some of them once it was reset."""

    def __init__(self, says, says_then, **settings):
        super().__init__(**settings)
        self.says, self.says_then = says, says_then

    def reset(self, **given):
        self.says = {**self.says, **self.says_then}
        return super().reset(**given)

    def said(self, name: str) -> str:
        if name not in self.says:
            raise AttributeError(name)
        return self.says[name]

    task_description = property(lambda self: self.said("task_description"))
    task = property(lambda self: self.said("task"))


gym.register(
    SAYING_ID, entry_point=lambda **settings: Saying(**settings), order_enforce=False, disable_env_checker=True
)


@EnvConfig.register_subclass("saying")
@dataclass
class SayingConfig(DrivePastConfig):
    says: dict[str, str] = field(default_factory=dict)
    says_then: dict[str, str] = field(default_factory=dict)

    @property
    def gym_id(self):
        return SAYING_ID

    @property
    def gym_kwargs(self):
        return {**super().gym_kwargs, "says": self.says, "says_then": self.says_then}


CASES = {
    "the demo's": (DrivePastConfig(), TASK),
    "a description": (SayingConfig(says={"task_description": "go round it", "task": "round-v0"}), "go round it"),
    "a task alone": (SayingConfig(says={"task": "go round it"}), "go round it"),
    "nothing, as PushT": (SayingConfig(), ""),
    "one of each episode": (SayingConfig(says={"task_description": ""}, says_then={"task_description": "go"}), "go"),
}


@pytest.fixture
def spied(measured, monkeypatch):
    """The policy, and its inputs and actions as `select_action` gets and returns them."""
    batches, actions, select = [], [], measured.policy.select_action

    def note(batch):
        batches.append(batch)
        actions.append(select(batch))
        return actions[-1]

    monkeypatch.setattr(measured.policy, "select_action", note)
    return measured, batches, actions


def words(workshop, batches) -> set[str]:
    """What the tokens that the policy saw say, without padding."""
    tokenizer = load_tokenizer(str(workshop / "backbone"))
    names = ("observation.language.tokens", "observation.language.attention_mask")
    rows = (row for batch in batches for row in zip(*(batch[name] for name in names), strict=True))
    return {tokenizer.decode(tokens[mask.bool()]) for tokens, mask in rows}


@pytest.mark.parametrize(("env", "sentence"), CASES.values(), ids=CASES)
def test_the_sentence_found_is_the_one_that_the_policy_sees(workshop, spied, env, sentence):
    """LeRobot's own evaluation is the judge."""
    measured, batches, _ = spied
    assert shown_sentences(env, seed=3) == [sentence]
    drive(measured, env, SETTINGS, 1, seed=3)
    assert words(workshop, batches) == {f"{sentence}\n"}


@pytest.fixture
def three_tasks(monkeypatch):
    """Two groups of tasks, as the simulators with many have them, of which two show the same sentence."""

    def make(env, n_envs, **settings):
        saying = [SayingConfig(says={"task": sentence}) for sentence in ("a", "b", "a")]
        first, second, third = (make_env(each, n_envs=n_envs)["saying"][0] for each in saying)
        return {"these": {0: first, 1: second}, "those": {0: third}}

    for module in (task_sentence, closed_loop):
        monkeypatch.setattr(module, "make_env", make)


def test_each_sentence_of_many_tasks_once(three_tasks, monkeypatch):
    closed = []
    monkeypatch.setattr(Saying, "close", lambda env: closed.append(env))
    assert shown_sentences(DrivePastConfig(), seed=0) == ["a", "b"]
    assert len(closed) == 3


@pytest.mark.parametrize(
    ("shown", "unseen"),
    [(["push"], []), (["pull"], []), (["push it"], ["push it"]), ([""], [""]), (["Push", "pull\n"], ["Push"])],
)
def test_unseen_sentences(shown, unseen):
    """LeRobot ends a sentence with a new line unless it has one, so that "pull" and "pull\\n" are the same words."""
    assert unseen_sentences(shown, ["push", "pull\n"]) == unseen


def test_the_warning_quotes_both():
    said = in_words([""], ["push the T"], "--env.type=pusht")
    assert said.startswith(
        '--env.type=pusht shows the policy an empty sentence, and no training episode does: they have "push'
    )
    assert said.endswith('Show it --env_task="push the T".')
    said = in_words(["push"], ["a", "b", "c", "d", "e"], "--env_task")
    assert '--env_task shows the policy "push", and' in said
    assert 'they have "a", "b", "c" and 2 more. ' in said
    assert said.endswith('Show it one of these, --env_task="...".')


def test_every_environment_and_task_shows_the_other_sentence(workshop, spied, three_tasks):
    measured, batches, _ = spied
    drive(measured, DrivePastConfig(), SETTINGS, 1, seed=3, task="go round it")
    assert words(workshop, batches) == {"go round it\n"}
    assert {len(batch["observation.language.tokens"]) for batch in batches} == {2}
    batches.clear()
    drive(measured, DrivePastConfig(), SETTINGS, 1, seed=3)
    assert words(workshop, batches) == {"a\n", "b\n"}


def test_the_drives_are_those_in_an_environment_that_shows_that_sentence(spied):
    measured, _, actions = spied

    def driven(env, task=None):
        actions.clear()
        drive(measured, env, SETTINGS, 2, seed=4, task=task)
        return torch.stack(actions)

    said = driven(SayingConfig(says={"task": "go round it"}))
    assert torch.equal(driven(SayingConfig(), task="go round it"), said)
    unsaid = driven(SayingConfig())
    assert unsaid.shape != said.shape or not torch.equal(unsaid, said)  # or the comparison would say nothing


def test_an_environments_own_processor_comes_first():
    def own(observation):
        return {**observation, "state": observation["state"] + 1, "task": ["mine", "mine"]}

    given = {"state": 1, "task": ["a", "b"]}
    assert with_sentence(own, "go")(given) == {"state": 2, "task": ["go", "go"]}
    assert given == {"state": 1, "task": ["a", "b"]}


UNSEEN = f'--env.type=saying shows the policy an empty sentence, and no training episode does: they have "{TASK}"'


@pytest.mark.parametrize(
    ("task", "warning"), [(None, UNSEEN), (TASK, None), ("fly", '--env_task shows the policy "fly"')]
)
def test_the_command_warns_of_a_sentence_that_is_in_no_episode(workshop, tmp_path, capsys, task, warning):
    changes = {"env__type": "saying", "num_steps": "[1]", "env_task": task and f'"{task}"'}
    report, said = eval_main(driven_flags(workshop, tmp_path, **changes)), capsys.readouterr().out
    assert report["made_with"]["env_task"] == task
    assert len(report["notes"]) == ("Warning: " in said) == (warning is not None)
    if warning is not None:
        assert f"Warning: {warning}" in said
        assert report["notes"][0].startswith(warning)
