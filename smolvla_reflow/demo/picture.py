"""The demo's picture: many drives of the same scene, by teacher and student."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from smolvla_reflow.demo.driving import Drives
from smolvla_reflow.demo.task import OBSTACLE_RADIUS, OBSTACLE_X, VIEW_HALF_HEIGHT

ARRIVED, CRASHED = "#0072B2", "#D55E00"  # told apart by colour-blind readers too


def draw_paths(panels: dict[str, Drives], file: Path) -> None:
    """Draw the paths of some drives, side by side.

    Args:
        panels: drives by their title; each starts at (0, 0), with the obstacle at y = 0.
        file: PNG to write.
    """
    figure = Figure(figsize=(3.0 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, drives) in zip(axes, panels.items(), strict=True):
        axis.add_patch(Circle((OBSTACLE_X, 0.0), OBSTACLE_RADIUS, color="0.75", zorder=0))
        for path, success in zip(drives.paths, drives.success, strict=True):
            axis.plot(*path.T, color=ARRIVED if success else CRASHED, lw=1.0, alpha=0.5)
        axis.set_title(f"{title}\n{drives.success.mean():.0%} of {len(drives.success)} get past", fontsize=10)
        axis.set(xlim=(-0.03, 1.05), ylim=(-VIEW_HALF_HEIGHT, VIEW_HALF_HEIGHT), xlabel="x", aspect="equal")
    axes[0].set_ylabel("y")
    handles = [Line2D([], [], color=ARRIVED), Line2D([], [], color=CRASHED)]
    figure.legend(handles, ["gets past", "hits the obstacle"], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)
