"""`smolvla-reflow-eval`: at how many steps may this policy run, and what is gained?

    smolvla-reflow-eval --policy.path=STUDENT --teacher_path=TEACHER --dataset.repo_id=... --output_dir=DIR

Teacher and student are measured on the same frames and the same noise. Without --teacher_path it reports on one policy
alone, which also answers whether a checkpoint is worth reflowing. After several rounds, --earlier_rounds='[2RF,3RF]'
puts them all into one report. With --env.type=... it also drives the policies in
that environment, as lerobot-eval would, and reports how often they succeed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.configs import parser
from lerobot.configs.default import DatasetConfig
from lerobot.configs.default import EvalConfig as ClosedLoopConfig
from lerobot.envs.configs import EnvConfig
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from smolvla_reflow import closed_loop
from smolvla_reflow.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.commands.console import asks_for_help, names, parse_errors, reported_errors, with_values
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import Contestant, Row, evaluate, recommend
from smolvla_reflow.files import write_whole
from smolvla_reflow.generation import load_policy, load_processors
from smolvla_reflow.normalization import robot_units
from smolvla_reflow.preflight import check_device, check_features, frame_ranges, open_dataset, open_metadata
from smolvla_reflow.report import WHY_FLOW_ERROR_LEADS, Report, table

PROGRAM = "smolvla-reflow-eval"


@dataclass
class PolicyConfig:
    path: str | None = None
    """Checkpoint to evaluate, a folder or hub id."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where both policies run."""


# The strings below the fields are their --help texts; draccus drops those that have a colon in them.
@dataclass
class EvalConfig:
    dataset: DatasetConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    teacher_path: str | None = None
    """Checkpoint of the teacher, a folder or hub id. Without it the policy is measured against its own paths."""
    earlier_rounds: list[str] = field(default_factory=list)
    """Checkpoints of the rounds between the teacher and the policy, oldest first, to be measured as well."""
    output_dir: Path | None = None
    """Where report.json, report.md and report.png go; must not exist yet."""
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10])
    """Numbers of Euler steps to measure; the policies' own defaults are measured as well."""
    num_frames: int = 256
    """Frames of the dataset, evenly spaced."""
    num_noises: int = 4
    """Noises per frame, at least 2, over which the spread is taken."""
    reference_steps: int = 100
    """Steps of rk4 for the fine solutions."""
    tolerance: float = 0.0
    """Flow error, in standard deviations, that is good enough in any case."""
    batch_size: int = 16
    """Frames at once, each with all its noises."""
    seed: int = 0
    """Seed of the noise, and of the first episode in closed loop."""
    env: EnvConfig | None = None
    """An environment to drive in, as for lerobot-eval."""
    eval: ClosedLoopConfig = field(default_factory=ClosedLoopConfig)
    """How many episodes of each task, and how many at once, as for lerobot-eval."""
    rename_map: dict[str, str] = field(default_factory=dict)
    """From the dataset's names to the policy's, as for lerobot-train."""
    write_num_steps: bool = False
    """Store the recommended number in the policy's config.json, so that plain LeRobot runs at that speed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; `argv` without the program's name, by default the process's own."""
    with reported_errors(PROGRAM, argv) as argv:
        if not asks_for_help(argv, __doc__) and not names(argv, "dataset.repo_id"):
            raise ReflowError("Name the dataset to measure on: --dataset.repo_id=... (--dataset.root=...).")
        with parse_errors():
            cfg = draccus.parse(EvalConfig, args=with_plugins(with_values(argv, "write_num_steps")))
        run(cfg)


def with_plugins(argv: Sequence[str]) -> list[str]:
    """Load the packages that --env.discover_packages_path names, as LeRobot's commands do, and drop that flag."""
    argv = list(argv)
    for flag, package in parser.parse_plugin_args(parser.PLUGIN_DISCOVERY_SUFFIX, argv).items():
        try:
            parser.load_plugin(package)
        except parser.PluginLoadError as error:
            raise ReflowError(f"--{flag}={package}: {error}") from None
        argv = list(parser.filter_arg(flag, argv))
    return argv


def run(cfg: EvalConfig) -> None:
    """Measure, report, recommend."""
    check_values(cfg)
    student = open_checkpoint(cfg.policy.path or "")
    teacher = open_checkpoint(cfg.teacher_path) if cfg.teacher_path else None
    rounds = {f"round {k}": open_checkpoint(path) for k, path in enumerate(cfg.earlier_rounds, start=1)}
    checkpoints = {"policy": student} if teacher is None else {"teacher": teacher, **rounds, "student": student}
    metadata = open_metadata(cfg.dataset)
    for checkpoint in checkpoints.values():
        check_features(checkpoint, metadata.features, cfg.rename_map)
        if checkpoint.config.adapt_to_pi_aloha:
            raise ReflowError(f"{checkpoint.source} has adapt_to_pi_aloha=true, whose units cannot be compared yet.")
        check_comparable(checkpoint, next(iter(checkpoints.values())))
    if cfg.env is not None:
        closed_loop.check_env(cfg.env, list(checkpoints.values()), cfg.rename_map)
    frames = choose_frames(cfg, [f for r in frame_ranges(metadata, cfg.dataset.episodes) for f in r])
    contestants = [load(name, checkpoint, cfg) for name, checkpoint in checkpoints.items()]
    reference, judged = contestants[0], contestants[-1]

    with tqdm(total=len(frames), desc="measuring", unit="frame") as bar:
        evaluation = evaluate(
            contestants,
            load_frames(cfg, frames, judged.policy.config.chunk_size, metadata.fps),
            torch.as_tensor(metadata.stats["action"]["std"], dtype=torch.float32),
            num_steps=cfg.num_steps,
            num_noises=cfg.num_noises,
            reference_steps=cfg.reference_steps,
            seed=cfg.seed,
            progress=bar.update,
        )
    rows = evaluation.rows if cfg.env is None else drive(cfg, contestants, evaluation.rows)
    recommended = recommend(evaluation, judged.name, reference, cfg.tolerance)
    report = Report(
        rows=rows,
        recommended_num_steps=recommended,
        recommendation=in_words(recommended, judged, reference, cfg.tolerance),
        reference_rmse=evaluation.reference_rmse,
        made_with={
            "policy": student.source,
            "teacher": teacher and teacher.source,
            "earlier_rounds": [checkpoint.source for checkpoint in rounds.values()],
            "dataset": cfg.dataset.repo_id,
            "episodes": cfg.dataset.episodes,
            "num_frames": len(frames),
            "num_noises": cfg.num_noises,
            "seed": cfg.seed,
            "reference": f"rk4, {cfg.reference_steps} steps",
            "tolerance": cfg.tolerance,
            "env": cfg.env and env_settings(cfg.env),
            "device": cfg.policy.device,
            "versions": {p: version(p) for p in ("smolvla-reflow", "lerobot", "torch", "transformers")},
        },
    )
    assert cfg.output_dir is not None
    try:
        report.write(cfg.output_dir)
    except OSError as error:
        raise ReflowError(f"--output_dir={cfg.output_dir} cannot be written ({error}).") from None
    print(f"\n{table(report.rows)}\n\n{WHY_FLOW_ERROR_LEADS}\n\n{report.recommendation}")
    if cfg.write_num_steps and recommended is not None:
        write_num_steps(student, recommended)
        print(f"Stored num_steps={recommended} in {student.folder / 'config.json'}.")
    print(f"\nReport: {cfg.output_dir}/report.json, report.md, report.png")


def check_values(cfg: EvalConfig) -> None:
    """Raise ReflowError for values that make no sense, before anything is opened."""
    if not cfg.policy.path:
        raise ReflowError("Name the checkpoint to evaluate: --policy.path=.../pretrained_model.")
    if cfg.output_dir is None:
        raise ReflowError("Name a folder for the report: --output_dir=...")
    if cfg.output_dir.exists():
        raise ReflowError(f"--output_dir={cfg.output_dir} exists already; name a new folder or remove that one.")
    if cfg.earlier_rounds and not cfg.teacher_path:
        raise ReflowError("--earlier_rounds needs --teacher_path, the checkpoint that the first round began with.")
    if not cfg.num_steps or min(cfg.num_steps) < 1:
        raise ReflowError(f"--num_steps={cfg.num_steps}: give numbers of steps, each at least 1.")
    for name, least in (("num_frames", 1), ("num_noises", 2), ("reference_steps", 2), ("batch_size", 1)):
        if getattr(cfg, name) < least:
            raise ReflowError(f"--{name}={getattr(cfg, name)}: at least {least} is needed.")
    if not cfg.tolerance >= 0:
        raise ReflowError(f"--tolerance={cfg.tolerance} is negative.")
    if cfg.write_num_steps and not Path(cfg.policy.path).expanduser().is_dir():
        raise ReflowError("--write_num_steps needs --policy.path to be a folder, whose config.json it writes.")
    check_device(cfg.policy.device)


def check_comparable(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ReflowError unless both solve ODEs of the same shape, so that they can start from the same noise."""
    for name in ("chunk_size", "max_action_dim"):
        ours, theirs = getattr(checkpoint.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ReflowError(
                f"{checkpoint.source} and the teacher cannot be compared: {name} is {ours} in it and {theirs} in the "
                "teacher."
            )


def choose_frames(cfg: EvalConfig, frames: Sequence[int]) -> list[int]:
    """Positions of `num_frames` of these frames, evenly spaced; all of them if there are fewer."""
    count = min(cfg.num_frames, len(frames))
    return [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]


def load_frames(cfg: EvalConfig, positions: Sequence[int], chunk_size: int, fps: int) -> Iterator[dict[str, Any]]:
    """Raw batches with the chunk that was recorded at each frame."""
    dataset = open_dataset(cfg.dataset, delta_timestamps={"action": [i / fps for i in range(chunk_size)]})
    yield from DataLoader(Subset(dataset, list(positions)), batch_size=cfg.batch_size)


def load(name: str, checkpoint: Checkpoint, cfg: EvalConfig) -> Contestant:
    """A checkpoint with its processors, as plain LeRobot loads them."""
    policy = load_policy(checkpoint, cfg.policy.device)
    processors = load_processors(checkpoint, cfg.policy.device, cfg.rename_map)
    units, num_steps = robot_units(checkpoint), checkpoint.config.num_steps
    return Contestant(name, policy, processors.before, processors.after, units, num_steps)


def drive(cfg: EvalConfig, contestants: Sequence[Contestant], rows: Sequence[Row]) -> list[Row]:
    """The rows with each policy's success in closed loop at that number of steps."""
    assert cfg.env is not None
    by_name = {contestant.name: contestant for contestant in contestants}
    return [
        replace(row, success=closed_loop.drive(by_name[row.policy], cfg.env, cfg.eval, row.num_steps, cfg.seed))
        for row in tqdm(rows, desc="driving", unit="table row")
    ]


def env_settings(env: EnvConfig) -> dict[str, Any]:
    """What the user may set; what the environment shows follows from its type."""
    settings = draccus.encode(env)
    return {"type": env.type, **{name: settings[name] for name in settings if not name.startswith("features")}}


def in_words(recommended: int | None, judged: Contestant, reference: Contestant, tolerance: float) -> str:
    """The recommendation as a sentence, and what would help if there is none."""
    own = f"the {reference.name}'s own {reference.num_steps} steps"
    enough = f"as close to the {reference.name}'s fine solution as {own} are"
    if tolerance:
        enough += f", or within {tolerance:g} standard deviations"
    if recommended is not None:
        return f"Recommended: num_steps={recommended}, the smallest at which the {judged.name} is {enough}."
    return (
        f"No number of steps that was measured brings the {judged.name} {enough}. What helps: training longer "
        "or at a higher learning rate, a more accurate teacher (a higher --reflow.num_steps), more couplings in each "
        "step (--reflow.couplings_per_frame=4), or accepting a --tolerance."
    )


def write_num_steps(checkpoint: Checkpoint, num_steps: int) -> None:
    """Store `num_steps` in the checkpoint's config.json, keeping every other field, whole at any moment."""
    path = checkpoint.folder / "config.json"
    fields = json.loads(path.read_text())
    fields["num_steps"] = num_steps
    try:
        write_whole(path, (json.dumps(fields, indent=4) + "\n").encode())
    except OSError as error:
        raise ReflowError(f"{path} cannot be written ({error}).") from None


if __name__ == "__main__":
    main()
