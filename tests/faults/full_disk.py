"""Runs that find no room, a limit, or a folder that may not be written any more."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

from tests.faults import children, mounts, stops
from tests.faults.children import Ended, Then
from tests.faults.soak import Whole
from tests.faults.tally import Tally

ENOUGH = 64_000_000  # bytes: more than a toy run writes
LEAST_LIMIT = 24_000  # bytes of a file: what a run prints must fit
FILLER = "filler"
WAYS = ("too small a disk", "a disk that fills up", "a limit of a file's size", "read-only")


def harm(undisturbed: Whole, way: str, number: int, tally: Tally, chance: random.Random) -> None:
    """One run that finds no room in this way, then the same command with room."""
    case = undisturbed.case
    folder = undisturbed.folder.with_name(f"full-{number}")
    tally.runs += 1
    size = chance.randrange(4096, _written(undisturbed)) if way == WAYS[0] else ENOUGH
    with mounts.disk(folder, size):
        said = undisturbed.folder.with_name(f"said-full-{number}")
        first = _first(undisturbed, way, folder, said, tally, chance)
        tally.hit[first.stopped_in() if first.code else "not at all", way] += 1
        if first.code:
            tally.noted[f"not written: {_what(first, folder)}"] += 1
        _give_room(way, folder, case.output(folder))
        if not _is_clear(first):
            tally.fail(case, f"{way}, {size}: code {first.code}: {first.said[-2000:]}")
            return
        again = children.run(lambda: case.start(folder), said)
        if again.code != 0:
            tally.fail(case, f"{way}, {size}, again: code {again.code}: {again.said[-2000:]}")
            return
        place = f"{way} ({size} bytes), {first.stopped_in()}"
        tally.compare(case, undisturbed.folder, folder, place)


def _first(
    undisturbed: Whole, way: str, folder: Path, said: Path, tally: Tally, chance: random.Random
) -> Ended:
    case = undisturbed.case
    match way:
        case "a disk that fills up":
            then = _aim(undisturbed, way, lambda: _fill(folder), tally, chance)
        case "read-only":
            forbid = lambda: mounts.forbid(case.output(folder))  # noqa: E731
            then = _aim(undisturbed, way, forbid, tally, chance)
        case _:
            then = None
    limit = None
    if way == "a limit of a file's size":
        limit = chance.randrange(LEAST_LIMIT, max(_sizes(undisturbed)))

    def start() -> int:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return case.start(folder)

    return children.run(start, said, then=then)


def _give_room(way: str, folder: Path, output: Path) -> None:
    match way:
        case "too small a disk":
            mounts.resize(folder, ENOUGH)
        case "a disk that fills up":
            (folder / FILLER).unlink(missing_ok=True)
        case "read-only":
            mounts.allow(output)


def _is_clear(ended: Ended) -> bool:
    """It was done all the same, or ended with a sentence that says what happened and what to do."""
    if ended.code == 0:
        return True
    what = [os.strerror(e) for e in (errno.ENOSPC, errno.EFBIG, errno.EROFS)]
    told = (
        sum(ended.said.count(text) for text in what) == 1 and "goes on from the last" in ended.said
    )
    refused = ended.code == 2 and " free" in ended.said and "make room" in ended.said
    return "Traceback" not in ended.said and (refused or (ended.code == 1 and told))


def _what(ended: Ended, folder: Path) -> str:
    """The kind of file that the message names."""
    line = next((line for line in ended.said.splitlines() if line.startswith("Failed: ")), "")
    path = Path(line.removeprefix("Failed: ").partition(": ")[0])
    if not path.is_relative_to(folder):
        return f"a file that is not named ({line[8:40]}…)"
    parts = path.relative_to(folder).parts
    kind = ("cache", "tensorboard", "checkpoints", "samples")
    return next((part for part in parts if part in kind), path.name)


def _aim(
    undisturbed: Whole, way: str, what: Callable[[], None], tally: Tally, chance: random.Random
) -> Then:
    """Within a phase that was hit least in this way."""
    there = sorted({phase for phase, _, _ in undisturbed.spans})
    phase = stops.least(there, {name: tally.hit[name, way] for name in there}, chance)
    times = [span for span in undisturbed.spans if span[0] == phase]
    return phase, chance.choice(times)[1], what


def _fill(folder: Path) -> None:
    """Somebody else's file takes all that is left."""
    with (folder / FILLER).open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _sizes(undisturbed: Whole) -> list[int]:
    return [path.stat().st_size for path in undisturbed.folder.rglob("*") if path.is_file()]


def _written(undisturbed: Whole) -> int:
    """Bytes that a run has written, in pages."""
    return sum(-(-size // 4096) * 4096 for size in _sizes(undisturbed))
