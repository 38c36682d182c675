"""Runs that the operating system kills for want of memory, in a control group with a limit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import children
from tests.faults.soak import Whole
from tests.faults.tally import Tally

CGROUPS = Path("/sys/fs/cgroup")
NAME = "lora-scripts-faults"
MEGABYTE = 1 << 20
HOG = 1 << 30  # bytes that a run suddenly needs, more than the limit leaves
ROOM = 256 * MEGABYTE  # above what a run has when it starts to train


@dataclass(frozen=True)
class Group:
    """A control group of this system's kind."""

    folder: Path
    limit_file: str
    kills_file: str

    def take_in(self) -> None:
        """Put this process into it."""
        self._write("cgroup.procs", str(os.getpid()))

    def limit(self, count: int | None) -> None:
        """Allow so many bytes; None: no limit."""
        nothing = "-1" if self.limit_file == "memory.limit_in_bytes" else "max"
        self._write(self.limit_file, nothing if count is None else str(count))

    def used(self) -> int:
        """Bytes in use now."""
        name = self.limit_file.replace("limit_in_bytes", "usage_in_bytes").replace("max", "current")
        return int((self.folder / name).read_text(encoding="utf-8"))

    def kills(self) -> int:
        """How many processes in it the system has killed for want of memory."""
        lines = (self.folder / self.kills_file).read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")


@contextmanager
def group() -> Iterator[Group | None]:
    """A control group below this process's own; None where none can be made."""
    made = _make()
    try:
        yield made
    finally:
        if made is not None:
            made.folder.rmdir()


def _make() -> Group | None:
    own = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        own |= {kind: path.lstrip("/") for kind in kinds.split(",")}
    places = []
    if "memory" in own:
        first = CGROUPS / "memory" / own["memory"] / NAME
        places.append(Group(first, "memory.limit_in_bytes", "memory.oom_control"))
    if "" in own:
        second = CGROUPS / own[""] / NAME
        places.append(Group(second, "memory.max", "memory.events"))
    for place in places:
        try:
            place.folder.mkdir(exist_ok=True)
        except OSError:
            continue
        if (place.folder / place.limit_file).is_file():
            return place
        place.folder.rmdir()
    return None


def harm(
    undisturbed: Whole, limited: Group, number: int, tally: Tally, chance: random.Random
) -> None:
    """One run that needs more than it may in the midst of a phase; then again without a limit."""
    case = undisturbed.case
    folder = undisturbed.folder.with_name(f"starved-{number}")
    folder.mkdir(parents=True)
    tally.runs += 1
    phase, time, _ = chance.choice(undisturbed.spans)

    def start() -> int:
        limited.take_in()
        return case.start(folder)

    def need_more() -> None:
        limited.limit(limited.used() + ROOM)
        bytearray(os.urandom(MEGABYTE) * (HOG // MEGABYTE))

    kills = limited.kills()
    first = children.run(start, folder / "said", then=(phase, time, need_more))
    killed = limited.kills() - kills
    limited.limit(None)
    tally.hit[first.stopped_in(), "killed for want of memory"] += 1
    if first.code != -9 or killed != 1:
        tally.fail(case, f"{phase}: code {first.code}, {killed} killed: {first.said[-1500:]}")
        return
    again = children.run(start, folder / "said")
    if again.code != 0:
        tally.fail(case, f"{phase}, again: code {again.code}: {again.said[-1500:]}")
        return
    tally.compare(case, undisturbed.folder, folder, f"starved in {phase}")
