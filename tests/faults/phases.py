"""What a run is doing, noted as it does it, so that a stop can be aimed and its place be told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lora_scripts import pipeline
from lora_scripts.data import cache, text
from lora_scripts.tasks import image_views
from lora_scripts.training import checkpoint, loop, optim
from lora_scripts.training.log import RunLog
from tests.faults.stops import Stop

PHASES = (
    "caching",
    "first step",
    "step",
    "checkpoint",
    "rotation",
    "evaluation",
    "logging",
    "export",
)
BETWEEN = "between phases"


@dataclass(frozen=True)
class Mark:
    """A phase was entered ("+"), left ("-") or failed in ("!"), by the machine's clock."""

    sign: str
    phase: str
    at: float


@dataclass
class Marks:
    """Writes marks to a descriptor, at once; a process that is killed has written its last.

    `timer`: when to be ended by the system. `then`: what is done when a phase is entered for the
    n-th time.
    """

    descriptor: int
    timer: Stop | None = None
    then: tuple[str, int, Callable[[], None]] | None = None
    entered: dict[str, int] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        self._note("+", phase)
        self.entered[phase] = self.entered.get(phase, 0) + 1
        here = phase, self.entered[phase]
        if self.timer is not None and (self.timer.phase, self.timer.time) == here:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.timer.seconds))
        if self.then is not None and self.then[:2] == here:
            self.then[2]()

    def leave(self, phase: str) -> None:
        self._note("-", phase)

    def fail(self, phase: str) -> None:
        """An error passes through."""
        self._note("!", phase)

    def _note(self, sign: str, phase: str) -> None:
        os.write(self.descriptor, f"{sign}{phase} {time.perf_counter():.6f}\n".encode())


@contextmanager
def noted(marks: Marks) -> Iterator[None]:
    """Within this context the phases of a run are noted."""
    places: list[tuple[Any, str, str]] = [
        (cache, "fill", "caching"),
        (text, "_tokenise", "caching"),
        (checkpoint, "write", "checkpoint"),
        (checkpoint, "_remove", "rotation"),
        (loop, "held_out_loss", "evaluation"),
        (pipeline, "_finish", "export"),
        (RunLog, "evaluation", "logging"),
        (RunLog, "histograms", "logging"),
        (RunLog, "samples", "logging"),
        (RunLog, "flush", "logging"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    rates, step = optim.set_rates, RunLog.step
    steps = 0

    def set_rates(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        marks.enter("first step" if steps == 1 else "step")
        rates(*arguments)

    def noted_step(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        marks.leave("first step" if steps == 1 else "step")

    for (owner, name, phase), (_, _, original) in zip(places, originals, strict=True):
        setattr(owner, name, _marked(marks, phase, original))
    optim.set_rates, RunLog.step = set_rates, noted_step  # type: ignore[assignment, method-assign]
    assert image_views.cache is cache  # or its filling would go unnoticed
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        optim.set_rates, RunLog.step = rates, step  # type: ignore[method-assign]


def _marked(marks: Marks, phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        marks.enter(phase)
        try:
            found = original(*arguments, **named)
        except BaseException:
            marks.fail(phase)
            raise
        marks.leave(phase)
        return found

    return marked


def parsed(text: str) -> list[Mark]:
    """The marks of a child."""
    found = []
    for line in text.splitlines():
        words, _, at = line.rpartition(" ")
        found.append(Mark(words[0], words[1:], float(at)))
    return found


def spans(marks: Sequence[Mark]) -> list[tuple[str, int, float]]:
    """(phase, which time, seconds) of each phase that was left again."""
    open_since: dict[str, float] = {}
    times: dict[str, int] = {}
    found = []
    for mark in marks:
        if mark.sign == "+":
            open_since[mark.phase] = mark.at
            times[mark.phase] = times.get(mark.phase, 0) + 1
        elif mark.sign == "-" and mark.phase in open_since:
            seconds = mark.at - open_since.pop(mark.phase)
            found.append((mark.phase, times[mark.phase], seconds))
    return found


def innermost(marks: Sequence[Mark], until: float | None = None) -> str:
    """The innermost phase that a run was in at a moment, or where it was ended."""
    stack: list[str] = []
    for mark in marks:
        if until is not None and mark.at > until:
            break
        if mark.sign == "!":
            return mark.phase
        if mark.sign == "+":
            stack.append(mark.phase)
        elif mark.phase in stack:
            stack.remove(mark.phase)
    return stack[-1] if stack else BETWEEN
