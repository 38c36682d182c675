"""Whether a run fits, and the cheapest change that makes it fit, in the config's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_scripts.data.rows import AnyRows
from lora_scripts.device import Compute
from lora_scripts.errors import Problem
from lora_scripts.memory.estimate import Estimate, Place, size
from lora_scripts.memory.foretelling import foretell
from lora_scripts.memory.room import Room
from lora_scripts.schema import Config, TextConfig

WHERE = "memory"  # the place of a problem that no single line of a config has made
FILLED = 0.9  # of what is free, by the batch that is chosen
SHORTEST = 128  # tokens of a row, below which there is little to learn
SMALLEST = 256  # pixels of a side, likewise
FEW = 2  # changes that are offered
LABELS: Mapping[Place, str] = {"gpu": "GPU memory", "ram": "RAM"}
COSTS = {
    "batch_size": "the same steps, a little slower",
    "gradient_checkpointing": "about 1.4 times the time",
    "mixed_precision": "the frozen model in 16 bits",
    "quantization": "the frozen model in 4 bits",
    "distributed": "each process holds a share of the frozen model",
    "offload": "the frozen model waits in RAM, each step brings it to the card twice",
    "max_seq_length": "longer rows are cut",
    "resolution": "less detail is learned",
}
Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """Keys to set, what the run takes with them, and all of it as a sentence."""

    keys: Mapping[str, Any]
    estimate: Estimate
    text: str


def refuse_or_warn(estimate: Estimate, room: Room) -> list[Problem]:
    """An error where the device cannot hold the run, a warning where it cannot just now."""
    problems = []
    for place, total, free in _places(room):
        phase = estimate.largest(place)
        needed = f"the run needs about {size(phase.total(place))} of {LABELS[place]} ({phase.name})"
        whose = "the card" if place == "gpu" else room.ram_limit
        if phase.total(place) > total:
            problems.append(Problem(WHERE, f"{needed}; {whose} has {size(total)}"))
        elif phase.total(place) > free:
            what = f"{needed}; of {whose}'s {size(total)} only {size(free)} are free now"
            problems.append(Problem(WHERE, what, severity="warning"))
    return problems


def advice(config: Config, rows: AnyRows, compute: Compute, room: Room) -> list[Change]:
    """Changes that make a run fit into what is free, the cheapest first; [] if none does.

    At most two, of different kinds: they are found by estimating anew, which takes seconds each.
    """
    fitting: list[Change] = []
    for ladder in ladders(config, compute):
        if len(fitting) < FEW and _fitting(ladder[-1], config, rows, compute, room):
            tried = (_fitting(keys, config, rows, compute, room) for keys in ladder)
            fitting += [next(change for change in tried if change is not None)]
    return fitting


def ladders(config: Config, compute: Compute) -> list[list[Keys]]:
    """Changes of each kind from the mildest to the strongest; the kinds from the cheapest on.

    A smaller batch, accumulated to the same step, changes nothing that is learned; computing
    activations twice costs time; coarser weights and shorter samples change what is learned.
    """
    effective = config.micro_batch * config.gradient_accumulation_steps
    smaller = [
        _batch(n, effective) for n in range(config.micro_batch - 1, 0, -1) if effective % n == 0
    ]
    thrifty: list[Keys] = (
        [] if config.gradient_checkpointing else [{"gradient_checkpointing": True}]
    )
    most = [{**keys, **batch} for keys in thrifty or [{}] for batch in smaller] or thrifty
    strongest: Keys = most[-1] if most else {}
    found = [smaller, [*thrifty, *most] if thrifty else []]
    found.append(
        [{**keys, **more} for keys in _sharded(config, compute) for more in ({}, *most[-1:])]
    )
    found.append(
        [{**keys, **more} for keys in _offloaded(config, compute) for more in ({}, *most[-1:])]
    )
    coarse = _coarser(config, compute)
    found += [[keys, *({**keys, **more} for more in (*thrifty, *most[-1:]))] for keys in coarse]
    lowest = {**(coarse[-1] if coarse else {}), **strongest}
    found.append([{**lowest, **keys} for keys in _shorter(config)])
    return [ladder for ladder in found if ladder]


def largest_batch(
    config: Config,
    rows: AnyRows,
    compute: Compute,
    effective: int,
    room: Room,
) -> int:
    """The largest divisor of `effective` that fits, as batch_size, into 90% of what is free; or 1.

    `effective`: samples of an optimizer step; accumulation is then `effective` / the result.
    """
    sizes = [n for n in range(1, effective + 1) if effective % n == 0]
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        keys = _batch(sizes[middle], effective)
        found = foretell(config.model_copy(update=keys), rows, compute)
        low, high = (middle, high) if fits(found, room, FILLED) else (low, middle - 1)
    return sizes[low]


def fits(estimate: Estimate, room: Room, share: float = 1.0) -> bool:
    """Whether a run fits into a share of what is free."""
    return all(
        estimate.largest(place).total(place) <= share * free for place, _, free in _places(room)
    )


# --- private --------------------------------------------------------------------------------------


def _fitting(
    keys: Keys, config: Config, rows: AnyRows, compute: Compute, room: Room
) -> Change | None:
    """A change if the run fits with it."""
    if "mixed_precision" in keys:
        compute = replace(compute, precision=keys["mixed_precision"])
    if "distributed" in keys:
        compute = replace(compute, sharded=True)
    if "offload" in keys:
        compute = replace(compute, sharded=True, offloaded=True)
    found = foretell(config.model_copy(update=dict(keys)), rows, compute)
    if not fits(found, room):
        return None
    place: Place = "gpu" if found.peak_gpu else "ram"
    said = ", ".join(f"{name}: {_yaml(value)}" for name, value in keys.items())
    costs = "; ".join(COSTS[name] for name in keys if name in COSTS)
    needed = f"about {size(found.largest(place).total(place))} of {LABELS[place]}"
    return Change(keys, found, f"{said} ({needed}; {costs})")


def _batch(number: int, effective: int) -> dict[str, int]:
    return {"batch_size": number, "gradient_accumulation_steps": effective // number}


def _sharded(config: Config, compute: Compute) -> list[Keys]:
    """The frozen weights spread over the processes, if there are several."""
    quantized = isinstance(config, TextConfig) and config.quantization is not None
    may = compute.processes.size > 1 and not compute.sharded and not quantized
    return [{"distributed": "fsdp"}] if may else []


def _offloaded(config: Config, compute: Compute) -> list[Keys]:
    """The frozen weights in RAM, beside a card."""
    quantized = isinstance(config, TextConfig) and config.quantization is not None
    share = compute.processes.size == 1 or compute.sharded
    may = compute.device.type == "cuda" and share and not compute.offloaded and not quantized
    return [{"offload": True}] if may else []


def _coarser(config: Config, compute: Compute) -> list[Keys]:
    """The frozen weights in fewer bits."""
    found: list[Keys] = []
    if compute.precision == "no":
        found.append({"mixed_precision": "bf16"})
    on_card = compute.device.type == "cuda"
    if (
        isinstance(config, TextConfig)
        and config.quantization is None
        and on_card
        and not compute.sharded
    ):
        found.append({"quantization": "nf4"})
    return found


def _shorter(config: Config) -> list[Keys]:
    """Less of each sample."""
    if isinstance(config, TextConfig):
        lengths = (config.max_seq_length // 2**n for n in range(1, 8))
        return [{"max_seq_length": length} for length in lengths if length >= SHORTEST]
    step = config.bucket_step
    sides = (int(config.resolution * share) // step * step for share in (0.75, 0.5))
    return [{"resolution": side} for side in sides if side >= max(step, SMALLEST)]


def _places(room: Room) -> Iterator[tuple[Place, int, int]]:
    """Each place with what it has and what is free of it."""
    if room.gpu_total is not None and room.gpu_free is not None:
        yield "gpu", room.gpu_total, room.gpu_free
    yield "ram", room.ram_total, room.ram_free


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
