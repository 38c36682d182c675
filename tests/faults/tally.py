"""What was done to how many runs, what came of it, and how it is told."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import compare
from tests.faults.cases import Case


@dataclass
class Tally:
    """What was hit, as (where, how), and every run that did not end as it should.

    `noted`: what else was seen, and how often.
    """

    hit: Counter[tuple[str, str]] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def rows(self, where: str) -> int:
        """How often a place was hit, in any way."""
        return sum(count for (place, _), count in self.hit.items() if place == where)

    def column(self, how: str) -> int:
        """How often something was done, at any place."""
        return sum(count for (_, way), count in self.hit.items() if way == how)

    def fail(self, case: Case, what: str) -> None:
        """Note a run that did not end as it should."""
        self.failures.append(f"{case.name}, {what}")

    def compare(self, case: Case, whole: Path, harmed: Path, what: str) -> None:
        """Note whether a run ended as the undisturbed one; if so its files may go."""
        found = compare.differences(case, whole, harmed)
        if found:
            self.fail(case, f"{what}, in {harmed}: differs in {'; '.join(found)}")
        else:
            shutil.rmtree(case.output(harmed))

    def say(self, done: int, total: int) -> None:
        """How far it is, on the error stream."""
        minutes = (time.monotonic() - self.began) / 60
        left = minutes / max(1, done) * (total - done)
        print(
            f"{done} of {total}, {minutes:.1f} min, about {left:.0f} left: "
            f"{len(self.failures)} failures",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def report(self, title: str) -> str:
        """A Markdown table, a row a place and a column a way, and the failures."""
        wheres = list(dict.fromkeys(sorted(where for where, _ in self.hit)))
        ways = list(dict.fromkeys(sorted(way for _, way in self.hit)))
        lines = [f"{title}: {self.runs} runs, {sum(self.hit.values())} faults", ""]
        lines += [f"| | {' | '.join(ways)} | all |", "|---" * (len(ways) + 2) + "|"]
        for where in wheres:
            counts = [str(self.hit[where, way]) for way in ways]
            lines.append(f"| {where} | {' | '.join(counts)} | {self.rows(where)} |")
        counts = [str(self.column(way)) for way in ways]
        lines.append(f"| all | {' | '.join(counts)} | {sum(self.hit.values())} |")
        lines += ["", *(f"{what}: {count}" for what, count in sorted(self.noted.items()))]
        lines.append(f"{len(self.failures)} runs did not end bit-identical.")
        return "\n".join([*lines, *self.failures])
