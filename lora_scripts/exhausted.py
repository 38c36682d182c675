"""Memory that ran out: what used it, and the cheapest key to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lora_scripts import memory
from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.errors import WorkError, out_of_memory
from lora_scripts.memory import Estimate, Room
from lora_scripts.memory.estimate import size
from lora_scripts.memory.room import resident
from lora_scripts.schema import Config

RESUMES = "Nothing that was saved is lost: the same command goes on from the last checkpoint"
FIXED = (
    "batch_size cannot change within a run that has begun: name another output_dir, or "
    "resume=never. "
)


@contextmanager
def answered(config: Config, rows: AnyRows, compute: Compute, foretold: Estimate) -> Iterator[None]:
    """Within this context an error that says that memory ran out becomes an answer.

    `foretold`: before anything was loaded.

    Raises:
        WorkError: with what needs memory, by the model's shapes, and what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise WorkError(_answer(error, config, rows, compute, foretold)) from error


def _answer(
    error: BaseException,
    config: Config,
    rows: AnyRows,
    compute: Compute,
    foretold: Estimate,
) -> str:
    said = (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
    room = memory.free(compute)
    lines = [f"out of memory: {said}", *foretold.table()]
    if room.gpu_total is not None:
        lines.append(f"The card has {size(room.gpu_total)}")
    there = f"{size(room.ram_total)}, {size(room.ram_free)} of it for this run"
    lines.append(f"RAM of {room.ram_limit}: {there}")
    changes = memory.advice(config, rows, compute, _before_it(room, foretold))
    if changes:
        fixed = FIXED if "batch_size" in changes[0].keys else ""
        lines.append(f"The cheapest change: {changes[0].text}. {fixed}{RESUMES}")
    else:
        lines.append(f"Close other programs that hold memory, or take a smaller model. {RESUMES}")
    return "\n  ".join(lines)


def _before_it(room: Room, foretold: Estimate) -> Room:
    """The room as an estimate made now must be judged by: it counts all that is loaded already."""
    loaded = max(0, resident() - foretold.phases[0].ram["imports"])
    return replace(room, ram_total=room.ram_total + loaded, ram_free=room.ram_free + loaded)
