"""Whether a run fits into memory: said before the model is read, and again after one micro-step."""

from __future__ import annotations

import logging

from lora_scripts import allocator, memory
from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.environment import Finding, State
from lora_scripts.errors import Problem, UserError
from lora_scripts.memory import Estimate, Peak, Room
from lora_scripts.memory.advising import WHERE
from lora_scripts.memory.estimate import size
from lora_scripts.preflight import say
from lora_scripts.schema import Config

logger = logging.getLogger(__name__)


def before(config: Config, rows: AnyRows, compute: Compute) -> Estimate:
    """Foretell the memory of a run from shapes alone.

    Raises:
        UserError: if the device cannot hold it, with the cheapest change that makes it fit.
    """
    estimate = _foretold(config, rows, compute)
    _judge(estimate, config, rows, compute)
    return estimate


def _foretold(config: Config, rows: AnyRows, compute: Compute) -> Estimate:
    """What the run takes; if memory is short, with tensors mapped alone, which takes less."""
    estimate = memory.foretell(config, rows, compute)
    room = memory.free(compute)
    short = estimate.peak_ram > room.ram_free and compute.device.type == "cpu"
    if not short or allocator.maps_alone() or not allocator.map_alone():
        return estimate
    thriftier = memory.foretell(config, rows, compute)
    also = "" if config.gradient_checkpointing else "; gradient_checkpointing: true may cost less"
    logger.warning(
        "Memory is short (about %s, %s free): tensors are mapped alone, which takes about %s, and "
        "a third to two thirds more time%s",
        size(estimate.peak_ram), size(room.ram_free), size(thriftier.peak_ram), also,
    )  # fmt: skip
    return thriftier


def after(foretold: Estimate, peak: Peak, config: Config, rows: AnyRows, compute: Compute) -> None:
    """Say what the run will take, now that one micro-step has been measured.

    Raises:
        UserError: as `before`.
    """
    estimate = memory.corrected(foretold, peak)
    _judge(estimate, config, rows, compute)
    taken = [f"{size(estimate.peak_gpu)} on the card"] if estimate.peak_gpu else []
    taken.append(f"{size(estimate.peak_ram)} RAM")
    logger.info("Memory: about %s (by a micro-step of %s)", " and ".join(taken), estimate.batch)


def findings(config: Config, rows: AnyRows, compute: Compute) -> tuple[list[Finding], list[str]]:
    """What a run will take against what there is: lines of the doctor's table, and the parts.

    `config`: with a number for `batch_size`.

    Raises:
        UserError: if base model or data cannot be taken.
    """
    room = memory.free(compute)
    estimate = _foretold(config, rows, compute)
    places: list[tuple[str, int, int, int]] = []
    if room.gpu_total is not None and room.gpu_free is not None:
        places.append(("GPU memory", estimate.peak_gpu, room.gpu_total, room.gpu_free))
    places.append(("RAM", estimate.peak_ram, room.ram_total, room.ram_free))
    found = []
    for name, needed, total, free in places:
        state: State = "good" if needed <= free else "note" if needed <= total else "bad"
        mend = "" if state == "good" else _advice(config, rows, compute, room)
        there = f"{size(total)}, {size(free)} free"
        found.append(Finding(name, there, f"about {size(needed)}", mend, state))
    return found, estimate.table()


def _judge(estimate: Estimate, config: Config, rows: AnyRows, compute: Compute) -> None:
    room = memory.free(compute)
    problems = memory.refuse_or_warn(estimate, room)
    if not problems:
        return
    severity = problems[0].severity
    told = [*estimate.table(), _advice(config, rows, compute, room)]
    problems += [Problem(WHERE, line, severity=severity) for line in told]
    if any(problem.severity == "error" for problem in problems):
        raise UserError(problems)
    say(problems)


def _advice(config: Config, rows: AnyRows, compute: Compute, room: Room) -> str:
    changes = memory.advice(config, rows, compute, room)
    if not changes:
        return "no change of batch, checkpointing, precision or length makes it fit"
    said = " or ".join(change.text for change in changes)
    return f"the cheapest change that fits: {said}"
