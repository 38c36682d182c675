"""Runs in which the n-th file operation goes wrong, for every n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults import children
from tests.faults.cases import Case
from tests.faults.operations import Mode, Shim
from tests.faults.soak import Whole
from tests.faults.tally import Tally


def count_operations(case: Case, work: Path) -> list[str]:
    """The file operations of an undisturbed run, in order."""
    folder = work / "counted"
    folder.mkdir(parents=True)

    def counted() -> int:
        shim = Shim(folder)
        shim.install()
        code = case.start(folder)
        (work / "operations").write_text("\n".join(shim.done), encoding="utf-8")
        return code

    ended = children.run(counted, work / "said")
    assert ended.code == 0, ended.said
    return (work / "operations").read_text(encoding="utf-8").splitlines()


def chosen(
    operations: Sequence[str], modes: Sequence[Mode], *, rotate: bool, step: int, first: int
) -> Iterator[tuple[int, str, Mode]]:
    """What is done: (number from 1, operation, mode) of each `step`-th operation from `first` on.

    All modes at each, or with `rotate` one of them, in turn.
    """
    numbered = list(enumerate(operations, start=1))[first::step]
    for turn, (number, operation) in enumerate(numbered):
        for mode in [modes[turn % len(modes)]] if rotate else modes:
            yield number, operation, mode


def harm(
    undisturbed: Whole, number: int, operation: str, mode: Mode, work: Path, tally: Tally
) -> None:
    """One run whose operation `number` goes wrong, then the same command again."""
    case = undisturbed.case
    folder = work / f"{mode}-{number}"
    folder.mkdir(parents=True)
    tally.runs += 1
    name = f"{mode} at operation {number}, {operation}"

    def harmed() -> int:
        Shim(folder, number, mode).install()
        return case.start(folder)

    first = children.run(harmed, work / f"said-{mode}-{number}")
    tally.hit[operation.split()[0], mode] += 1
    if mode == "fail" and (first.code not in (0, 1) or "Traceback" in first.said):
        tally.fail(case, f"{name}: code {first.code}: {first.said[-1500:]}")
        return
    again = children.run(lambda: case.start(folder), work / f"said-{mode}-{number}-again")
    if again.code != 0:
        tally.fail(case, f"{name}, the second run: {again.said[-1500:]}")
        return
    tally.compare(case, undisturbed.folder, folder, name)
