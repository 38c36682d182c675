"""Runs that are stopped at random moments in every phase, in every way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.faults import children, phases, stops
from tests.faults.cases import Case
from tests.faults.stops import Stop
from tests.faults.tally import Tally

MOST_STARTS = 12  # of one run: each may be stopped again
SHORTEST = 1e-4  # seconds
SECOND_WAITS = 1.0  # seconds that a second Ctrl-C waits for a checkpoint, every other time


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to, and how long its phases took."""

    case: Case
    folder: Path
    spans: list[tuple[str, int, float]]

    def longest(self, phase: str) -> float:
        """Seconds that a phase took at most."""
        return max((span[2] for span in self.spans if span[0] == phase), default=SHORTEST)


def whole(case: Case, work: Path) -> Whole:
    """Run `case` undisturbed, from the beginning to its full length."""
    folder = work / "whole"
    folder.mkdir(parents=True)
    ended = children.run(lambda: case.start(folder), folder / "said")
    assert ended.code == 0, ended.said
    assert case.variant.shows(case.output(folder)), f"{case.name} does not show what it is for"
    return Whole(case, folder, phases.spans(ended.marks))


def stopped(undisturbed: Whole, work: Path, tally: Tally, chance: random.Random) -> None:
    """One run, stopped once to thrice in each of its lengths, and compared with the whole one."""
    case = undisturbed.case
    folder = work / f"stopped-{tally.runs}"
    folder.mkdir(parents=True)
    tally.runs += 1
    story: list[str] = []
    for length in range(case.lengths):
        if not _to_the_end(undisturbed, folder, length, story, tally, chance):
            return
    tally.compare(case, undisturbed.folder, folder, f"stopped in {', '.join(story) or 'no phase'}")


def _to_the_end(
    undisturbed: Whole,
    folder: Path,
    length: int,
    story: list[str],
    tally: Tally,
    chance: random.Random,
) -> bool:
    """Start a run until it is done; its first starts are stopped. Whether it went as it should."""
    case = undisturbed.case
    stops_left = chance.choice([1, 1, 2, 3])
    for start in range(MOST_STARTS):
        stop = _aim(undisturbed, tally, chance) if start < stops_left else None
        ended = children.run(
            lambda start=start: case.start(folder, start=start, length=length),  # type: ignore[misc]
            folder / f"said-{length}-{start}",
            stop,
        )
        if stop is not None and (ended.killed or ended.sent):
            where = ended.stopped_in()
            tally.hit[where, stop.kind] += 1
            story.append(f"{where} ({stop.kind})")
            tally.noted[f"{stop.kind}, exit code {ended.code}"] += 1
            if len(ended.sent) > 1:
                again = phases.innermost(ended.marks, ended.sent[1])
                tally.noted[f"the second Ctrl-C came in: {again}"] += 1
        if not (ended.code == 0 if stop is None else stop.ends_with(ended.code)):
            tally.fail(case, f"{folder}, {story}, {stop}, code {ended.code}: {ended.said[-2000:]}")
            return False
        if ended.code == 0:
            return True
    tally.fail(case, f"{folder}, {story}: not done after {MOST_STARTS} starts")
    return False


def _aim(undisturbed: Whole, tally: Tally, chance: random.Random) -> Stop:
    """A phase of this run that was hit least, in the way that was least used there."""
    there = sorted({phase for phase, _, _ in undisturbed.spans})
    phase = stops.least(there, {name: tally.rows(name) for name in there}, chance)
    ways = Counter({way: count for (place, way), count in tally.hit.items() if place == phase})
    kind = stops.least(stops.KINDS, ways, chance)
    _, time, seconds = chance.choice([span for span in undisturbed.spans if span[0] == phase])
    then = chance.uniform(0, undisturbed.longest("checkpoint"))
    patience = chance.choice([SECOND_WAITS, chance.uniform(0, 0.05)])
    return Stop(kind, phase, time, chance.uniform(0, seconds), then, patience)
