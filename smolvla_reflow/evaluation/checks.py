"""The checks of an evaluation, before anything is loaded: flags and checkpoints that would be silently wrong."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.dataset.opening import check_as_recorded, policy_features
from smolvla_reflow.errors import ReflowError, known_are
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.decision import ENERGY_DISTANCE, EVIDENCE
from smolvla_reflow.evaluation.journal import NAME as UNFINISHED
from smolvla_reflow.evaluation.late import LATEST, aggregation, chunk_time
from smolvla_reflow.evaluation.latency import ChunkTime
from smolvla_reflow.evaluation.start import check_start
from smolvla_reflow.smolvla.features import fitted


def check_values(cfg: EvalConfig) -> None:
    """Raise ReflowError for a flag that is missing, would be ignored, or would give a report without a meaning."""
    if not cfg.policy.path:
        raise ReflowError("Name the checkpoint to evaluate: --policy.path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name a folder for the report: --output_dir=...")
    if not is_free(cfg.output_dir):
        raise ReflowError(f"--output_dir={cfg.output_dir} exists already; name a new folder or remove it.")
    if cfg.earlier_rounds and not cfg.teacher_path:
        raise ReflowError("--earlier_rounds needs --teacher_path, the teacher of the first round.")
    for name, least in {"num_frames": 2, "num_noises": 2, "reference_steps": 2, "batch_size": 1, "seed": 0}.items():
        if getattr(cfg, name) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")
    check_start(cfg.noise)
    if cfg.decide_by is not None and cfg.decide_by not in EVIDENCE:
        raise ReflowError(f"--decide_by={cfg.decide_by} is unknown; {known_are(EVIDENCE, cfg.decide_by)}")
    if cfg.decide_by not in (None, ENERGY_DISTANCE) and cfg.env is None:
        raise ReflowError(f"--decide_by={cfg.decide_by} needs a simulator; name it with --env.type.")
    if not 0 < cfg.success_margin < 1:
        raise ReflowError(f"--success_margin={cfg.success_margin}: give a share between 0 and 1, such as 0.05.")
    for name, example in {"energy_margin": 0.003, "reward_margin": 0.03}.items():
        if not 0 < getattr(cfg, name) < math.inf:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: give a number above 0, such as {example}.")
    if cfg.latency_ms is not None:
        chunk_time(cfg.latency_ms, ChunkTime(0.0, 0.0, 0.0))
        if cfg.env is None:
            raise ReflowError("--latency_ms has no effect without --env.type; leave it out.")
    aggregation(cfg.aggregate_fn_name)
    if cfg.aggregate_fn_name != LATEST and cfg.latency_ms is None:
        raise ReflowError("--aggregate_fn_name has no effect without --latency_ms; leave it out.")
    if cfg.env is not None and cfg.env.max_parallel_tasks > 1:  # LeRobot's threads would share one policy's actions
        raise ReflowError(
            f"--env.max_parallel_tasks={cfg.env.max_parallel_tasks} would mix the tasks' actions; leave it out."
        )
    if cfg.env_task is not None and cfg.env is None:
        raise ReflowError("--env_task has no effect without --env.type; leave it out.")
    if cfg.write_num_steps and not Path(cfg.policy.path).expanduser().is_dir():
        raise ReflowError("--write_num_steps writes the config.json of a folder; name a folder as --policy.path.")
    check_as_recorded(cfg.dataset, "policies are measured on")


def is_free(folder: Path) -> bool:
    """True if a report can go into this folder without overwriting another command's files."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / UNFINISHED).is_dir() or not any(folder.iterdir()))


def fit_to_dataset(
    checkpoints: Mapping[str, Checkpoint], metadata: LeRobotDatasetMetadata, rename_map: dict[str, str]
) -> dict[str, Checkpoint]:
    """The checkpoints, the reference first, as LeRobot would run them on this dataset, all from the same noise."""
    features = policy_features(metadata)
    teacher = next(iter(checkpoints.values()))
    for checkpoint in checkpoints.values():
        for name in ("chunk_size", "max_action_dim"):
            own, teachers = getattr(checkpoint.config, name), getattr(teacher.config, name)
            if own != teachers:
                raise ReflowError(
                    f"{checkpoint.source} and the teacher cannot be compared: {name} is {own} in it and {teachers} in "
                    "the teacher."
                )
    return {name: fitted(checkpoint, features, rename_map) for name, checkpoint in checkpoints.items()}


def check_lineage(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise ReflowError if a checkpoint was reflowed from an earlier one of these that has changed since."""
    for position, student in enumerate(checkpoints):
        noted = student.noted("reflow")
        commit, fingerprint = noted.get("teacher_commit"), noted.get("teacher_fingerprint")
        for teacher in checkpoints[:position]:
            if teacher.source != noted.get("teacher_path") or (commit and commit == teacher.commit):
                continue
            if fingerprint not in (None, teacher.fingerprint()):
                revision = f" Name the one it learnt from with its revision, {commit}." if commit else ""
                raise ReflowError(
                    f"{student.source} was reflowed from {teacher.source} as it was then. Weights, configuration or "
                    f"statistics there have changed since, so the two cannot be compared.{revision}"
                )
