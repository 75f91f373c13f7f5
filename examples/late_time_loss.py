"""A loss of your own in three lines: reflow that trains only near the noise, at t in [0.8, 1].

All flags hold for this loss: distribution of t, weights, couplings per frame, share of recorded data, stored pairs.
There are two ways to use it. Name the file, which is then run:

    smolvla-reflow-train --reflow.strategy=examples/late_time_loss.py:late ...

Or put it into a package of your own, and declare it in that package's pyproject.toml (the value names the function):

    [project.entry-points."smolvla_reflow.loss_strategies"]
    late = "your_package.late_time_loss:late"

    smolvla-reflow-train --reflow.strategy=late ...
"""

from smolvla_reflow import register_loss_strategy


@register_loss_strategy("late")
def late(step):
    return step.losses(step.coupling(), times=0.8 + 0.2 * step.times())
