"""Runs in a process of their own: forked, so that PyTorch is read once and not for every run."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.errors import UserError, WorkError


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; and what it said."""

    code: int
    said: str

    @property
    def killed(self) -> bool:
        return self.code < 0


def run(work: Callable[[], int], log: Path, seconds: float = 120) -> Ended:
    """Do `work` in a child; what it says goes to `log`.

    A `UserError`, a `WorkError` and Ctrl-C end it as they end the command; anything else is a
    traceback and code 70.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(work, log, int(seconds))
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8"))


def _child(work: Callable[[], int], log: Path, seconds: int) -> None:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.setsid()
        _limit(seconds)
        code = work()
    except (UserError, WorkError) as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 75
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
