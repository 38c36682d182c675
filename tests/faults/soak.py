"""Kills at random moments in every phase, and operations that go wrong one after another."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import cases, children, phases
from tests.faults.cases import Case
from tests.faults.operations import Mode, Shim

MOST_STARTS = 12  # of one run: each may be killed again


@dataclass
class Tally:
    """What was hit, and every run that did not end as it should."""

    hit: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Whole:
    """A run that nothing happened to, and how long its phases took."""

    case: Case
    folder: Path
    spans: list[tuple[str, int, float]]


def whole(case: Case, work: Path) -> Whole:
    """Run `case` undisturbed."""
    folder = work / "whole"
    marks = folder / "marks"
    folder.mkdir(parents=True)
    ended = children.run(lambda: _noted(case, folder, marks, None), folder / "said")
    assert ended.code == 0, ended.said
    return Whole(case, folder, phases.spans(marks))


def kill(undisturbed: Whole, work: Path, tally: Tally, chance: random.Random) -> None:
    """One run, killed once to thrice, each time in the phase that was hit least so far."""
    case = undisturbed.case
    folder = work / f"killed-{tally.runs}"
    folder.mkdir(parents=True)
    tally.runs += 1
    kills = chance.choice([1, 1, 2, 3])
    story = []
    for start in range(MOST_STARTS):
        aim = _aim(undisturbed, tally, chance) if start < kills else None
        marks = folder / f"marks-{start}"
        ended = children.run(
            lambda aim=aim, marks=marks: _noted(case, folder, marks, aim),  # type: ignore[misc]
            folder / f"said-{start}",
        )
        if ended.killed:
            where = phases.hit(marks)
            tally.hit[where] += 1
            story.append(where)
        elif ended.code != 0:
            tally.failures.append(f"{case.name}, {folder}, {story}: {ended.said[-1500:]}")
            return
        elif aim is None:
            break
    _compare(undisturbed, folder, tally, f"killed in {', '.join(story) or 'no phase'}")


def _aim(undisturbed: Whole, tally: Tally, chance: random.Random) -> tuple[str, int, float] | None:
    """A phase that this run has and that was hit least, one of its times, a moment within it."""
    there = {phase for phase, _, _ in undisturbed.spans}
    least = min(tally.hit[phase] for phase in there)
    phase = chance.choice(sorted(phase for phase in there if tally.hit[phase] == least))
    times = [span for span in undisturbed.spans if span[0] == phase]
    name, time, seconds = chance.choice(times)
    return name, time, chance.uniform(0, seconds)


def count_operations(case: Case, work: Path) -> list[str]:
    """The file operations of an undisturbed run, in order."""
    folder = work / "counted"
    folder.mkdir(parents=True)

    def counted() -> int:
        shim = Shim(folder)
        shim.install()
        code = case.run(folder)
        (work / "operations").write_text("\n".join(shim.done), encoding="utf-8")
        return code

    ended = children.run(counted, work / "said")
    assert ended.code == 0, ended.said
    return (work / "operations").read_text(encoding="utf-8").splitlines()


def harm(
    undisturbed: Whole, operation: str, number: int, mode: Mode, work: Path, tally: Tally
) -> None:
    """One run whose operation `number` goes wrong, then the same command again."""
    case = undisturbed.case
    folder = work / f"{mode}-{number}"
    folder.mkdir(parents=True)
    tally.runs += 1
    name = f"{mode} at operation {number}, {operation}"

    def harmed() -> int:
        Shim(folder, number, mode).install()
        return case.run(folder)

    first = children.run(harmed, work / f"said-{mode}-{number}")
    tally.hit[f"{mode} {operation.split()[0]}"] += 1
    if mode == "fail" and (first.code not in (0, 1) or "Traceback" in first.said):
        tally.failures.append(f"{case.name}, {name}: code {first.code}: {first.said[-1500:]}")
        return
    second = children.run(lambda: case.run(folder), work / f"said-{mode}-{number}-again")
    if second.code != 0:
        tally.failures.append(f"{case.name}, {name}, the second run: {second.said[-1500:]}")
        return
    _compare(undisturbed, folder, tally, name)


def _compare(undisturbed: Whole, folder: Path, tally: Tally, name: str) -> None:
    found = cases.differences(undisturbed.case, undisturbed.folder, folder)
    if found:
        tally.failures.append(f"{undisturbed.case.name}, {name}: differs in {'; '.join(found)}")
    else:
        shutil.rmtree(folder)


def _noted(case: Case, folder: Path, marks: Path, aim: tuple[str, int, float] | None) -> int:
    with phases.noted(phases.Marks(marks, aim)):
        return case.run(folder)


def report(tally: Tally, title: str) -> str:
    """A Markdown table of what was hit, and the failures."""
    lines = [f"{title}: {tally.runs} runs, {sum(tally.hit.values())} faults", ""]
    lines += ["| what | times |", "|---|---|"]
    lines += [f"| {what} | {times} |" for what, times in sorted(tally.hit.items())]
    lines += ["", f"{len(tally.failures)} runs did not end bit-identical."]
    return "\n".join([*lines, *tally.failures])


def every(operations: Sequence[str], step: int, start: int) -> list[tuple[int, str]]:
    """Each `step`-th operation with its number, from 1."""
    return [(i, what) for i, what in enumerate(operations, start=1) if i % step == start % step]
