"""What goes wrong because of what the user gave us, said so that the user can mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One thing found: where it stands, and what is wrong, what was expected, what to do.

    `where` names a place that can be opened: `my.yaml line 7`, `metadata.csv line 45`, `img01.png`.
    """

    where: str
    what: str
    severity: Literal["error", "warning"] = "error"

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


class WorkError(RuntimeError):
    """The work itself failed although the input was right (exit code 1)."""

    exit_code = 1


def user_error(where: str, what: str) -> UserError:
    """A `UserError` with a single problem."""
    return UserError([Problem(where, what)])
