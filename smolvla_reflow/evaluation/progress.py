"""One progress bar over everything that takes time, with the time that is left."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_REFRESHES = 0.5


class Progress:
    """A bar over parts of several kinds, each kind at its own pace.

    The time left is estimated from how long the parts of each kind have taken; of a kind none of which is done yet it
    is taken to be that of the slowest kind known.
    """

    def __init__(self, parts: Mapping[str, int]):
        """
        Args:
            parts: how many there are to do of each kind.
        """
        self.left = dict(parts)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in parts}
        self.begun = time.monotonic()
        self.current: tuple[str, float] | None = None
        self.shown = -SECONDS_BETWEEN_REFRESHES
        self.bar = tqdm(
            desc="starting",
            total=1.0,
            file=sys.stderr,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
            leave=False,
        )

    def run(self, kind: str, what: str, part: Callable[[], T]) -> T:
        """Run a part of this kind and show `what` meanwhile. Other bars, which it may have, are not shown."""
        self.current = (kind, time.monotonic())
        self.bar.set_description_str(what, refresh=False)
        self.show()
        with contextlib.redirect_stderr(io.StringIO()):
            found = part()
        self.seconds[kind].append(time.monotonic() - self.current[1])
        self.left[kind] -= 1
        self.current = None
        self.show()
        return found

    def skip(self, kind: str) -> None:
        """A part of this kind was done before."""
        self.left[kind] -= 1

    def tick(self) -> None:
        """Called often within a part, so that the bar moves on; it is shown now and then."""
        if time.monotonic() - self.shown >= SECONDS_BETWEEN_REFRESHES:
            self.show()

    def show(self) -> None:
        """Show the time that has passed, and what is left."""
        self.shown = time.monotonic()
        elapsed, left = self.shown - self.begun, self.seconds_left()
        self.bar.n = 0.0 if left is None else elapsed / max(elapsed + left, 1e-9)
        self.bar.set_postfix_str("" if left is None else f"about {tqdm.format_interval(round(left))} left", False)
        self.bar.refresh()

    def seconds_left(self) -> float | None:
        """An estimate; None as long as nothing is done."""
        pace = {kind: sum(taken) / len(taken) for kind, taken in self.seconds.items() if taken}
        if not pace:
            return None
        left = sum(count * pace.get(kind, max(pace.values())) for kind, count in self.left.items())
        if self.current is not None:
            kind, since = self.current
            left -= min(time.monotonic() - since, pace.get(kind, max(pace.values())))
        return left

    def close(self) -> None:
        self.bar.close()


@contextlib.contextmanager
def progress(parts: Mapping[str, int]) -> Iterator[Progress]:
    """A bar that goes away at the end."""
    bar = Progress(parts)
    try:
        yield bar
    finally:
        bar.close()
