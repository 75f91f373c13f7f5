"""The episodes to measure on: where there are any, episodes that the judged policy was not trained on.

trained_episodes(...)   the episodes that a policy was trained on
choose(...)             the dataset's configuration with the episodes to measure on
Seen.in_words()         how many of them each policy was trained on, for the report
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from lerobot.configs.default import DatasetConfig

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata, holds_out
from smolvla_reflow.dataset.opening import chosen_episodes
from smolvla_reflow.errors import doing

# The fields of a run's dataset configuration that choose its episodes, with the values that choose every episode. Some
# exist in newer versions of LeRobot alone.
CHOOSING = {"episodes": None, "eval_split": 0.0, "exclude_episodes": None}


@dataclass(frozen=True)
class Seen:
    """The frames that are measured on, and how many of their episodes each policy was trained on."""

    frames: int  # number of frames
    episodes: int  # number of episodes that the frames are from
    # by policy, how many of these episodes it was trained on; None if its checkpoint does not say
    trained_on: Mapping[str, int | None]

    @classmethod
    def count(cls, episodes: Sequence[int], trained: Mapping[str, frozenset[int] | None]) -> "Seen":
        """Count the episodes of some frames, of which the policies (the judged one last) were trained on some."""
        of_frames = set(episodes)
        counts = {name: None if of is None else len(of & of_frames) for name, of in trained.items()}
        return cls(len(episodes), len(of_frames), counts)

    @property
    def by_judged(self) -> int | None:
        """How many of the episodes the judged policy was trained on, None if that is unknown."""
        return list(self.trained_on.values())[-1]

    def in_words(self) -> str:
        """For the report."""
        *others, judged = self.trained_on
        verb, seen = "was trained on", self.by_judged
        measured = f"Distances are measured on {self.frames} frames of {self.episodes} episodes"
        more = "on new observations it may need more steps."
        if seen == 0:
            said = f"{measured} that the {judged} was not trained on."
        elif seen is None:
            said = (
                f"{measured}. The {judged}'s checkpoint does not say if it {verb} them, so they count as seen: {more}"
            )
        else:
            said = f"{measured}, and the {judged} {verb} {_of(seen, self.episodes)}: {more}"
        known = [(name, self.trained_on[name]) for name in others]
        return " ".join([said, *(f"The {name} {verb} {_of(n, self.episodes)}." for name, n in known if n)])

    def in_short(self) -> str:
        """For the picture."""
        if self.by_judged == 0:
            return "distances: on episodes not trained on"
        known = "may have been" if self.by_judged is None else "were"
        return f"distances: on episodes that {known} trained on"


def choose(dataset: DatasetConfig, metadata: LeRobotDatasetMetadata, trained: frozenset[int] | None) -> DatasetConfig:
    """The dataset's configuration with the episodes to measure on: others than these, if there are any.

    Episodes that the user names are kept.
    """
    if trained is None or dataset.episodes is not None or holds_out(dataset):
        return dataset
    chosen = chosen_episodes(metadata, dataset)
    everything = range(metadata.total_episodes) if chosen is None else chosen
    unseen = [episode for episode in everything if episode not in trained]
    return replace(dataset, episodes=unseen) if unseen else dataset


def trained_episodes(
    checkpoint: Checkpoint, dataset: DatasetConfig, metadata: LeRobotDatasetMetadata
) -> frozenset[int] | None:
    """The episodes of this dataset that a checkpoint's run was trained on; None if that is unknown.

    It is unknown without a train_config.json, and if the dataset has changed since: its episodes may have been
    numbered anew.
    """
    noted = checkpoint.noted("dataset")
    if not noted:
        return None
    if not _has_statistics_of(checkpoint, metadata):  # then a dataset of another name is another dataset
        return None if noted.get("repo_id") == dataset.repo_id else frozenset()
    known = {field.name for field in fields(dataset)}
    then: dict[str, Any] = {
        name: every if noted.get(name) is None else noted[name] for name, every in CHOOSING.items() if name in known
    }
    with doing(f"reading which episodes {checkpoint.source} was trained on"):
        chosen = chosen_episodes(metadata, replace(dataset, **then))
    return frozenset(range(metadata.total_episodes) if chosen is None else chosen)


def copy_warning(checkpoint: Checkpoint, dataset: DatasetConfig, trained: frozenset[int] | None) -> list[str]:
    """A warning if the checkpoint was trained on a dataset of another name, whose episodes this one may hold too."""
    name = checkpoint.noted("dataset").get("repo_id")
    if trained != frozenset() or name == dataset.repo_id:
        return []
    return [
        f"{checkpoint.source} was trained on {name}, so all episodes of {dataset.repo_id} count as not trained on. If "
        f"they hold episodes of {name}, as a merged or extended copy does, name the others: --dataset.episodes=[...]."
    ]


def _has_statistics_of(checkpoint: Checkpoint, metadata: LeRobotDatasetMetadata) -> bool:
    """True if the checkpoint normalises its actions by this dataset's statistics."""
    saved, stats = checkpoint.statistics(), (metadata.stats or {}).get("action", {})
    names = [name for name in ("mean", "std") if f"action.{name}" in saved and name in stats]
    return bool(names) and all(
        np.array_equal(saved[f"action.{name}"].numpy(), np.asarray(stats[name], np.float32)) for name in names
    )


def _of(count: int, total: int) -> str:
    if count == total:
        return "all of them" if total > 1 else "it"
    return f"{count} of them" if count else "none of them"
