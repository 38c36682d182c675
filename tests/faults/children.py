"""Runs in a process of their own: forked, so that PyTorch is read once and not for every run."""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts.errors import UserError, WorkError
from tests.faults import phases, stops
from tests.faults.phases import Mark, Marks
from tests.faults.stops import Stop

Then = tuple[str, int, Callable[[], None]]  # a phase, which time it is entered, what is done


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code, or minus the signal that killed it.
        said: What it printed.
        marks: The phases that it entered and left.
        sent: When signals were sent to it.
    """

    code: int
    said: str
    marks: list[Mark] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        return self.code < 0

    def stopped_in(self) -> str:
        """The phase it was in when it was stopped."""
        return phases.innermost(self.marks, self.sent[0] if self.sent else None)


def get_ready() -> None:
    """Read what all runs read, so that a child need not; keep the collector off what is shared."""
    for name in ("export.image", "export.text", "pipeline", "training.loop"):
        importlib.import_module(f"lora_scripts.{name}")
    gc.collect()
    gc.freeze()


def run(
    work: Callable[[], int],
    log: Path,
    stop: Stop | None = None,
    then: Then | None = None,
    seconds: int = 120,
) -> Ended:
    """Do `work` in a child; what it says goes to `log`. Its phases are noted.

    `stop` stops it; `then` is done by the child itself, within the phase.

    A `UserError`, a `WorkError` and Ctrl-C end it as they end the command; anything else is a
    traceback and code 70.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        timer = stop if stop is not None and stop.kind == "timer" else None
        _child(work, log, seconds, Marks(writer, timer, then))
    os.close(writer)
    sender = _Sender(child, stop)
    text = _read_all(reader, sender)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, log.read_text(encoding="utf-8"), phases.parsed(text), sender.sent)


def _read_all(reader: int, sender: _Sender) -> str:
    """What a child notes until it ends; meanwhile signals are sent when they are due."""
    parts = []
    while True:
        ready, _, _ = select.select([reader], [], [], sender.wait())
        if not ready:
            sender.send()
            continue
        part = os.read(reader, 1 << 16)
        if not part:
            os.close(reader)
            return b"".join(parts).decode()
        parts.append(part)
        for mark in phases.parsed(part.decode()):
            sender.see(mark)


class _Sender:
    """Sends the signals of a stop to a child, each at its moment."""

    def __init__(self, child: int, stop: Stop | None) -> None:
        self.child = child
        self.stop = stop if stop is not None and stop.kind in stops.SIGNALS else None
        self.entered: dict[str, int] = {}
        self.due: float | None = None
        self.sent: list[float] = []

    def wait(self) -> float | None:
        """Seconds until the next signal; None: there is none to send yet."""
        return None if self.due is None else max(0.0, self.due - time.perf_counter())

    def see(self, mark: Mark) -> None:
        """A phase was entered or left."""
        if self.stop is None or mark.sign != "+":
            return
        self.entered[mark.phase] = self.entered.get(mark.phase, 0) + 1
        aimed = (mark.phase, self.entered[mark.phase]) == (self.stop.phase, self.stop.time)
        if aimed and not self.sent:
            self.due = mark.at + self.stop.seconds
        elif self.due is not None and len(self.sent) == 1 and mark.phase == "checkpoint":
            self.due = mark.at + self.stop.then

    def send(self) -> None:
        """Send what is due."""
        assert self.stop is not None
        self.sent.append(time.perf_counter())
        number = stops.SIGNALS[self.stop.kind]
        if number is signal.SIGINT:
            os.killpg(self.child, number)  # as a terminal does
        else:
            os.kill(self.child, number)
        again = self.stop.kind == "Ctrl-C twice" and len(self.sent) == 1
        self.due = self.sent[0] + self.stop.patience if again else None


def _child(work: Callable[[], int], log: Path, seconds: int, marks: Marks) -> None:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may ignore it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _limit(seconds)
        with phases.noted(marks):
            code = work()
    except (UserError, WorkError) as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  (whatever it was, this child ends here)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit(seconds: int) -> None:
    """A child that hangs is killed by the system; SIGALRM stays free for aimed kills."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
