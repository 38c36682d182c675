"""Files of strangers in the readers of other libraries: what those raise is said to the user."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_scripts.errors import UserError, WorkError, out_of_memory, shown, user_error

_PANICS = "pyo3_runtime"  # the module of what a library in Rust raises on a fault of its own
_LARGEST_ID = 1 << 24  # of a token; the largest vocabularies have a quarter of a million
_LONGEST = 300  # characters of a library's own words


@contextmanager
def reading(path: Path, what: str, advice: str = "") -> Iterator[None]:
    """Within this context a library reads `path`, and nothing of ours runs.

    transformers, tokenizers (plain `Exception`, and Rust's panics, which are none) and PEFT raise
    errors of every kind on a file that is not as they expect. Memory that runs out is no fault of
    the file and stays what it is.

    Args:
        path: The file or folder that is read.
        what: It in words, as "the tokenizer".
        advice: The end of the sentence.

    Raises:
        UserError: naming the path, with the first line of what the library says.
    """
    try:
        yield
    except (UserError, WorkError):
        raise
    except BaseException as error:
        is_panic = type(error).__module__ == _PANICS
        if out_of_memory(error) or not (is_panic or isinstance(error, Exception)):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:_LONGEST]
        if isinstance(error, ImportError):
            raise user_error(str(path), f"{what} needs another package: {said}") from error
        reason = f"{type(error).__name__}: {shown(said)}" if said else type(error).__name__
        raise user_error(str(path), f"{what} cannot be read ({reason}){advice}") from error


def refuse_missing(path: Path, names: Collection[str]) -> None:
    """No weight may be one that a library drew by chance because the files do not hold it.

    Raises:
        UserError: naming the first of `names`, the weights that are missing.
    """
    if names:
        what = f"{len(names)} weights of the model are not in its files, {min(names)} among them"
        raise user_error(str(path), f"{what}; fetch the folder whole")


def check_vocabulary(path: Path, tokenizer: Any) -> None:
    """No token may have a number so large that what counts up to it fills the memory.

    Args:
        path: The folder that the tokenizer was read from.
        tokenizer: One of transformers.

    Raises:
        UserError: naming the token.
    """
    with reading(path, "the tokenizer"):
        ids: dict[str, int] = tokenizer.get_vocab()
        token = max(ids, key=lambda name: ids[name])
    if ids[token] > _LARGEST_ID:
        what = f"the tokenizer gives {token[:40]!r} the number {ids[token]:,}; the file is damaged"
        raise user_error(str(path), what)
