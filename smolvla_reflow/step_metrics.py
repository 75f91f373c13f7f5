"""What a training step tells of the student beside the loss, at no cost: its one-step error, and the loss by time.

At t = 1 a line's point is its noise, and one Euler step from there is the whole solution. So the error of the velocity
is that of the actions:

    actions_hat - actions = (noise - v(noise, 1)) - (noise - u) = u - v(noise, 1)

    sums_of(...) -> LineSums     of the lines of one step, on their device
    Monitor.read(...)            everything that is reported, read from the device in one go
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smolvla_reflow.times import TimeSampling

ONE_STEP = "one_step_error"
TENTHS = tuple(f"loss_t{k}" for k in range(10))
# What is measured now and then on held-out frames (training/measuring.py).
MEASURED = ("flow_error_1", "flow_error_2", "energy_distance_1", "energy_distance_2")
# How much of the sums is kept from step to step, which makes of their quotients means over some fifty steps.
KEPT = 0.98

_ROWS = (ONE_STEP, *TENTHS, "all_one_step", "all_losses")


@dataclass(frozen=True, eq=False)
class LineSums:
    """Sums over the couplings' lines of one step.

    Attributes:
        sums: (len(_ROWS), 2): for each row its lines' squared errors, each averaged over the chunk, and their number.
        sampling: what t was drawn from; None where a loss, or the caller of forward, chose it.
    """

    sums: Tensor
    sampling: TimeSampling | None

    @property
    def names(self) -> tuple[str, ...]:
        """What is reported of them, the same in every step and process, whatever has been drawn in this one."""
        if self.sampling is None:
            return (ONE_STEP, *TENTHS)
        tenths = self.sampling.tenths
        return (*((ONE_STEP,) if self.sampling.visits_one else ()), *(TENTHS[k] for k in sorted(tenths)))


@torch.no_grad()
def sums_of(
    errors: Tensor, times: Tensor, recorded: bool | Tensor, deviations: Tensor, sampling: TimeSampling | None
) -> LineSums:
    """Sum up the errors of the couplings among these lines. The device is not waited for.

    Args:
        errors: (N, chunk_size, max_action_dim), squared, of the student's velocity.
        times: (N,), t of each line.
        recorded: (N,) bool, the lines that are no couplings, or False.
        deviations: (D,), how many standard deviations one unit of each of the robot's action dimensions is, 0 where
            it never moves, which leaves that dimension out of the one-step error.
        sampling: see `LineSums`.
    """
    whole = errors.mean(dim=(1, 2))
    squares = deviations.square() / (deviations > 0).sum()
    in_deviations = (errors[..., : len(deviations)] * squares).sum(dim=2).mean(dim=1)
    tenths = (times * 10).long().clamp(0, 9)  # of which the last includes t = 1
    every = torch.ones_like(times, dtype=torch.bool)
    in_row = torch.stack([times == 1, *(tenths == k for k in range(10)), every, every])
    if isinstance(recorded, Tensor):
        in_row = in_row & ~recorded
    values = torch.stack([in_deviations, *([whole] * 10), in_deviations, whole])
    sums = torch.where(in_row, values, 0.0).sum(dim=1)  # not by a product, which would spread NaN to every row
    return LineSums(torch.stack([sums, in_row.sum(dim=1).to(sums)], dim=1), sampling)


@dataclass(eq=False)
class Monitor:
    """Running means of what the steps of a training have found, over some fifty steps; and how they are reported.

    Attributes:
        deviations: (D,), see `sums_of`.
        kept: sum and number of the lines of each row.
        reported: what was reported last, beside the loss.
    """

    deviations: Tensor
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)

    def deviations_on(self, device: torch.device) -> Tensor:
        """The same on this device, where they stay."""
        self.deviations = self.deviations.to(device)
        return self.deviations

    def read(
        self, metrics: Mapping[str, Tensor | float], logged: Mapping[str, Tensor | float], lines: Sequence[LineSums]
    ) -> dict[str, float]:
        """All metrics of one step as numbers, which a device is waited for once.

        Args:
            metrics: that go with the loss.
            logged: by the loss strategy.
            lines: of each call of `Step.losses`.
        """
        tensors = [x for x in (*metrics.values(), *logged.values()) if isinstance(x, Tensor)]
        values = iter(_read([*(each.sums for each in lines), *tensors]))
        sums = [torch.tensor([next(values) for _ in range(each.sums.numel())]).view(-1, 2) for each in lines]
        numbers = {
            name: next(values) if isinstance(value, Tensor) else float(value)
            for name, value in (*metrics.items(), *logged.items())
        }
        self.reported = {name: numbers[name] for name in logged}
        if lines:
            names = dict.fromkeys(name for each in lines for name in each.names)
            means = self._means(torch.stack(sums).sum(dim=0).tolist(), any(each.sampling is None for each in lines))
            self.reported |= {name: means[name] for name in names}
        return {name: numbers[name] for name in metrics} | self.reported

    def _means(self, sums: Sequence[Sequence[float]], own_times: bool) -> dict[str, float]:
        """Each row's running mean.

        Where no line has been yet, all lines stand in, since LeRobot averages what is reported: a NaN would last until
        its next line. Only where a loss chose times of its own is it NaN, because there may never be one.
        """
        for row, (total, count) in zip(_ROWS, sums, strict=True):
            total_before, count_before = self.kept.setdefault(row, (0.0, 0.0))
            if math.isfinite(total):  # in fp16 some steps are not, and are skipped
                self.kept[row] = (KEPT * total_before + total, KEPT * count_before + count)
        every = {ONE_STEP: self.kept["all_one_step"], **dict.fromkeys(TENTHS, self.kept["all_losses"])}
        found = {name: self.kept[name] if self.kept[name][1] or own_times else every[name] for name in every}
        means = {name: total / count if count else math.nan for name, (total, count) in found.items()}
        return {**means, ONE_STEP: math.sqrt(means[ONE_STEP])}


def _read(tensors: Sequence[Tensor]) -> list[float]:
    """Every number of these tensors, one after the other, in one transfer from the device of the first."""
    if not tensors:
        return []
    device = tensors[0].device
    return torch.cat([tensor.detach().to(device, torch.float32).flatten() for tensor in tensors]).tolist()
