"""The task's sentence in a closed loop: which one an environment shows, whether it was trained on, and another instead.

SmolVLA is conditioned on a sentence, and an environment need not show the one that a policy was trained with (LeRobot's
PushT shows an empty one). Nothing fails then; the policy acts on words that it has never seen.
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

from smolvla_reflow.compat import LeRobotDatasetMetadata

QUOTED = 3

EnvProcessor = Callable[[dict[str, Any]], dict[str, Any]]


def shown_sentences(env: EnvConfig, seed: int) -> list[str]:
    """The sentences with which LeRobot's own evaluation would begin this environment's tasks, each once.

    Where LeRobot looks for a sentence differs between its versions, and some environments choose it when an episode
    begins. So it is LeRobot's rollout that starts an episode of each task, as far as its first observation.

    Args:
        env: that can be started.
        seed: of the episode.
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
        """What a rollout begins with."""


def _first_sentence(env: Any, seed: int) -> str:
    """The sentence that a rollout in a vector environment of one hands to the first of its processors."""
    shown = []

    def stop(observation: dict[str, Any]) -> NoReturn:
        shown.extend(observation["task"])
        raise _Begun

    rest: dict[str, Any] = dict.fromkeys(("env_postprocessor", "preprocessor", "postprocessor"))
    with contextlib.suppress(_Begun), contextlib.redirect_stderr(io.StringIO()):  # where it draws a bar
        rollout(env, _NoPolicy(), env_preprocessor=stop, seeds=[seed], **rest)
    return shown[0]


def dataset_sentences(metadata: LeRobotDatasetMetadata, episodes: Iterable[int] | None = None) -> list[str]:
    """The sentences of a dataset's episodes, None for all, each once."""
    if episodes is None:
        return list(metadata.tasks.index)
    return list(dict.fromkeys(sentence for episode in episodes for sentence in metadata.episodes[episode]["tasks"]))


def unseen_sentences(shown: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Those of the sentences shown that are none of those trained on.

    SmolVLA's preprocessor ends every sentence with a new line, so that one at its end makes no difference.
    """
    known = {sentence.removesuffix("\n") for sentence in trained}
    return [sentence for sentence in shown if sentence.removesuffix("\n") not in known]


def in_words(unseen: Sequence[str], trained: Sequence[str], by: str) -> str:
    """Warn of sentences that are in no training episode, and say what to do.

    Args:
        unseen: what is shown, one or more.
        trained: what was trained on, one or more.
        by: the flag that has them shown, e.g. "--env.type=pusht".
    """
    remedy = f'--env_task="{trained[0]}"' if len(trained) == 1 else 'one of these, --env_task="..."'
    return (
        f"{by} shows the policy {quoted(unseen)}, and no training episode does: they have {quoted(trained)}. How often "
        f"it succeeds on words that it has never seen says little. Show it {remedy}."
    )


def quoted(sentences: Sequence[str]) -> str:
    """The first few sentences in quotation marks, and how many more there are."""
    first = ", ".join(f'"{sentence}"' if sentence.strip() else "an empty sentence" for sentence in sentences[:QUOTED])
    more = len(sentences) - QUOTED
    return first if more <= 0 else f"{first} and {more} more"


def with_sentence(env_preprocessor: EnvProcessor, task: str) -> EnvProcessor:
    """An environment's preprocessor, after which every environment shows this sentence.

    LeRobot reads the sentence before it runs this processor, and the policy's own processors come after it.
    """

    def replaced(observation: dict[str, Any]) -> dict[str, Any]:
        shown = env_preprocessor(observation)
        return {**shown, "task": [task] * len(shown["task"])}

    return replaced
