"""What a run is doing, noted as it does it, so that a kill can be aimed and its place be told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_scripts import pipeline
from lora_scripts.data import cache, text
from lora_scripts.tasks import image_views
from lora_scripts.training import checkpoint, loop, optim
from lora_scripts.training.log import RunLog

PHASES = (
    "caching",
    "first step",
    "step",
    "checkpoint",
    "rotation",
    "evaluation",
    "export",
)


@dataclass
class Marks:
    """Writes `+phase` and `-phase` with the time into a file, at once; may aim a kill.

    `aim`: (phase, which time it is entered, seconds after). The kill is SIGALRM's default action:
    the system ends the process between any two instructions, nothing of Python runs any more.
    """

    file: Path
    aim: tuple[str, int, float] | None = None
    entered: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def enter(self, phase: str) -> None:
        self._note("+", phase)
        self.entered[phase] = self.entered.get(phase, 0) + 1
        if self.aim is not None and self.aim[:2] == (phase, self.entered[phase]):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.aim[2]))

    def leave(self, phase: str) -> None:
        self._note("-", phase)

    def _note(self, sign: str, phase: str) -> None:
        os.write(self._descriptor, f"{sign}{phase} {time.perf_counter():.6f}\n".encode())


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
            return original(*arguments, **named)
        finally:
            marks.leave(phase)

    return marked


def read(file: Path) -> list[tuple[str, str, float]]:
    """(sign, phase, time) of each mark."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        words, _, at = line.rpartition(" ")
        rows.append((words[0], words[1:], float(at)))
    return rows


def spans(file: Path) -> list[tuple[str, int, float]]:
    """(phase, which time, seconds) of each phase that was left again."""
    open_since: dict[str, float] = {}
    times: dict[str, int] = {}
    found = []
    for sign, phase, at in read(file):
        if sign == "+":
            open_since[phase] = at
            times[phase] = times.get(phase, 0) + 1
        elif phase in open_since:
            found.append((phase, times[phase], at - open_since.pop(phase)))
    return found


def hit(file: Path) -> str:
    """The innermost phase that a killed run was in."""
    stack: list[str] = []
    for sign, phase, _ in read(file):
        if sign == "+":
            stack.append(phase)
        elif phase in stack:
            stack.remove(phase)
    return stack[-1] if stack else "between phases"
