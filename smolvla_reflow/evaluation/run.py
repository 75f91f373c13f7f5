"""`smolvla-reflow-eval` from checked flags to the report: open, measure, decide, write.

The report is written as it grows, and once it is complete, what it recommends can be stored in the checkpoint.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lerobot.policies.rtc.configuration_rtc import RTCConfig

from smolvla_reflow.checkpoint.read import Checkpoint, open_checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata
from smolvla_reflow.dataset import (
    chosen_episodes,
    evenly_spaced,
    frame_ranges,
    load_batches,
    open_dataset,
    open_metadata,
)
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation.checks import check_values, fit_to_dataset
from smolvla_reflow.evaluation.closed_loop import check_env, env_settings
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.decision import Decision, Margins, bar_is_low, decide
from smolvla_reflow.evaluation.journal import Journal
from smolvla_reflow.evaluation.lineage import check_lineage
from smolvla_reflow.evaluation.measure import Evaluation
from smolvla_reflow.evaluation.policy import load_measured_policy
from smolvla_reflow.evaluation.real_time_chunking import is_enabled, measure_chunking, note
from smolvla_reflow.evaluation.report import NAMES, WHAT_THE_COLUMNS_SAY, Report, table
from smolvla_reflow.evaluation.stages import Found, Work, measure_all
from smolvla_reflow.evaluation.storing import write_num_steps
from smolvla_reflow.evaluation.task_sentence import dataset_sentences, in_words, unseen_sentences
from smolvla_reflow.evaluation.two_errors import TwoErrors, advice, fit
from smolvla_reflow.smolvla.statistics import moving_deviations

SECONDS_BETWEEN_WRITES = 20.0


def run(cfg: EvalConfig) -> None:
    """Measure, decide, and write and print the report.

    Raises:
        ReflowError: a flag, a checkpoint, the dataset or the environment cannot be used, or a file not written.
        KeyboardInterrupt: with how to go on.
    """
    check_values(cfg)
    assert cfg.output_dir is not None  # checked
    checkpoints, metadata = open_checkpoints(cfg), open_metadata(cfg.dataset)
    checkpoints = fit_to_dataset(checkpoints, metadata, cfg.rename_map)
    shown = [] if cfg.env is None else check_env(cfg.env, list(checkpoints.values()), cfg.rename_map, cfg.seed)
    work, judged = planned(cfg, checkpoints, metadata), list(checkpoints.values())[-1]
    warning = sentence_warning(cfg, metadata, shown)
    if warning:
        print(f"Warning: {warning}\n")
    notes = [warning] if warning else []
    try:
        found = grown(work, notes)
        notes += chunking_notes(work, judged.config.rtc_config, found)
    except KeyboardInterrupt:
        kept = f"What is measured is kept in {cfg.output_dir}; the same command goes on from there."
        raise KeyboardInterrupt(kept if work.journal.parts else "Nothing was measured yet.") from None
    report = make_report(work, found, notes)
    write(cfg.output_dir, report)
    print("\n\n".join(["", table(report.rows), WHAT_THE_COLUMNS_SAY, *report.sentences()]))
    if cfg.write_num_steps and report.recommended_num_steps is not None:
        path = write_num_steps(judged.folder, report.recommended_num_steps)
        print(f"\nStored num_steps={report.recommended_num_steps} in {path}.")
    work.journal.close()
    print(f"\nReport: {cfg.output_dir}/{', '.join(NAMES)}")


def planned(cfg: EvalConfig, checkpoints: dict[str, Checkpoint], metadata: LeRobotDatasetMetadata) -> Work:
    """What is to be measured; its journal says of what and how."""
    assert cfg.output_dir is not None
    chosen = frame_ranges(metadata, chosen_episodes(metadata, cfg.dataset, held_out=True))
    positions = evenly_spaced(sum(map(len, chosen)), cfg.num_frames)
    if len(positions) < 2:
        raise ReflowError("The episodes to measure on have a single frame; choose --dataset.episodes that have more.")
    journal = Journal(cfg.output_dir, {**sources(checkpoints), **settings_of(cfg, num_frames=len(positions))})
    policies = [
        load_measured_policy(name, checkpoint, cfg.policy.device, cfg.rename_map)
        for name, checkpoint in checkpoints.items()
    ]
    if cfg.bar_num_steps is not None:
        policies[0] = replace(policies[0], num_steps=cfg.bar_num_steps)
    chunk_size = policies[0].policy.config.chunk_size
    frames = open_dataset(cfg.dataset, chunk_size=chunk_size, tolerance_s=cfg.tolerance_s, held_out=True)
    return Work(cfg, policies, frames, positions, moving_deviations(metadata.stats["action"]), journal)


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


def sentence_warning(cfg: EvalConfig, metadata: LeRobotDatasetMetadata, shown: Sequence[str]) -> str | None:
    """What to say if the policies will see a sentence in the environment that is in no training episode.

    Args:
        cfg: checked.
        metadata: of the dataset.
        shown: by the environment itself.
    """
    if cfg.env is None:
        return None
    shown, by = (shown, f"--env.type={cfg.env.type}") if cfg.env_task is None else ([cfg.env_task], "--env_task")
    trained = dataset_sentences(metadata)
    unseen = unseen_sentences(shown, trained)
    return in_words(unseen, trained, by) if unseen else None


def grown(work: Work, notes: Sequence[str]) -> Found:
    """Measure part by part, and write the report now and then, and when it is broken off; returns everything."""
    written, found = time.monotonic(), None
    try:
        for found in measure_all(work):
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                write_unfinished(work, found, notes)
                written = time.monotonic()
    except KeyboardInterrupt:
        if found is not None:
            write_unfinished(work, found, notes)
        raise
    assert found is not None
    return found


def write_unfinished(work: Work, found: Found, notes: Sequence[str]) -> None:
    """Write the report of what there is so far."""
    assert work.cfg.output_dir is not None
    write(work.cfg.output_dir, make_report(work, replace(found, complete=False), notes))


def chunking_notes(work: Work, rtc_config: RTCConfig | None, found: Found) -> list[str]:
    """What real-time chunking makes of few steps, where the judged checkpoint has it enabled."""
    if rtc_config is None or not is_enabled(rtc_config):
        return []
    cfg = work.cfg
    (batch,) = load_batches(work.frames, [work.positions[:4]])
    errors = measure_chunking(work.policies[-1], rtc_config, batch, sorted({1, 2, 10, *cfg.num_steps}), cfg.seed)
    return [note(errors, decided(cfg, found.evaluation).recommended)]


def decided(cfg: EvalConfig, evaluation: Evaluation) -> Decision:
    """The decision on the last policy."""
    *_, judged = (cell.policy for cell in evaluation.records)
    return decide(evaluation, judged, Margins(cfg.success_margin, cfg.energy_margin))


def make_report(work: Work, found: Found, notes: Sequence[str]) -> Report:
    """The report of what has been measured."""
    evaluation, rows = found.evaluation, found.evaluation.rows()
    decision = decided(work.cfg, evaluation)
    students = [name for name in dict.fromkeys(row.policy for row in rows) if name != evaluation.bar.policy]
    two_errors: dict[str, TwoErrors | None] = {
        name: fit({row.num_steps: row.flow_rmse for row in rows if row.policy == name}) for name in students
    }
    low = bar_is_low(evaluation.bar)
    return Report(
        rows=rows,
        recommended_num_steps=decision.recommended,
        recommendation=decision.in_words(),
        decision=decision,
        two_errors=two_errors,
        advice=advice_for(decision, two_errors.get(decision.policy)),
        references=dict(evaluation.references),
        chunk_parts=found.chunk_parts,
        notes=[*([low] if low else []), *notes],
        made_with=work.journal.setup,
        complete=found.complete,
    )


def advice_for(decision: Decision, errors: TwoErrors | None) -> str | None:
    """What would let a student do with fewer steps; None for a policy alone, or where one step is enough already."""
    if decision.is_alone or errors is None or decision.recommended == 1:
        return None
    too_few = [each.num_steps for each in decision.comparisons if not each.not_inferior]
    return advice(errors, min(too_few, default=1))


def sources(checkpoints: dict[str, Checkpoint]) -> dict[str, Any]:
    """Where the policies are, and what they are, for the report."""
    *others, judged = (checkpoint.cited() for checkpoint in checkpoints.values())
    return {
        "policy": judged,
        "teacher": others[0] if others else None,
        "earlier_rounds": others[1:],
        "fingerprints": {name: checkpoint.fingerprint() for name, checkpoint in checkpoints.items()},
    }


def settings_of(cfg: EvalConfig, num_frames: int) -> dict[str, Any]:
    """How the policies are measured, for the report."""
    return {
        "dataset": cfg.dataset.repo_id,
        "episodes": cfg.dataset.episodes,
        "num_steps": cfg.num_steps,
        "bar_num_steps": cfg.bar_num_steps,
        "num_frames": num_frames,
        "num_noises": cfg.num_noises,
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "reference_steps": cfg.reference_steps,
        "success_margin": cfg.success_margin,
        "energy_margin": cfg.energy_margin,
        "env": cfg.env and env_settings(cfg.env),
        "env_task": cfg.env_task,
        "episodes_driven": cfg.eval.n_episodes if cfg.env is not None else None,
        "device": cfg.policy.device,
        "versions": {p: version(p) for p in ("smolvla-reflow", "lerobot", "torch", "transformers")},
    }


def write(folder: Path, report: Report) -> None:
    """Write the report's files. Raises ReflowError if they cannot be written."""
    try:
        report.write(folder)
    except OSError as error:
        raise ReflowError(f"--output_dir={folder} cannot be written ({error}).") from None
