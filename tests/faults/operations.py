"""The n-th file operation below a folder goes wrong: it fails, its file is torn, or it is the last.

Counted are: a file opened to be written, a rename, a removal, a folder made or removed (as Python's
audit events tell of them), an fsync, and a file written by safetensors.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

Mode = Literal["kill", "tear", "fail"]
EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Shim:
    """Counts the operations in a folder; at number `at` (from 1) it does what `mode` says.

    kill: the process ends before the operation. tear: the file written last loses its second half,
    then the process ends, as after a power failure. fail: the operation, and every one after it
    that writes, has no space left.
    """

    folder: Path
    at: int | None = None
    mode: Mode = "kill"
    done: list[str] = field(default_factory=list)
    unsynced: Path | None = None

    def install(self) -> None:
        """For the rest of this process: an audit hook cannot be taken away again."""
        fsync, save = os.fsync, safetensors.torch.serialize_file

        def counted_fsync(descriptor: int) -> None:
            self.note("fsync", self.unsynced or self.folder)
            self.unsynced = None
            fsync(descriptor)

        def counted_save(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
            self.note("write", Path(path))
            save(tensors, path, *rest, **named)
            self.unsynced = Path(path)

        os.fsync = counted_fsync
        safetensors.torch.serialize_file = counted_save
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            named = isinstance(path, str | os.PathLike) and isinstance(flags, int)
            if named and flags & WRITING and self.note("write", Path(path)):
                self.unsynced = Path(path)
        elif event in EVENTS:
            self.note(EVENTS[event], Path(os.fsdecode(arguments[0])))

    def note(self, what: str, path: Path) -> bool:
        """Count an operation if it is in the folder; go wrong if it is the one."""
        if not Path(os.path.abspath(path)).is_relative_to(self.folder):  # noqa: PTH100  (no access)
            return False
        self.done.append(f"{what} {path.name}")
        number = len(self.done)
        if self.at is None or number < self.at:
            return True
        if self.mode == "fail":
            if what in ("write", "mkdir", "fsync") or number == self.at:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return True
        if number == self.at:
            if self.mode == "tear" and self.unsynced is not None and self.unsynced.is_file():
                os.truncate(self.unsynced, self.unsynced.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return True
