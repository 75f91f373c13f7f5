"""Compare recipes: students of one teacher that differ in nothing but their `--reflow.*` flags, over several seeds.

    python examples/studies/recipes.py --output_dir=outputs/study

The demo's task. Each seed trains a teacher of its own; each recipe then trains a student of it, with the same data,
number of steps and seed, and `smolvla-reflow-eval` measures both. Anything that is there already is kept, so that an
interrupted study goes on.
"""

import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import draccus

from smolvla_reflow.commands.demo import DEMONSTRATIONS, EVALUATION_SEED
from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.recipe import LAST, evaluation_flags, one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.task import write_dataset


@dataclass
class StudyConfig:
    output_dir: Path = Path("outputs/study")
    """Where everything goes; what is there is not made again."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One teacher and one student of each recipe for each."""
    steps: int = 1200
    """Training steps of each student."""
    recipes: list[str] = field(
        default_factory=lambda: [
            "--reflow.time_sampling=beta",
            "--reflow.time_sampling=grid:1+beta",
            "--reflow.time_sampling=exponential",
            "--reflow.time_sampling=u_shaped",
            "--reflow.time_sampling=grid:1+beta --reflow.loss=pseudo_huber",
            "--reflow.time_sampling=grid:1+beta --reflow.loss=normalized",
            "--reflow.strategy=distill",
        ]
    )
    """Flags of smolvla-reflow-train, one string for each recipe."""


def study(cfg: StudyConfig) -> None:
    """All trainings and evaluations, then the table."""
    reports: dict[str, list[dict]] = {recipe: [] for recipe in cfg.recipes}
    for seed in cfg.seeds:
        folder = (cfg.output_dir / f"seed-{seed}").resolve()
        if not (folder / "dataset").exists():
            write_dataset(folder / "dataset", DEMONSTRATIONS)
            write_backbone(folder / "backbone")
        run("lerobot-train", one_rectified_flow_flags(folder), folder / "1rf" / LAST, seed)
        for recipe in cfg.recipes:
            name = recipe.replace("--reflow.", "").replace(" ", ",").replace("=", "-").replace(":", "")
            student, evaluation = folder / name / "2rf", folder / name / "evaluation"
            flags = [*replaced(reflow_flags(folder, steps=cfg.steps), folder / "2rf", student), *recipe.split()]
            run("smolvla-reflow-train", flags, student / LAST, seed)
            flags = replaced(evaluation_flags(folder), folder / "2rf", student)
            flags = replaced(flags, folder / "evaluation", evaluation)
            report = evaluation / "report.json"
            run("smolvla-reflow-eval", flags, report, EVALUATION_SEED + seed)
            reports[recipe].append(json.loads(report.read_text()))
            print(table(reports), flush=True)


def replaced(flags: list[str], old: Path, new: Path) -> list[str]:
    """The same flags with one folder in place of another."""
    return [flag.replace(str(old), str(new)) for flag in flags]


def run(program: str, flags: list[str], result: Path, seed: int) -> None:
    """One command, unless its result is there; what an interrupted one left in its folder goes."""
    if result.exists():
        return
    output = Path(next(flag.partition("=")[2] for flag in flags if flag.startswith("--output_dir=")))
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [program, *flags, f"--seed={seed}"]
    print("$ " + shlex.join(command), flush=True)
    with output.with_suffix(".log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def table(reports: dict[str, list[dict]]) -> str:
    """Markdown: success in % and flow error in standard deviations at each number of steps, spread at one step."""
    done = {recipe: found for recipe, found in reports.items() if found}
    some = next(iter(done.values()))
    steps = sorted({row["num_steps"] for row in some[0]["rows"]})
    head = ["", *(f"success, {n}" for n in steps), *(f"flow error, {n}" for n in steps), "spread, 1"]
    lines = [head, ["---"] * len(head), ["teacher", *cells(some, "teacher", steps)]]
    lines += [[f"`{recipe}`", *cells(found, "student", steps)] for recipe, found in done.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(reports: list[dict], policy: str, steps: list[int]) -> list[str]:
    """Mean and, of several seeds, standard deviation."""
    rows = [{row["num_steps"]: row for row in report["rows"] if row["policy"] == policy} for report in reports]

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    return [
        *(cell([100 * row[n]["success"]["rate"] for row in rows], 1) for n in steps),
        *(cell([row[n]["flow_rmse"] for row in rows], 3) for n in steps),
        cell([row[1]["spread_ratio"] for row in rows], 2),
    ]


if __name__ == "__main__":
    study(draccus.parse(StudyConfig))
