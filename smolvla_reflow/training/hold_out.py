"""Hold episodes out of a run, so that its student can be judged on frames that it was not trained on.

`smolvla-reflow-eval` reads the episodes of a run in the `train_config.json` of its checkpoints, and measures on the
others. `--reflow.measure_freq` measures on the held-out episodes while the student trains.
"""

from smolvla_reflow.compat import LeRobotDatasetMetadata, can_hold_out, excludes_episodes, holds_out
from smolvla_reflow.dataset.frames import evenly_spaced
from smolvla_reflow.dataset.opening import chosen_episodes
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.training.config import ReflowTrainPipelineConfig

FLAG = "--reflow.measure_episodes"
# A tenth of the episodes, and at least as many as an evaluation needs for a recommendation (`evaluation.decision`).
# A smaller dataset would lose more than a fifth of its episodes, and is trained on whole.
SHARE, FEWEST, MOST = 0.1, 10, 50
SMALLEST_DATASET = 50


def hold_out(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata) -> None:
    """Take `cfg.reflow.measure_episodes` out of `cfg.dataset.episodes`, all episodes if it is None.

    If the user named neither, the episodes are chosen here, evenly over the dataset. A resumed run goes on with the
    episodes that it began with.
    """
    dataset, everything = cfg.dataset, range(metadata.total_episodes)
    held = cfg.reflow.measure_episodes
    if cfg.reflow.measure_freq and dataset.streaming:  # LeRobot would begin a W&B run before it fails
        raise ReflowError("--reflow.measure_freq needs frames in any order; leave out --dataset.streaming.")
    if held is None and not cfg.resume:
        held = cfg.reflow.measure_episodes = _chosen(cfg, metadata)
    held = held or []
    if not held and cfg.reflow.measure_freq and not holds_out(dataset):
        split = " Or let LeRobot choose: --dataset.eval_split=0.1" if can_hold_out(dataset) else ""
        others = f"Name them: {FLAG}=[0,1].{split}"
        if cfg.resume and dataset.episodes is None:
            others = "This run has trained on all; leave the flag out."
        freq = cfg.reflow.measure_freq
        raise ReflowError(f"--reflow.measure_freq={freq} needs episodes to measure on and not to train on. {others}")
    if missing := [episode for episode in held if episode not in everything]:
        raise ReflowError(f"{FLAG}: there is no episode {missing[0]}; choose from 0 to {everything[-1]}.")
    if not held:
        return
    if dataset.episodes is None:
        trained = chosen_episodes(metadata, dataset) if cfg.resume else []
        if both := sorted({*held}.intersection(everything if trained is None else trained)):
            raise ReflowError(
                f"{FLAG}: this run has trained on episode {both[0]} already, and only a new run can hold it out."
            )
        dataset.episodes = [episode for episode in everything if episode not in held]
        if not dataset.episodes:
            raise ReflowError(f"{FLAG} names every episode, and none is left to train on.")
    elif both := sorted({*held}.intersection(dataset.episodes)):
        raise ReflowError(f"{FLAG}: episode {both[0]} is trained on, too; take it out of --dataset.episodes.")


def in_words(cfg: ReflowTrainPipelineConfig) -> str | None:
    """The held-out episodes, for the log; None if the user or LeRobot chose what to train on."""
    if held := cfg.reflow.measure_episodes:
        return f"{len(held)} episodes are held out of training, to judge the student on: {held} ({FLAG}=[] for none)."
    if cfg.dataset.episodes is not None or holds_out(cfg.dataset) or excludes_episodes(cfg.dataset):
        return None
    return f"every episode is trained on, so none is left to judge the student on ({FLAG} names some)."


def _chosen(cfg: ReflowTrainPipelineConfig, metadata: LeRobotDatasetMetadata) -> list[int]:
    """The episodes to hold out if the user named none."""
    dataset, total = cfg.dataset, metadata.total_episodes
    if holds_out(dataset) or dataset.streaming:
        return []
    trained = chosen_episodes(metadata, dataset)
    if trained is not None or excludes_episodes(dataset):  # the others are unseen without our doing
        others = sorted({*range(total)}.difference(trained or ()))
        return others if cfg.reflow.measure_freq else []
    if total < SMALLEST_DATASET:
        return []
    return evenly_spaced(total, min(max(FEWEST, int(SHARE * total)), MOST))
