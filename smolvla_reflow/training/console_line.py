"""A line on the console with what a policy reports beside its loss, for the LeRobot versions that print none."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lerobot.utils.utils import format_big_number


@dataclass
class ConsoleLine:
    """To be called with each loss before its backward pass; logs whenever LeRobot does.

    Attributes:
        step: LeRobot's number of the step before the first call.
        every: how many steps (`log_freq`).
        reported: gives what the last forward pass has reported.
    """

    step: int
    every: int
    reported: Callable[[], Mapping[str, float]]

    def __call__(self, loss: float) -> None:
        self.step += 1
        if self.every > 0 and self.step % self.every == 0 and self.reported():
            numbers = " ".join(f"{name}:{value:.3f}" for name, value in self.reported().items())
            logging.info("step:%s %s", format_big_number(self.step), numbers)
