"""Numbers that a training step reports beside the loss, at no cost: one-step error, velocity's error by tenths of t.

At t = 1 a line's point is its noise, and one Euler step from there is the whole solution. So the error of the velocity
is that of the actions:

    actions_hat - actions = (noise - v(noise, 1)) - (noise - u) = u - v(noise, 1)

    sums_of(...) -> LineSums     of the lines of one step, on their device
    StepMetrics.read(...)        every number of the step, read from the device at once
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from smolvla_reflow.times import TimeSampling

ONE_STEP = "one_step_error"
# Mean squared errors without weights, over all max_action_dim dimensions, for t in [0, 0.1), ..., [0.9, 1].
TENTHS = tuple(f"velocity_mse_t{k}" for k in range(10))
# Measured now and then on held-out frames (training/measuring.py).
MEASURED = ("flow_error_1", "flow_error_2", "energy_distance_1", "energy_distance_2")
REPORTED = frozenset({ONE_STEP, *TENTHS, *MEASURED})
DECAY = 0.98  # of the running means, about 50 steps


class LineSums(NamedTuple):
    """Sums over the couplings' lines of one step."""

    sums: Tensor  # (13, 2), squared errors and lines: at t = 1, in each tenth of t, all in deviations, all as they are
    sampling: TimeSampling | None  # None if the loss, or the caller of forward, chose t itself

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics of these lines: the same in every step and process, whatever t was drawn."""
        if self.sampling is None:
            return (ONE_STEP, *TENTHS)
        one_step = (ONE_STEP,) if self.sampling.visits_one else ()
        return (*one_step, *(TENTHS[k] for k in sorted(self.sampling.tenths)))


@torch.no_grad()
def sums_of(errors: Tensor, times: Tensor, deviations: Tensor, sampling: TimeSampling | None) -> LineSums:
    """Sum up the errors of some lines, without waiting for the device.

    Args:
        errors: (N, chunk_size, max_action_dim), squared, of the student's velocity.
        times: (N,), t of each line.
        deviations: (D,), standard deviations in one unit of each of the robot's action dimensions. A dimension that
            never moves has 0, and does not count in the one-step error.
        sampling: distribution of t, see `LineSums`.
    """
    mean = errors.mean(dim=(1, 2))
    squares = deviations.square() / (deviations > 0).sum()
    in_deviations = (errors[..., : len(deviations)] * squares).sum(dim=2).mean(dim=1)
    tenths = (times * 10).long().clamp(0, 9)  # the last one includes t = 1
    every = torch.ones_like(times, dtype=torch.bool)
    in_row = torch.stack([times == 1, *(tenths == k for k in range(10)), every, every])
    values = torch.stack([in_deviations, *([mean] * 10), in_deviations, mean])
    sums = torch.where(in_row, values, 0.0).sum(dim=1)  # a product would spread NaN to every row
    return LineSums(torch.stack([sums, in_row.sum(dim=1).to(sums)], dim=1), sampling)


@dataclass(eq=False)
class StepMetrics:
    """Running means over the steps of a training, and the numbers reported last."""

    deviations: Tensor  # (D,), see `sums_of`
    # (13, 2) float64, running `LineSums.sums`
    sums: Tensor = field(default_factory=lambda: torch.zeros(13, 2, dtype=torch.float64))
    reported: dict[str, float] = field(default_factory=dict)  # by name, beside the loss
    # functions that are asked for more numbers before each step; always the same names
    reports: list[Callable[[], Mapping[str, float]]] = field(default_factory=list)
    # the last step's first tensor with NaN or infinity, if its loss was not finite (`Step.not_finite`)
    not_finite: str | None = None

    def deviations_on(self, device: torch.device) -> Tensor:
        """`deviations` on this device, where they stay."""
        self.deviations = self.deviations.to(device)
        return self.deviations

    def read(
        self, metrics: Mapping[str, Tensor | float], logged: Mapping[str, Tensor | float], lines: Sequence[LineSums]
    ) -> dict[str, float]:
        """Return all metrics of one step as numbers, waiting for the device once.

        Args:
            metrics: that go with the loss.
            logged: by the loss strategy and by `reports`.
            lines: of each call of `Step.losses`.
        """
        tensors = [x for x in (*metrics.values(), *logged.values()) if isinstance(x, Tensor)]
        values = iter(_read([*(each.sums for each in lines), *tensors]))
        sums = [torch.tensor([next(values) for _ in range(26)], dtype=torch.float64).view(13, 2) for _ in lines]
        numbers = {
            name: next(values) if isinstance(value, Tensor) else float(value)
            for name, value in (*metrics.items(), *logged.items())
        }
        self.reported = {name: numbers[name] for name in logged}
        if lines:
            means = self._means(torch.stack(sums).sum(dim=0), own_times=any(each.sampling is None for each in lines))
            self.reported |= {name: means[name] for each in lines for name in each.names}
        return {name: numbers[name] for name in metrics} | self.reported

    def _means(self, sums: Tensor, own_times: bool) -> dict[str, float]:
        """Each row's running mean.

        LeRobot averages reported numbers, so a NaN would last until its next line. A row without a line so far shows
        the mean of all lines. Only if a loss chose its own times is the row NaN, since no line may ever come.
        """
        finite = sums[:, 0].isfinite()  # in fp16 some steps are not finite, and are skipped
        self.sums[finite] = DECAY * self.sums[finite] + sums[finite]
        means = self.sums[:, 0] / self.sums[:, 1]
        empty = (self.sums[:11, 1] == 0) & (not own_times)
        every = torch.cat([means[11:12], means[12:].expand(10)])
        one_step, *tenths = torch.where(empty, every, means[:11]).tolist()
        return {ONE_STEP: math.sqrt(one_step), **dict(zip(TENTHS, tenths, strict=True))}


def _read(tensors: Sequence[Tensor]) -> list[float]:
    """Every number of these tensors, one after the other, in one transfer from the device of the first."""
    if not tensors:
        return []
    device = tensors[0].device
    return torch.cat([tensor.detach().to(device, torch.float32).flatten() for tensor in tensors]).tolist()
