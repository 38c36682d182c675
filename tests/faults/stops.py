"""The ways in which a run is stopped, and when."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["timer", "SIGKILL", "SIGTERM", "Ctrl-C", "Ctrl-C twice"]

# kind -> the signal sent from outside; the timer is the process's own
SIGNALS: dict[Kind, signal.Signals] = {
    "SIGKILL": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
    "Ctrl-C twice": signal.SIGINT,
}
KINDS: tuple[Kind, ...] = ("timer", *SIGNALS)
RESUMABLE = 75


@dataclass(frozen=True)
class Stop:
    """One stop: its kind, and `seconds` after a phase is entered for the `time`-th time.

    timer: SIGALRM's default action, set by the process itself: the system ends it between any two
    instructions. The others are sent by another process. Ctrl-C twice: SIGINT, and once more
    `then` seconds after the next checkpoint is begun, or `patience` seconds after the first if
    that is sooner.
    """

    kind: Kind
    phase: str
    time: int
    seconds: float
    then: float = 0.0
    patience: float = 0.0

    def ends_with(self, code: int) -> bool:
        """Whether a run may end so: killed at once, resumable, or done if it was at its end."""
        match self.kind:
            case "timer":
                return code in (-signal.SIGALRM, 0)
            case "SIGKILL":
                return code in (-signal.SIGKILL, 0)
            case _:
                return code in (RESUMABLE, 0)


def least(options: Sequence[str], count: dict[str, int], chance: random.Random) -> str:
    """One of the options that were taken least so far."""
    fewest = min(count.get(option, 0) for option in options)
    return chance.choice([option for option in options if count.get(option, 0) == fewest])
