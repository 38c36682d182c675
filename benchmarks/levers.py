"""What each lever of speed and memory brings: a micro-step with it and without it, by turns.

    python -m benchmarks.levers [--only NAME …] [--rounds 3] [--folder DIR]

Each measurement is a process of its own (load, encode, attach, then the micro-step that the memory
check takes: the heaviest micro-batch, forward and backward, the second of two timed). Seconds are
medians over the rounds; memory is what the step adds to what lay there before. `--folder` keeps the
models for the next time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import memory_estimate
from benchmarks.children import last_line
from lora_scripts import allocator

MB = 1e6


@dataclass(frozen=True)
class Lever:
    """What pulls a lever within the process, and the cases that it is measured on."""

    pull: Callable[[], object]
    cases: Sequence[str]


LEVERS = {
    "tensors mapped alone": Lever(
        allocator.map_alone,
        ["SD small, 256², batch 4, bf16", "SD small, 512², batch 1, checkpointing",
         "Llama 110M, packed, 4 rows"],
    ),
}  # fmt: skip
HEAD = """\
| lever | configuration | s without | s with | ratio | step's memory without | with | ratio |
|---|---|---|---|---|---|---|---|"""
CHILD = """
import sys
from benchmarks import levers, memory_estimate
if sys.argv[1]:
    levers.LEVERS[sys.argv[1]].pull()
memory_estimate.child("step", sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        print(HEAD)
        for lever in arguments.only:
            for case in LEVERS[lever].cases:
                print(line(folder, lever, case, arguments.rounds), flush=True)


def line(folder: Path, lever: str, case: str, rounds: int) -> str:
    """A row of the table."""
    config = memory_estimate.write_config(folder, case, memory_estimate.base_of(folder, case))
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for pulled in (False, True):
            found[pulled].append(measure(lever, config, pulled=pulled))
    (seconds_off, bytes_off), (seconds_on, bytes_on) = (
        [median(values) for values in zip(*found[pulled], strict=True)] for pulled in (False, True)
    )
    return (
        f"| {lever} | {case} | {seconds_off:.2f} | {seconds_on:.2f} "
        f"| {seconds_on / seconds_off:.2f} | {bytes_off / MB:.0f} MB | {bytes_on / MB:.0f} MB "
        f"| {bytes_on / bytes_off:.2f} |"
    )


def measure(lever: str, config: Path, *, pulled: bool) -> tuple[float, float]:
    """Seconds of a micro-step, and the bytes that it adds."""
    peak = json.loads(last_line(CHILD, lever if pulled else "", str(config)))
    return peak["seconds"], peak["ram"] - peak["ram_before"]


if __name__ == "__main__":
    main()
