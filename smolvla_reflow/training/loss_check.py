"""Stop a run whose loss is NaN, infinite, or far above its first value."""

import math
from dataclasses import dataclass

from torch.amp import GradScaler

from smolvla_reflow.errors import ReflowError

EXPLODED = 1e4
# A gradient scaler begins at 2 ** 16 and halves with each skipped step. After 20 steps overflow has ended, NaN has not.
SKIPPED_IN_A_ROW = 20


@dataclass
class LossCheck:
    """A check of each loss before its backward pass."""

    step: int  # number of the last training step
    scaler: GradScaler | None  # of the gradients; it skips steps whose gradient is not finite
    limit: float = math.nan  # largest loss allowed, known from the first finite loss on
    skipped: int = 0  # losses in a row, up to the last, that were not finite

    def __call__(self, loss: float, not_finite: str | None = None) -> None:
        """Count a step. Raises ReflowError if training cannot recover from this loss.

        `not_finite` says what the loss was computed from and is not finite either.
        """
        self.step += 1
        if math.isfinite(loss):
            if math.isnan(self.limit):
                # Actions are normalised, so that 1 is the loss of a policy that has learnt nothing.
                self.limit = EXPLODED * max(1.0, loss)
            self.skipped, stop = 0, loss > self.limit
        else:
            self.skipped += 1
            skips = self.scaler is not None and self.scaler.is_enabled()
            stop = not skips or self.skipped == SKIPPED_IN_A_ROW
        if stop:
            raise ReflowError(
                f"The loss is {loss:g} in step {self.step}, so the run was stopped. {self._why(not_finite)}"
            )

    def _why(self, not_finite: str | None) -> str:
        if not_finite is not None:
            return f"Already {not_finite} hold NaN or infinity. Look at these frames and at the teacher's weights."
        if math.isnan(self.limit):
            return (
                "No loss of this run was finite, and the batch and its couplings are. So the student's weights give no "
                "finite velocity in this number format. Try --policy.use_amp=false or another checkpoint."
            )
        return "Training diverged; a lower --policy.optimizer_lr helps."
