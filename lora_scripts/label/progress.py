"""How far a long work on many images is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 15.0


class Count:
    """Counts images up to `total`."""

    def __init__(self, bar: Progress, what: str, total: int) -> None:
        self._bar, self._what, self._total = bar, what, total
        self._task = bar.add_task(what, total=total, rate="")
        self._began = self._last_line = time.monotonic()

    def done(self, count: int) -> None:
        """So many are done by now."""
        now = time.monotonic()
        rate = count / max(1e-9, now - self._began)
        self._bar.update(self._task, completed=count, rate=f"{rate:.1f} images/s")
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            left = (self._total - count) / max(1e-9, rate)
            logger.info("%s %d/%d  %.1f images/s  %.0f s left", self._what, count,
                        self._total, rate, left)  # fmt: skip
            self._last_line = now


@contextmanager
def counting(what: str, total: int) -> Iterator[Count]:
    """Within this context the count of images is shown."""
    console = Console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        yield Count(bar, what, total)
