"""A loss of your own: reflow that learns near the noise end alone, with t in [0.8, 1].

It goes by every flag (distribution of t, couplings per frame, share of recorded data, stored pairs). Name the file,
which is run:

    smolvla-reflow-train --reflow.strategy=examples/late_time_loss.py:late ...

or declare it in your package, so that nobody need know where it is:

    [project.entry-points."smolvla_reflow.loss_strategies"]
    late = "your_package.late_time_loss:late"
"""

from smolvla_reflow import register_loss_strategy


@register_loss_strategy("late")
def late(step):
    return step.losses(step.coupling(), times=0.8 + 0.2 * step.times())
