"""One run at a time in an output folder.

The system's own lock decides, which ends with the process however that dies: a lock file that a
killed run has left is just taken, whatever process has its number now. Beside it stands who holds
the folder, to be told to whom comes second. On a network drive without such locks the file's being
there is the lock; filelock removes one whose process is gone from this machine.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from lora_scripts.errors import UserError, user_error
from lora_scripts.files import write_text
from lora_scripts.shell import typed

logger = logging.getLogger(__name__)

LOCK, SOFT_LOCK, HOLDER = ".lock", ".lock-by-name", ".in-use.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True)
class Holder:
    """Who writes to a folder: a process, its machine, since when, by which command."""

    pid: int
    host: str
    started: str
    command: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        started = time.strftime("%Y-%m-%d %H:%M")
        return cls(os.getpid(), platform.node(), started, typed("lora-scripts", *sys.argv[1:]))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}: {self.command}"


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this run alone.

    Raises:
        UserError: if another run is writing to it, with its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquired(folder)
    holder = folder / HOLDER
    if (earlier := _read(holder)) is not None:
        logger.info("An earlier run here was cut off (%s)", earlier)
    try:
        write_text(holder, json.dumps(asdict(Holder.here()), ensure_ascii=False) + "\n")
        yield
    finally:
        with suppress(OSError):  # a drive that can no longer be written to: said by the run
            holder.unlink(missing_ok=True)
        lock.release()


def taken_by(folder: Path) -> str | None:
    """Who writes to a folder now, in words; None if nobody does. Nothing is left there."""
    if not (folder / LOCK).is_file():
        return None
    try:
        _acquired(folder).release()
    except UserError as error:
        return str(_read(folder / HOLDER) or error.problems[0].what)
    return None


def _acquired(folder: Path) -> BaseFileLock:
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _taken(folder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    else:
        return lock
    logger.warning(
        "The drive of %s knows no locks (a network drive?): runs on different machines must not "
        "share it", folder,
    )  # fmt: skip
    by_name = SoftFileLock(folder / SOFT_LOCK)
    try:
        by_name.acquire(timeout=0)
    except Timeout:
        raise _taken(folder, f"; if there is none, remove {folder / SOFT_LOCK}") from None
    return by_name


def _taken(folder: Path, more: str = "") -> UserError:
    holder = _read(folder / HOLDER)
    who = "" if holder is None else f" ({holder})"
    what = f"another run{who} is writing here now: wait, stop it, or name another output_dir{more}"
    return user_error(str(folder), what)


def _read(path: Path) -> Holder | None:
    """Who holds or held a folder; None if nobody has noted it."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
