"""One input tried: read, refused in words, or a fault; and what came of many."""

from __future__ import annotations

import hashlib
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lora_scripts.errors import UserError, WorkError
from tests.fuzz.mutation import Files

SECONDS = 2.0  # of computing; more for one input is a fault
WAITING_SECONDS = 30.0  # of the clock, on a machine that has other work
MEMORY = 2 << 30  # bytes of address space beyond what the process has when the trials begin


class TooSlow(BaseException):
    """An input took longer than it may. No `Exception`, so that no reader takes it for its own."""


@dataclass(frozen=True)
class Target:
    """A reader, and the files to spoil for it.

    Attributes:
        share: How many of a thousand inputs of a whole run are its.
        seeds: Good inputs; the folder given is for models and runs to be made in.
        spoil: An input made of the seeds by chance.
        read: Reads what lies in a folder.
    """

    name: str
    share: int
    seeds: Callable[[Path], Sequence[Files]]
    spoil: Callable[[random.Random, Sequence[Files]], Files]
    read: Callable[[Path], object]


@dataclass
class Tally:
    """What came of a target's inputs. `faults`: what -> how often; `longest`: in seconds."""

    name: str
    read: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.read + self.refused + self.faults.total()


def run(
    target: Target, inputs: int, seed: int, work: Path, saved: Path, say: Callable[[Tally], None]
) -> Tally:
    """Try `inputs` inputs of a target. The files of each new fault are put into `saved`."""
    tally = Tally(target.name)
    seeds = target.seeds(work / "seeds")
    place = work / "input"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(inputs):
        files = target.spoil(random.Random(f"{seed} {target.name} {number}"), seeds)
        _write(place, files)
        with limited_memory():
            fault = _try(target, place, tally)
        if fault is not None and (tally.faults[fault] == 1):
            name = f"{target.name}-{hashlib.sha256(fault.encode()).hexdigest()[:8]}"
            _write(saved / name, files)
            (saved / name / "FAULT.txt").write_text(fault, encoding="utf-8", errors="replace")
        say(tally)
    return tally


def _try(target: Target, place: Path, tally: Tally) -> str | None:
    """Read one input and count what came of it. Returns the fault, if it is one."""
    begun = time.process_time()
    fault = None
    try:
        with _bounded():
            target.read(place)
        tally.read += 1
    except (UserError, WorkError) as error:
        fault = _wrongly_said(error)
        if fault is None:
            tally.refused += 1
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 Rust's panics are no `Exception`
        fault = _told(error)
    if fault is not None:
        tally.faults[fault] += 1
    seconds = time.process_time() - begun
    tally.longest = max(tally.longest, seconds)
    tally.seconds += seconds
    return fault


def _wrongly_said(error: UserError | WorkError) -> str | None:
    """A refusal says something, in a few lines, with nothing that a console could act on."""
    text = str(error)
    if not text.strip() or "Traceback" in text:
        return f"nothing said, or a traceback: {text[:200]!r}"
    if "\x1b" in text or "\0" in text:
        return f"control characters are said: {text[:200]!r}"
    return None


def _told(error: BaseException) -> str:
    """The kind of exception and the last places of our own code that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lora_scripts/" in frame.filename.replace("\\", "/")]
    places = [f"{frame.filename.rpartition('lora_scripts/')[2]}:{frame.lineno}" for frame in ours]
    last = frames[-1]
    return f"{type(error).__name__} at {' < '.join(places[:-4:-1])} ({last.name})"


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise `TooSlow` in the middle of what computes, or waits, longer than it may."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    limits = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
              (signal.ITIMER_REAL, signal.SIGALRM, WAITING_SECONDS))  # fmt: skip
    before = {number: signal.signal(number, stop) for _, number, _ in limits}
    for timer, _, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in limits:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within this context the process may take `MEMORY` bytes more than it has now (Linux)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _write(place: Path, files: Files) -> None:
    """Exactly these files in a folder; what else was in it goes."""
    place.mkdir(parents=True, exist_ok=True)
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
