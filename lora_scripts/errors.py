"""What goes wrong because of what the user gave us, said so that the user can mend it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FEW = 10  # warnings of one kind that are said; the rest is counted
UNNAMED = "data"  # the kind of what is found in data and has no name of its own


@dataclass(frozen=True)
class Problem:
    """One thing found: where it stands, and what is wrong, what was expected, what to do.

    Attributes:
        where: A place that can be opened: `my.yaml line 7`, `metadata.csv line 45`, `img01.png`.
        what: The text that the user is told.
        severity: An error stops a run, a warning does so with `strict_data`; a note only says how
            the data are understood.
        kind: A name for what is found in data, as docs/data_checks.md lists them; "" for the rest.
    """

    where: str
    what: str
    severity: Literal["error", "warning", "note"] = "error"
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class UserError(ValueError):
    """The user's input cannot be worked with. Carries every problem found, not only the first.

    The command line prints the problems without a traceback and exits with `exit_code` 2.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(UserError):
    """The config is right, the data are not (exit code 1)."""

    exit_code = 1


class WorkError(RuntimeError):
    """The work itself failed although the input was right (exit code 1)."""

    exit_code = 1


def user_error(where: str, what: str) -> UserError:
    """A `UserError` with a single problem."""
    return UserError([Problem(where, what)])


def few(problems: Sequence[Problem]) -> Iterator[tuple[Problem, str]]:
    """Problems and what is said of each; of warnings of one kind the first few and their number."""
    kinds = Counter(problem.kind for problem in problems if problem.severity != "error")
    seen: Counter[str] = Counter()
    for problem in problems:
        seen[problem.kind] += problem.severity != "error"
        alone = problem.severity == "error" or problem.kind in ("", UNNAMED)
        if alone or seen[problem.kind] <= FEW:
            yield problem, str(problem)
        elif seen[problem.kind] == kinds[problem.kind]:
            more = kinds[problem.kind] - FEW
            yield problem, f"… and {more:,} more like these; lora-scripts check --json lists all"
