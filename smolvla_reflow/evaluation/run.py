"""`smolvla-reflow-eval` from checked flags to the report: open, measure, count successes, recommend, write."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.dataset import chosen_episodes, frame_ranges, open_metadata
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.checks import check_values, fit_to_dataset
from smolvla_reflow.evaluation.closed_loop import check_env, env_settings, with_success
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.frames import evenly_spaced, load_frames
from smolvla_reflow.evaluation.lineage import check_lineage
from smolvla_reflow.evaluation.measure import Evaluation, Settings, evaluate
from smolvla_reflow.evaluation.policy import MeasuredPolicy, load_measured_policy
from smolvla_reflow.evaluation.recommendation import in_words, recommend, write_num_steps
from smolvla_reflow.evaluation.report import WHY_FLOW_ERROR_LEADS, Report, table
from smolvla_reflow.smolvla.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.smolvla.statistics import moving_deviations


def run(cfg: EvalConfig) -> None:
    """Measure, recommend, and write and print the report.

    Raises:
        ReflowError: a flag, a checkpoint, the dataset or the environment cannot be used, or a file not written.
    """
    check_values(cfg)
    checkpoints = open_checkpoints(cfg)
    metadata = open_metadata(cfg.dataset)
    checkpoints = fit_to_dataset(checkpoints, metadata, cfg.rename_map)
    if cfg.env is not None:
        check_env(cfg.env, list(checkpoints.values()), cfg.rename_map)
    chosen = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset, held_out=True))
    positions = evenly_spaced(sum(map(len, chosen)), cfg.num_frames)
    policies = [
        load_measured_policy(name, checkpoint, cfg.policy.device, cfg.rename_map)
        for name, checkpoint in checkpoints.items()
    ]
    evaluation = measure(cfg, policies, metadata, positions)
    if cfg.env is not None:
        driven = with_success(evaluation.rows, policies, cfg.env, cfg.eval, cfg.seed)
        evaluation = replace(evaluation, rows=driven)
    made_with = {**sources(checkpoints), **settings_of(cfg, num_frames=len(positions))}
    report = make_report(cfg, evaluation, policies, made_with)
    write(cfg, report)
    print(f"\n{table(report.rows)}\n\n{WHY_FLOW_ERROR_LEADS}\n\n{report.recommendation}")
    if cfg.write_num_steps and report.recommended_num_steps is not None:
        path = write_num_steps(list(checkpoints.values())[-1].folder, report.recommended_num_steps)
        print(f"Stored num_steps={report.recommended_num_steps} in {path}.")
    print(f"\nReport: {cfg.output_dir}/report.json, report.md, report.png")


def open_checkpoints(cfg: EvalConfig) -> dict[str, Checkpoint]:
    """Checkpoints by the name of their policy in the report: the reference first, the judged policy last."""
    backbone = cfg.policy.vlm_model_name
    judged = open_checkpoint(cfg.policy.path or "", cfg.policy.pretrained_revision, backbone)
    if not cfg.teacher_path:
        return {"policy": judged}
    teacher = open_checkpoint(cfg.teacher_path, cfg.teacher_revision, backbone)
    rounds = [open_checkpoint(path, backbone=backbone) for path in cfg.earlier_rounds]
    check_lineage([teacher, *rounds, judged])
    return {"teacher": teacher, **{f"round {k}": each for k, each in enumerate(rounds, start=1)}, "student": judged}


def measure(
    cfg: EvalConfig, policies: Sequence[MeasuredPolicy], metadata: LeRobotDatasetMetadata, positions: Sequence[int]
) -> Evaluation:
    """Measure the policies on the frames at these positions, with a progress bar."""
    settings = Settings(
        action_std=moving_deviations(metadata.stats["action"]),
        num_steps=cfg.num_steps,
        num_noises=cfg.num_noises,
        reference_steps=cfg.reference_steps,
        seed=cfg.seed,
    )
    chunk_size = policies[0].policy.config.chunk_size
    batches = load_frames(
        cfg.dataset, positions, chunk_size=chunk_size, batch_size=cfg.batch_size, tolerance_s=cfg.tolerance_s
    )
    with tqdm(total=len(positions), desc="measuring", unit="frame") as bar:
        return evaluate(policies, batches, settings, progress=bar.update)


def make_report(
    cfg: EvalConfig, evaluation: Evaluation, policies: Sequence[MeasuredPolicy], made_with: dict[str, Any]
) -> Report:
    """The report, with the number of steps recommended for the last policy."""
    reference, judged = policies[0], policies[-1]
    recommended = recommend(evaluation, judged.name, reference, cfg.tolerance)
    return Report(
        rows=evaluation.rows,
        recommended_num_steps=recommended,
        recommendation=in_words(recommended, judged, reference, cfg.tolerance),
        reference_rmse=evaluation.reference_rmse,
        made_with=made_with,
    )


def sources(checkpoints: dict[str, Checkpoint]) -> dict[str, Any]:
    """Where the policies are, for the report."""
    *others, judged = (checkpoint.cited() for checkpoint in checkpoints.values())
    return {"policy": judged, "teacher": others[0] if others else None, "earlier_rounds": others[1:]}


def settings_of(cfg: EvalConfig, num_frames: int) -> dict[str, Any]:
    """How the policies were measured, for the report."""
    return {
        "dataset": cfg.dataset.repo_id,
        "episodes": cfg.dataset.episodes,
        "num_frames": num_frames,
        "num_noises": cfg.num_noises,
        "seed": cfg.seed,
        "reference": f"rk4, {cfg.reference_steps} steps",
        "tolerance": cfg.tolerance,
        "env": cfg.env and env_settings(cfg.env),
        "device": cfg.policy.device,
        "versions": {p: version(p) for p in ("smolvla-reflow", "lerobot", "torch", "transformers")},
    }


def write(cfg: EvalConfig, report: Report) -> None:
    """Write the report's files. Raises ReflowError if they cannot be written."""
    assert cfg.output_dir is not None  # checked
    try:
        report.write(cfg.output_dir)
    except OSError as error:
        raise ReflowError(f"--output_dir={cfg.output_dir} cannot be written ({error}).") from None
