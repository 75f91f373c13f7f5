"""`smolvla-reflow-eval` from parsed flags to the report: check, measure, decide, write.

The report is written as it grows. Once it is complete, the recommended number can be stored in the checkpoint.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_reflow.checkpoint.read import Checkpoint, open_checkpoint
from smolvla_reflow.compat import LeRobotDatasetMetadata, control_frequency, renamed_statistics
from smolvla_reflow.dataset.frames import check_finite, episodes_of, evenly_spaced, load_batches, trained_columns
from smolvla_reflow.dataset.opening import open_dataset, open_metadata
from smolvla_reflow.errors import ReflowError, doing
from smolvla_reflow.evaluation.checks import check_lineage, check_values, fit_to_dataset
from smolvla_reflow.evaluation.closed_loop import check_env
from smolvla_reflow.evaluation.config import EvalConfig
from smolvla_reflow.evaluation.decision import (
    BEST_REWARD,
    ENERGY_DISTANCE,
    SUCCESS,
    Decision,
    bar_is_low,
    decide,
)
from smolvla_reflow.evaluation.frames import Seen, choose, copy_warning, trained_episodes
from smolvla_reflow.evaluation.journal import Journal, journal_in
from smolvla_reflow.evaluation.key import key_of
from smolvla_reflow.evaluation.measure import fine_errors, summary
from smolvla_reflow.evaluation.policy import load_measured_policy
from smolvla_reflow.evaluation.report import COLUMNS_IN_WORDS, NAMES, Report, table
from smolvla_reflow.evaluation.stages import Evaluation
from smolvla_reflow.evaluation.start import NORMAL
from smolvla_reflow.evaluation.start import in_words as start_in_words
from smolvla_reflow.evaluation.start import warning as start_warning
from smolvla_reflow.evaluation.storing import rtc_note, write_num_steps
from smolvla_reflow.evaluation.task_sentence import in_words, unseen_sentences
from smolvla_reflow.evaluation.two_errors import TwoErrors, advice, fit
from smolvla_reflow.smolvla.features import rename_map_in_use
from smolvla_reflow.smolvla.statistics import moving_deviations

SECONDS_BETWEEN_WRITES = 20.0


def run(cfg: EvalConfig) -> None:
    """Measure, decide, and write and print the report; a KeyboardInterrupt says how to go on."""
    check_values(cfg)
    checkpoints, metadata = open_checkpoints(cfg), open_metadata(cfg.dataset)
    checkpoints = fit_to_dataset(checkpoints, metadata, cfg.rename_map)
    *_, judged = checkpoints.values()
    shown = [] if cfg.env is None else check_env(cfg.env, list(checkpoints.values()), cfg.rename_map, cfg.seed)
    trained = {name: trained_episodes(each, cfg.dataset, metadata) for name, each in checkpoints.items()}
    *_, by_judged = trained.values()
    cfg.dataset = choose(cfg.dataset, metadata, by_judged)
    dataset, positions = open_frames(cfg, judged, metadata)
    seen = Seen.count(episodes_of(dataset, positions), trained)
    assert cfg.output_dir is not None  # checked
    with journal_in(cfg.output_dir, key_of(cfg, checkpoints, dataset, positions)) as journal:
        warnings = sentence_warnings(cfg, list(metadata.tasks.index), shown)
        warnings += copy_warning(judged, cfg.dataset, by_judged)
        for warning in warnings:
            print(f"Warning: {warning}\n")
        report = measured(prepared(cfg, checkpoints, dataset, positions, journal, seen, warnings))
        print("\n\n".join(["", table(report.rows), COLUMNS_IN_WORDS, *report.sentences()]))
        if cfg.write_num_steps and report.recommended_num_steps is not None:
            path = write_num_steps(judged.folder, report.recommended_num_steps)
            print(f"\nStored num_steps={report.recommended_num_steps} in {path}.")
        journal.remove()
    print(f"\nReport: {cfg.output_dir}/{', '.join(NAMES)}")


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


def open_frames(
    cfg: EvalConfig, judged: Checkpoint, metadata: LeRobotDatasetMetadata
) -> tuple[LeRobotDataset, list[int]]:
    """The dataset, opened, and the positions of the frames to measure on."""
    dataset = open_dataset(
        cfg.dataset,
        chunk_size=judged.config.chunk_size,
        tolerance_s=cfg.tolerance_s,
        held_out=True,
        rename_map=rename_map_in_use(judged, cfg.rename_map, metadata.features),
    )
    positions = evenly_spaced(len(dataset), cfg.num_frames)
    if len(positions) < 2:
        raise ReflowError("The episodes to measure on have a single frame; choose --dataset.episodes that have more.")
    return dataset, positions


def prepared(
    cfg: EvalConfig,
    checkpoints: dict[str, Checkpoint],
    dataset: LeRobotDataset,
    positions: Sequence[int],
    journal: Journal,
    seen: Seen,
    warnings: Sequence[str],
) -> Evaluation:
    """Check the frames and load the policies."""
    *_, judged = checkpoints.values()
    metadata, renames = dataset.meta, rename_map_in_use(judged, cfg.rename_map, dataset.meta.features)
    check_finite(dataset, trained_columns(metadata.features, renames))
    policies = [
        load_measured_policy(name, checkpoint, cfg.policy.device, cfg.rename_map)
        for name, checkpoint in checkpoints.items()
    ]
    if cfg.bar_num_steps is not None:
        policies[0] = replace(policies[0], num_steps=cfg.bar_num_steps)
    if cfg.noise != NORMAL:
        last = policies[-1]
        policies.append(replace(last, name=f"{last.name} from {start_in_words(cfg.noise)}", start=cfg.noise))
    return Evaluation(
        cfg=cfg,
        policies=policies,
        load=partial(load_batches, dataset, rename_map=renames),
        positions=positions,
        action_std=moving_deviations(renamed_statistics(metadata.stats, renames)["action"]),
        journal=journal,
        rtc_config=judged.config.rtc_config,
        seen=seen,
        one_step_only=judged.noted("reflow").get("strategy") == "distill",
        warnings=warnings,
    )


def sentence_warnings(cfg: EvalConfig, trained: Sequence[str], shown: Sequence[str]) -> list[str]:
    """A warning if the policies will see a sentence in the environment that is in no training episode."""
    if cfg.env is None:
        return []
    shown, by = (shown, f"--env.type={cfg.env.type}") if cfg.env_task is None else ([cfg.env_task], "--env_task")
    unseen = unseen_sentences(shown, trained)
    return [in_words(unseen, trained, by)] if unseen else []


def measured(evaluation: Evaluation) -> Report:
    """Measure part by part; write the report now and then, and at the end."""
    written, folder = time.monotonic(), evaluation.cfg.output_dir
    try:
        for _ in evaluation.measure():
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES and not evaluation.is_complete:
                write(evaluation)
                written = time.monotonic()
    except KeyboardInterrupt:
        if evaluation.table().empty:
            raise KeyboardInterrupt("Nothing was measured yet.") from None
        write(evaluation)
        kept = f"The finished parts are kept in {folder}; the same command goes on from there."
        raise KeyboardInterrupt(kept) from None
    return write(evaluation)


def write(evaluation: Evaluation) -> Report:
    """Write the report of the parts that are finished; returns it."""
    report, folder = make_report(evaluation), evaluation.cfg.output_dir
    assert folder is not None
    with doing(f"writing to --output_dir={folder}"):
        report.write(folder)
    return report


def make_report(evaluation: Evaluation) -> Report:
    """The report of the parts that are finished, at least the frames of a first batch."""
    cfg, bar, frames, driven = evaluation.cfg, evaluation.bar, evaluation.table(), evaluation.driven()
    judged, chunk_times = evaluation.policies[-1].name, evaluation.chunk_times()
    one_noise = {policy.name for policy in evaluation.policies if policy.start != NORMAL}
    delays = evaluation.delays()
    rows = summary(frames, bar, cfg.seed, chunk_times, driven, delays, one_noise)
    margins = {SUCCESS: cfg.success_margin, BEST_REWARD: cfg.reward_margin, ENERGY_DISTANCE: cfg.energy_margin}
    decision = decide(
        frames,
        driven,
        bar,
        judged,
        margins=margins,
        decide_by=cfg.decide_by,
        one_step_only=evaluation.one_step_only,
        on_seen_frames=evaluation.seen.by_judged != 0,
        in_time=len({delay.steps for cell, delay in delays.items() if cell.policy == judged}) > 1,
        is_alone=not cfg.teacher_path,
        one_noise=judged in one_noise,
        seed=cfg.seed,
    )
    two_errors = {
        policy.name: fit({row["num_steps"]: row["flow_rmse"] for row in rows if row["policy"] == policy.name})
        for policy in evaluation.policies[1:]
    }
    start = None if cfg.noise == NORMAL else start_warning(rows, judged, evaluation.policies[-2].name, margins)
    notes = [
        start,
        late_note(cfg),
        bar_is_low(bar),
        *evaluation.warnings,
        rtc_note(evaluation.rtc_config, decision.recommended),
    ]
    return Report(
        rows=rows,
        recommended_num_steps=decision.recommended,
        recommendation=decision.in_words(),
        decision=decision,
        two_errors=two_errors,
        advice=advice_for(decision, two_errors.get(decision.policy)),
        references={name: {"steps": cfg.reference_steps, "rmse": rmse} for name, rmse in fine_errors(frames).items()},
        chunk_time=chunk_times.get(judged),
        seen=evaluation.seen,
        notes=[each for each in notes if each is not None],
        made_with=evaluation.journal.key,
        complete=evaluation.is_complete,
    )


def late_note(cfg: EvalConfig) -> str | None:
    """A sentence about `--latency_ms`; None without it."""
    if cfg.latency_ms is None or cfg.env is None:
        return None
    fps = control_frequency(cfg.env)
    return (
        f"Each chunk arrived in the simulator with its delay (--latency_ms={cfg.latency_ms}, {fps:g} control steps a "
        "second). The robot executed the chunk before meanwhile. It dropped the late actions, and took "
        f"--aggregate_fn_name={cfg.aggregate_fn_name} where both chunks had an action for one control step."
    )


def advice_for(decision: Decision, errors: TwoErrors | None) -> str | None:
    """Advice for fewer steps; None for a policy alone, or if one step is enough already."""
    if decision.is_alone or errors is None or decision.recommended == 1:
        return None
    too_few = [each.num_steps for each in decision.comparisons if each.is_tested and not each.not_inferior]
    return advice(errors, min(too_few, default=1))
