"""Whether all processes of a run live, known apart from what they compute together.

A process that waits for a sum waits for ever if another is gone, and must be let wait for an hour
if the first one encodes pictures or exports. So a thread of each says every two seconds that it is
there, and when its work on a step came on last, in a store that the first process keeps. The first
one judges; the others read its judgement, or find that it is silent itself. What is lost is told by
name, and all of them end; the last checkpoint is whole.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lora_scripts.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one, after which a process is given up
STUCK = 30.0  # seconds at the same piece of work, if no piece has taken a fifth of that before
QUICK = 0.1  # seconds between two looks when all are about to end
LONGER = 5.0  # times the longest piece so far is too long
VERDICT = "verdict"
TOLD = "told"  # a verdict that needs no more words


@dataclass
class Work:
    """Pieces of work that each take about as long: a process's part of a step.

    Attributes:
        began: When the piece at hand was begun; None between two.
        longest: Seconds of the longest one that was ended; None before the first.
    """

    began: float | None = None
    longest: float | None = None

    def seconds_too_long(self, now: float) -> float:
        """For how long the piece at hand has taken too long; 0 if it has not."""
        if self.began is None or self.longest is None:
            return 0.0
        took = now - self.began
        return took if took > max(STUCK, LONGER * self.longest) else 0.0


class Pulse:
    """The sign of life of one process, and the watch over the others."""

    def __init__(self, store: TCPStore, name: str, rank: int, names: list[str]) -> None:
        """`names`: of all processes, by rank, as people are told them."""
        self._store = store
        self._name, self._rank, self._names = name, rank, names
        self._work = Work()
        self._ended = threading.Event()
        self._spoke = time.monotonic()
        self._count = 0
        now = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {n: ("", now) for n in range(len(names))}
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), daemon=True)
            for work in (self._beat, self._watch_store)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After a failure the others are told; after the work the first one is."""
        self._ended.set()
        self._threads[0].join(timeout=2 * INTERVAL)
        try:
            if error is None:
                self._store.set(_key(self._rank), json.dumps({"done": True}))
                return
            if self._verdict() is None:
                told = isinstance(error, UserError)  # by this process, for all
                said = TOLD if told else f"{self._name} has ended: {error or kind}"
                self._store.set(VERDICT, said)
            self._heed()
        except RuntimeError:  # it is gone already
            logger.debug("no store to say goodbye to")

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Within this context a piece of work is done, none of which takes far longer."""
        self._work.began = time.monotonic()
        yield
        took = time.monotonic() - self._work.began
        self._work = Work(None, max(took, self._work.longest or 0.0))

    def wait_for_verdict(self) -> None:
        """Let it be found out which process is gone, and end; returns if none is."""
        time.sleep(SILENT + 4 * INTERVAL)

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                work()
            except RuntimeError as error:  # the connection is broken; the other thread counts
                logger.debug("no sign of life could be given: %s", error)

    def _beat(self) -> None:
        self._count += 1
        late = self._work.seconds_too_long(time.monotonic())
        self._store.set(_key(self._rank), json.dumps({"count": self._count, "late": late}))
        verdict = self._verdict()
        if verdict is None and self._rank == 0:
            verdict = self._judge()
            if verdict is not None:
                self._store.set(VERDICT, verdict)
        if verdict is not None:
            self._heed()
            self._end(verdict)
        self._spoke = time.monotonic()

    def _verdict(self) -> str | None:
        return self._store.get(VERDICT).decode() if self._store.check([VERDICT]) else None

    def _judge(self) -> str | None:
        """What is wrong with one of the processes."""
        now = time.monotonic()
        for rank, name in enumerate(self._names):
            key = _key(rank)
            found = self._store.get(key).decode() if self._store.check([key]) else ""
            told: dict[str, Any] = json.loads(found) if found else {}
            before, then = self._heard[rank]
            if found != before or told.get("done"):
                self._heard[rank] = found, now
            elif now - then > SILENT:
                return f"{name} has not been heard of for {now - then:.0f} seconds"
            if late := told.get("late"):
                return f"{name} has been at its part of a step for {late:.0f} seconds: it hangs"
        return None

    def _watch_store(self) -> None:
        silent = time.monotonic() - self._spoke
        if silent > SILENT:
            self._end(f"{self._names[0]} cannot be reached for {silent:.0f} seconds")

    def _heed(self) -> None:
        """Say that the verdict was read. The first one, with which the store goes, waits for the
        others to do so; not for long, as one may be gone.
        """
        self._store.set(_heeded(self._rank), "")
        if self._rank > 0:
            return
        every = [_heeded(rank) for rank in range(len(self._names))]
        until = time.monotonic() + 3 * INTERVAL
        while time.monotonic() < until and not self._store.check(every):
            time.sleep(QUICK)

    def _end(self, verdict: str) -> None:
        if self._ended.is_set():
            return
        if verdict == TOLD:
            self._let_it_be_told()
            os._exit(UserError.exit_code)
        logger.error(
            "Stopped: %s. Nothing was saved after the last checkpoint; the same command goes on "
            "from there",
            verdict,
        )
        logging.shutdown()
        os._exit(EXIT_INTERRUPTED)

    def _let_it_be_told(self) -> None:
        """torchrun ends all with the one that ends first, which should be the one that tells."""
        until = time.monotonic() + 5 * INTERVAL
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # PyTorch's words when the connection breaks
        try:
            while time.monotonic() < until:
                self._store.check([VERDICT])  # breaks when the first one has ended
                time.sleep(QUICK)
        except RuntimeError:
            time.sleep(10 * QUICK)  # torchrun should see that one's end before this one's


def _key(rank: int) -> str:
    return f"pulse/{rank}"


def _heeded(rank: int) -> str:
    """Where a process says that it has read the verdict."""
    return f"heeded/{rank}"


def open_store(host: str, port: int, *, here: bool) -> TCPStore:
    """The store: kept by this process, at a port that is free if `port` is 0, or another's."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        host, port, is_master=here, wait_for_workers=False, timeout=timedelta(seconds=SILENT)
    )
