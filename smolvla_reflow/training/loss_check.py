"""When a loss is lost, so that the run had better stop: NaN, infinite, or far above where it began."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smolvla_reflow.errors import ReflowError

EXPLODED = 1e4
# A gradient scaler begins at 2 ** 16 and halves with each step it skips: by then overflow has ended, and NaN has not.
SKIPPED_IN_A_ROW = 20


@dataclass
class LossCheck:
    """To be called with each loss before its backward pass.

    A loss has exploded at 1e4 times the one it began with, or 1e4 if that was below 1: actions are normalised, so that
    1 is the loss of a policy which has learnt nothing, but a loss of one's own may be on any scale. One that grows with
    the error, and not with its square, has exploded at 1e2.

    In fp16 a gradient scaler skips each step that has a non-finite gradient. It is left to do so until it has skipped
    20 in a row.

    Attributes:
        step: LeRobot's number of the step before the first call. It counts backward passes, also where it accumulates
            gradients.
        accumulation: backward passes for each step of the optimizer.
        scaler: of the gradients, None unless they are scaled.
        advice: what to do about a run that is stopped.
        exploded: times the beginning, or 1.
        beginning: the first finite loss.
        passes: calls until now.
        skipped: steps of the optimizer in a row, up to the last, that had a non-finite loss.
        last_skipped: that last one.
    """

    step: int
    accumulation: int
    scaler: Any
    advice: Callable[[], str]
    exploded: float = EXPLODED
    beginning: float | None = None
    passes: int = 0
    skipped: int = 0
    last_skipped: int = -1

    def __call__(self, loss: float) -> None:
        """Raises ReflowError if this loss is to be the last."""
        update, self.passes = self.passes // self.accumulation, self.passes + 1
        if math.isfinite(loss):
            lost = loss > self._limit(loss)
        else:
            lost = self.scaler is None or not self.scaler.is_enabled() or self._skipped_too_often(update)
        if lost:
            raise ReflowError(
                f"The loss is {loss:g} in step {self.step + self.passes}, so the run was stopped. A lower "
                "--policy.optimizer_lr helps where training has diverged; otherwise look for NaN in the dataset. "
                + self.advice()
            )

    def _limit(self, loss: float) -> float:
        if self.beginning is None:
            self.beginning = loss
            if loss > self.exploded:
                logging.warning(
                    "Reflow: the loss begins at %g, where 1 is that of a policy which has learnt nothing. Unless the "
                    "loss is your own, compare the dataset's statistics with its actions.",
                    loss,
                )
        return self.exploded * max(1.0, self.beginning)

    def _skipped_too_often(self, update: int) -> bool:
        if update != self.last_skipped:
            self.skipped = self.skipped + 1 if update == self.last_skipped + 1 else 1
            self.last_skipped = update
        return self.skipped >= SKIPPED_IN_A_ROW
