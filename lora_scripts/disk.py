"""Whether the disk has room for what a run will write: told before anything is loaded."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from lora_scripts import belonging, preflight, run_files, written
from lora_scripts.belonging import Base
from lora_scripts.data.rows import AnyRows
from lora_scripts.errors import Problem, UserError
from lora_scripts.schema import Config, TextConfig
from lora_scripts.written import BESIDE_LIMIT, Outlook


@dataclass(frozen=True)
class Room:
    """The room that a run has, in bytes.

    Attributes:
        free: On the disk of the output folder, for this user.
        written: What the run's checkpoints that are there already take.
        cache_free: On the cache's disk; None if that is the same.
    """

    free: int
    written: int = 0
    cache_free: int | None = None


def check(config: Config, rows: AnyRows) -> None:
    """Before a run: stop it if there surely is too little room, warn if there may be.

    `rows`: as `preflight.inputs` gives them.

    Raises:
        UserError: with the numbers and what to change.
    """
    found = look(config, rows)
    if errors := [problem for problem in found if problem.severity == "error"]:
        raise UserError(errors)
    preflight.say(found)


def look(config: Config, rows: AnyRows) -> list[Problem]:
    """An error if a run surely has too little room, a warning if it may have.

    `rows`: as `preflight.inputs` gives them.

    Raises:
        UserError: if the base model cannot be taken.
    """
    outlook = foresee(config, rows, belonging.of(config))
    return [] if outlook is None else problems(config, outlook, room(config))


def foresee(config: Config, rows: AnyRows, base: Base | None) -> Outlook | None:
    """`written.foresee`, without what lies in the cache already, of this run or another."""
    outlook = written.foresee(config, rows, base)
    if outlook is None:
        return None
    return replace(outlook, cache=max(0, outlook.cache - _cached(config)))


def problems(config: Config, outlook: Outlook, room: Room) -> list[Problem]:
    """What to say of the room there is, with the numbers and the key to change."""
    if room.free < outlook.least:
        what = (
            f"found {config.output_dir}, on a disk with {size(room.free)} free; one checkpoint "
            f"takes {size(outlook.checkpoint)}, the finished files {size(outlook.export)}: make "
            "room, or name a folder on another disk"
        )
        return [Problem("output_dir", what)]
    found = []
    cache = outlook.cache if room.cache_free is None else 0
    needed = outlook.output + cache - room.written
    if room.free < needed:
        what = (
            f"found {config.output_dir}, on a disk with {size(room.free)} free; this run may write "
            f"{size(needed)}: {told(outlook, cache)}. {_mend(outlook, room, cache)}"
        )
        found.append(Problem("output_dir", what, "warning"))
    if room.cache_free is not None and room.cache_free < outlook.cache:
        what = (
            f"found {config.cache_dir}, on a disk with {size(room.cache_free)} free; up to "
            f"{size(outlook.cache)} may be written there: make room, or name another folder"
        )
        found.append(Problem("cache_dir", what, "warning"))
    return found


def told(outlook: Outlook, cache: int) -> str:
    """The parts of what is written, for people."""
    count, ending = outlook.checkpoints, "" if outlook.checkpoints == 1 else "s"
    parts = [f"{count:,} checkpoint{ending} of {size(outlook.checkpoint)}"]
    parts.append(f"finished files {size(outlook.export)}")
    parts += [f"samples and logs about {size(outlook.beside)}"] if outlook.beside else []
    parts += [f"cache up to {size(cache)}"] if cache else []
    return ", ".join(parts)


def _mend(outlook: Outlook, room: Room, cache: int) -> str:
    """The key that makes a run fit."""
    left = room.free + room.written - cache - outlook.export - outlook.beside
    limit = left // outlook.checkpoint - BESIDE_LIMIT
    if 1 <= limit < outlook.checkpoints - BESIDE_LIMIT:
        return f"save_total_limit: {limit} makes it fit; a larger save_steps makes fewer"
    return "Make room, set save_total_limit: 1, or name a folder on another disk"


def _cached(config: Config) -> int:
    kinds = ["tokens-*"] if isinstance(config, TextConfig) else ["latents-*", "prompts-*"]
    folders = [folder for kind in kinds for folder in config.cache_dir.glob(kind)]
    return sum(_bytes_in(folder) for folder in folders)


def _bytes_in(folder: Path) -> int:
    """All files below a folder; one that goes meanwhile counts nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(where) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def room(config: Config) -> Room:
    """The room that a run has now."""
    output, cache = nearest(config.output_dir), nearest(config.cache_dir)
    shared = output.stat().st_dev == cache.stat().st_dev
    return Room(
        free=shutil.disk_usage(output).free,
        written=_bytes_in(config.output_dir / run_files.CHECKPOINTS),
        cache_free=None if shared else shutil.disk_usage(cache).free,
    )


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def size(count: int) -> str:
    """Bytes for people, in powers of ten: `1.7 GB`, `3 MB`."""
    if count >= 995e6:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
