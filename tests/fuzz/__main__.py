"""The command line of the fuzzing: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from tests.fuzz import trial
from tests.fuzz.targets import TARGETS
from tests.fuzz.trial import Tally, Target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=50_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--save", type=Path, default=Path("output/fuzz"), help="for the faults")
    arguments = parser.parse_args()
    chosen = [TARGETS[name] for name in arguments.targets]
    tallies = []
    with tempfile.TemporaryDirectory() as folder:
        for target in chosen:
            count = shared(arguments.inputs, target, chosen)
            work = Path(folder, target.name)
            print(f"{target.name}: {count} inputs", file=sys.stderr, flush=True)
            tallies.append(
                trial.run(target, count, arguments.seed, work, arguments.save, _Progress())
            )
            print(row(tallies[-1]), file=sys.stderr, flush=True)
    print(report(tallies))
    return 1 if any(tally.faults for tally in tallies) else 0


def shared(inputs: int, target: Target, chosen: list[Target]) -> int:
    """How many of the inputs are this target's, rounded up."""
    return -(-inputs * target.share // sum(each.share for each in chosen))


def row(tally: Tally) -> str:
    """A target's line of the table."""
    return (
        f"| {tally.name} | {tally.inputs:,} | {tally.read:,} | {tally.refused:,} "
        f"| {tally.faults.total():,} | {tally.longest:.2f} s |"
    )


def report(tallies: list[Tally]) -> str:
    """The table, and below it what went wrong."""
    lines = ["| target | inputs | read | refused | faults | longest |", "|---|--:|--:|--:|--:|--:|"]
    lines += [row(tally) for tally in tallies]
    total = sum(tally.inputs for tally in tallies)
    faults = sum(tally.faults.total() for tally in tallies)
    seconds = sum(tally.seconds for tally in tallies)
    lines += ["", f"{total:,} inputs, {faults:,} faults, {seconds:.0f} seconds of reading"]
    for tally in tallies:
        lines += [f"{tally.name}: {n}x {fault}" for fault, n in tally.faults.most_common()]
    return "\n".join(lines)


class _Progress:
    """Says where it stands every ten seconds, and each new fault at once."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._faults = 0

    def __call__(self, tally: Tally) -> None:
        new = len(tally.faults) > self._faults
        if not new and time.monotonic() - self._last < 10:
            return
        self._last, self._faults = time.monotonic(), len(tally.faults)
        fault = f": {list(tally.faults)[-1]}" if new else ""
        print(f"  {tally.name} {tally.inputs:,}{fault}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
