"""What goes wrong because of what the user gave us, said so that the user can mend it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FEW = 10  # warnings of one kind that are said; the rest is counted
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc",
             "alloc_failed")  # fmt: skip
# What a terminal would act on rather than show: control characters but line end and tab, marks that
# turn the direction of writing, halves of surrogate pairs
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment variables
_SHORTEST_TOKEN = 8
_LEFT_OUT = "***"
# A token of the Hugging Face Hub; name and password in an address
_CREDENTIALS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
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
        return shown(f"{self.where}: {self.what}")


def shown(text: str) -> str:
    """A text as a terminal, a log or a file may be given it.

    What a terminal would act on is escaped; tokens of the hub, and names and passwords in
    addresses, are left out.
    """
    for name in _TOKENS:
        if len(token := os.environ.get(name, "")) >= _SHORTEST_TOKEN:
            text = text.replace(token, _LEFT_OUT)
    text = _CREDENTIALS.sub(_LEFT_OUT, text)
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


EXIT_INTERRUPTED = 75  # stopped; the same command goes on


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

    def __str__(self) -> str:
        return shown(super().__str__())


def user_error(where: str, what: str) -> UserError:
    """A `UserError` with a single problem."""
    return UserError([Problem(where, what)])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: the card's, PyTorch's on the CPU, or Python's."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in NO_MEMORY)


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
