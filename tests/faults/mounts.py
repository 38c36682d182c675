"""Small file systems of our own, in a name space of our own: nobody else sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# a name space with its own users needs no rights, where the system allows it
WAYS = (("unshare", "--map-root-user", "--mount"), ("unshare", "--mount"))
INSIDE = "LORA_SCRIPTS_FAULTS_INSIDE"  # set in the name space


def way_in() -> Sequence[str] | None:
    """The command that runs another one where it may mount; None if there is none here."""
    for way in WAYS:
        tried = [*way, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        try:
            if subprocess.run(tried, capture_output=True, timeout=20).returncode == 0:
                return way
        except OSError:
            continue
    return None


def go_inside() -> None:
    """Start this program again where it may mount, if it is not there yet."""
    if INSIDE in os.environ:
        return
    way = way_in()
    if way is None:
        sys.exit("Nothing may be mounted here (unshare --mount): this needs Linux and the right.")
    again = [*way, sys.executable, "-m", "tests.faults", *sys.argv[1:]]
    os.execvpe(way[0], again, {**os.environ, INSIDE: "1"})


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Within this context `folder` is a file system of `size` bytes, in the memory."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        _call("umount", "--lazy", str(folder))


def resize(folder: Path, size: int) -> None:
    """Give a file system another size."""
    _mount("-o", f"remount,size={size}", str(folder))


def forbid(folder: Path) -> None:
    """From now on nothing may be written below `folder` that is not open yet."""
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))


def allow(folder: Path) -> None:
    """Take `forbid` back, if it was done."""
    mounted = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    if str(folder) in [line.split()[1] for line in mounted]:
        _call("umount", "--lazy", str(folder))


def _mount(*arguments: str) -> None:
    _call("mount", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20)
    assert done.returncode == 0, (command, done.stderr)
