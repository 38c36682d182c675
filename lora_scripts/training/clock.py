"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent on each kind of work, each time that it was done."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Count the time within this context; on a card the work ends with a number read off it."""
        began = time.perf_counter()
        yield
        self.seconds[what].append(time.perf_counter() - began)

    def each(self, what: str) -> float:
        """Seconds that it takes: the mean, the first time left out if there were more; 0: never."""
        seconds = self.seconds[what]
        seconds = seconds[1:] or seconds
        return sum(seconds) / len(seconds) if seconds else 0.0
