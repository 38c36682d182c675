"""The command line of the fault harness: see the package's docstring."""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process may not have run threads before

from tests.faults import cases, children, damage, full_disk, harm, memory_limit, mounts, soak
from tests.faults.soak import Whole
from tests.faults.tally import Tally

# what is done in turn: most often the newest checkpoint alone is damaged
DAMAGES = (damage.newest, damage.newest, damage.removed, damage.newest, damage.all_of_them)


def main() -> int:
    arguments = _arguments()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    if "full" in arguments.what:
        mounts.go_inside()
    wanted = {what: arguments.cases or USUAL[what] for what in arguments.what}
    names = list(dict.fromkeys(name for each in wanted.values() for name in each))
    children.get_ready()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = cases.make(work / "toys", names)
        wholes = [soak.whole(case, work / f"case-{n}") for n, case in enumerate(made)]
        for what, chosen in wanted.items():
            tally = Tally()
            WHATS[what]([w for w in wholes if w.case.name in chosen], tally, arguments)
            print(tally.report(what), flush=True)
            failures += len(tally.failures)
        if failures and arguments.keep:
            shutil.copytree(work, arguments.keep, dirs_exist_ok=True)
    return 1 if failures else 0


def _soak(wholes: Sequence[Whole], tally: Tally, arguments: argparse.Namespace) -> None:
    """Stopped at random moments."""
    chance = random.Random(arguments.seed)
    for number in range(arguments.rounds):
        undisturbed = wholes[number % len(wholes)]
        soak.stopped(undisturbed, undisturbed.folder.parent, tally, chance)
        tally.say(number + 1, arguments.rounds)


def _operations(wholes: Sequence[Whole], tally: Tally, arguments: argparse.Namespace) -> None:
    """Each file operation goes wrong."""
    part, parts = (int(number) for number in arguments.part.split("/"))
    jobs = []
    for undisturbed in wholes:
        operations = harm.count_operations(undisturbed.case, undisturbed.folder.parent)
        found = harm.chosen(
            operations, arguments.modes, rotate=arguments.rotate, step=arguments.every,
            first=arguments.seed % arguments.every,
        )  # fmt: skip
        jobs += [(undisturbed, *job) for job in found]
    jobs = jobs[part - 1 :: parts]
    for done, (undisturbed, number, operation, mode) in enumerate(jobs, start=1):
        harm.harm(undisturbed, number, operation, mode, undisturbed.folder.parent, tally)
        tally.say(done, len(jobs))


def _damage(wholes: Sequence[Whole], tally: Tally, arguments: argparse.Namespace) -> None:
    """Checkpoints, and the folders beside them, are damaged between two starts."""
    chance = random.Random(arguments.seed)
    halves = [damage.half_done(whole, whole.folder.parent) for whole in wholes]
    for number in range(arguments.rounds):
        which = number % len(wholes)
        do = DAMAGES[number // len(wholes) % len(DAMAGES)]
        do(wholes[which], halves[which], number, tally, chance)
        tally.say(number + 1, arguments.rounds)


def _full(wholes: Sequence[Whole], tally: Tally, arguments: argparse.Namespace) -> None:
    """No room, a limit of size, a folder that may not be written."""
    chance = random.Random(arguments.seed)
    for number in range(arguments.rounds):
        undisturbed = wholes[number % len(wholes)]
        way = full_disk.WAYS[number // len(wholes) % len(full_disk.WAYS)]
        full_disk.harm(undisturbed, way, number, tally, chance)
        tally.say(number + 1, arguments.rounds)


def _memory(wholes: Sequence[Whole], tally: Tally, arguments: argparse.Namespace) -> None:
    """Killed by the system for want of memory."""
    chance = random.Random(arguments.seed)
    with memory_limit.group() as group:
        if group is None:
            sys.exit("No control group with a limit of memory can be made here (Linux, root).")
        for number in range(arguments.rounds):
            memory_limit.harm(wholes[number % len(wholes)], group, number, tally, chance)
            tally.say(number + 1, arguments.rounds)


WHATS: dict[str, Callable[[Sequence[Whole], Tally, argparse.Namespace], None]] = {
    "soak": _soak,
    "operations": _operations,
    "damage": _damage,
    "full": _full,
    "memory": _memory,
}
USUAL = {  # the cases of each, where none are named
    "soak": tuple(cases.VARIANTS),
    "operations": ("image", "text"),
    "damage": ("image, three checkpoints", "text, three checkpoints"),
    "full": ("image", "text"),
    "memory": ("image", "text"),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("what", choices=list(WHATS), nargs="+")
    parser.add_argument("--rounds", type=int, default=60, help="how many runs; of operations all")
    parser.add_argument("--cases", nargs="*", choices=list(cases.VARIANTS), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="copy everything here if a run failed")
    parser.add_argument("--every", type=int, default=1, help="operations: only each n-th")
    parser.add_argument("--modes", nargs="*", default=["kill", "tear", "fail"])
    parser.add_argument("--rotate", action="store_true", help="operations: one mode each, in turn")
    parser.add_argument("--part", default="1/1", help="operations: e.g. 1/2, 2/2 side by side")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
