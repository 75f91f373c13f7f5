"""The task's sentence in a closed loop: the sentence that an environment shows, a check against training, a substitute.

SmolVLA is conditioned on a sentence, and an environment may show another sentence than the dataset (LeRobot's PushT
shows an empty one). Nothing fails then; the policy acts on words that it has never seen.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import close_envs
from lerobot.scripts.lerobot_eval import rollout
from torch import nn

QUOTED = 3

EnvProcessor = Callable[[dict[str, Any]], dict[str, Any]]


def shown_sentences(env: EnvConfig, seed: int) -> list[str]:
    """The sentences at the beginning of this environment's tasks in LeRobot's own evaluation, each once.

    LeRobot's versions look for a sentence in different places, and some environments choose it when an episode begins.
    So LeRobot's rollout starts an episode of each task, up to its first observation.
    """
    envs = make_env(env, n_envs=1)
    try:
        shown = [_first_sentence(each, seed) for tasks in envs.values() for each in tasks.values()]
    finally:
        close_envs(envs)
    return list(dict.fromkeys(shown))


class _Begun(Exception):  # noqa: N818  # it is no error
    """A rollout got to its first observation."""


class _NoPolicy(nn.Module):
    def reset(self) -> None:
        """The first call of a rollout."""


def _first_sentence(env: Any, seed: int) -> str:
    """The sentence that a rollout in a vector environment of one hands to its first processor."""
    shown = []

    def stop(observation: dict[str, Any]) -> NoReturn:
        shown.extend(observation["task"])
        raise _Begun

    rest: dict[str, Any] = dict.fromkeys(("env_postprocessor", "preprocessor", "postprocessor"))
    with contextlib.suppress(_Begun), contextlib.redirect_stderr(io.StringIO()):  # rollout draws a bar
        rollout(env, _NoPolicy(), env_preprocessor=stop, seeds=[seed], **rest)
    return shown[0]


def unseen_sentences(shown: Iterable[str], trained: Iterable[str]) -> list[str]:
    """The shown sentences that are in no training episode, apart from the new line that SmolVLA's tokenizer adds."""
    known = {sentence.removesuffix("\n") for sentence in trained}
    return [sentence for sentence in shown if sentence.removesuffix("\n") not in known]


def in_words(unseen: Sequence[str], trained: Sequence[str], by: str) -> str:
    """A warning about unseen sentences, which the flag `by` shows, and what to do."""
    remedy = f'--env_task="{trained[0]}"' if len(trained) == 1 else 'one of these, --env_task="..."'
    return (
        f"{by} shows the policy {quoted(unseen)}, and no training episode does: they have {quoted(trained)}. Success "
        f"on words that the policy has never seen says little. Show it {remedy}."
    )


def quoted(sentences: Sequence[str]) -> str:
    """The first few sentences in quotation marks, and how many more there are."""
    first = ", ".join(f'"{sentence}"' if sentence.strip() else "an empty sentence" for sentence in sentences[:QUOTED])
    more = len(sentences) - QUOTED
    return first if more <= 0 else f"{first} and {more} more"


def with_sentence(env_preprocessor: EnvProcessor, task: str) -> EnvProcessor:
    """An environment's preprocessor that ends with this sentence; LeRobot reads the environment's own before it."""

    def replaced(observation: dict[str, Any]) -> dict[str, Any]:
        shown = env_preprocessor(observation)
        return {**shown, "task": [task] * len(shown["task"])}

    return replaced
