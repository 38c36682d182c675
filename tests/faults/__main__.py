"""The command line of the fault harness: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process may not have run threads before

from tests.faults import cases, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("what", choices=["soak", "operations"])
    parser.add_argument("--rounds", type=int, default=60, help="soak: runs that are killed")
    parser.add_argument("--cases", nargs="*", default=list(cases.VARIANTS))
    parser.add_argument("--every", type=int, default=1, help="operations: only each n-th")
    parser.add_argument("--modes", nargs="*", default=["kill", "tear", "fail"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = cases.make(work / "toys", arguments.cases)
        wholes = [soak.whole(case, work / f"case-{n}") for n, case in enumerate(made)]
        tally = soak.Tally()
        if arguments.what == "soak":
            chance = random.Random(arguments.seed)
            for number in range(arguments.rounds):
                undisturbed = wholes[number % len(wholes)]
                soak.kill(undisturbed, undisturbed.folder.parent, tally, chance)
                _say(tally, number + 1, arguments.rounds)
        else:
            for undisturbed in wholes:
                place = undisturbed.folder.parent
                operations = soak.count_operations(undisturbed.case, place)
                numbers = soak.every(operations, arguments.every, arguments.seed)
                for done, (number, what) in enumerate(numbers, start=1):
                    for mode in arguments.modes:
                        soak.harm(undisturbed, what, number, mode, place, tally)
                    _say(tally, done, len(numbers))
        print(soak.report(tally, arguments.what))
    return 1 if tally.failures else 0


def _say(tally: soak.Tally, done: int, total: int) -> None:
    print(f"{done} of {total}: {len(tally.failures)} failures", file=sys.stderr, flush=True)
    for failure in tally.failures[-1:]:
        print(failure[:600], file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
