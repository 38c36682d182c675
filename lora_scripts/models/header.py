"""The header of a .safetensors file: names, dtypes, shapes and remarks, without the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lora_scripts.errors import UserError, user_error

_MAX_HEADER_BYTES = 1 << 25  # real ones have less than a tenth of it; the library takes 100 MB
_FIRST_BYTES = (
    (b"PK\x03\x04", "it is a zip archive, as PyTorch's pickles are"),
    (b"\x80", "it is a Python pickle"),
    (b"GGUF", "it is a GGUF file"),
    (b"<", "it is a web page, as a download without the right to it leaves"),
    (b"version ", "it is a Git LFS pointer, to be replaced by the file itself (`git lfs pull`)"),
)
_NEEDED = "A whole .safetensors file is needed"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a .safetensors header describes it: `dtype` as there ("F16", "F32" …)."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a .safetensors file holds, in the order of its header.

    Raises:
        UserError: The file is empty, is no safetensors file, is damaged or was cut short.
    """
    return _read(path)[0]


def check_headers(paths: Sequence[Path]) -> None:
    """See that files are whole .safetensors files.

    Raises:
        UserError: naming every one that is not.
    """
    problems = []
    for path in paths:
        try:
            read_header(path)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def read_metadata(path: Path) -> dict[str, str]:
    """The remarks in the header of a .safetensors file; {} where there are none.

    Raises:
        UserError: as `read_header` does.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 10 or length > min(_MAX_HEADER_BYTES, size - 8):
            _refuse(path, first, size, length)
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        remarks = {str(key): str(value) for key, value in metadata.items()}
        tensors = {
            name: TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        _refuse(path, first, size, length)
    described = 8 + length + end
    if described != size:
        raise user_error(
            str(path),
            f"the file is damaged: its header describes {described:,} bytes, there are {size:,}. "
            "A download that was cut short looks like this: fetch it again",
        )
    _check_by_library(path)
    return tensors, remarks


def _check_by_library(path: Path) -> None:
    """Types, shapes and places: the library refuses what overlaps, leaves gaps or does not fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise user_error(str(path), f"the file is damaged ({error}); fetch it again") from None


def _refuse(path: Path, first: bytes, size: int, length: int) -> NoReturn:
    if size == 0:
        raise user_error(str(path), f"the file is empty. {_NEEDED}")
    for magic, meaning in _FIRST_BYTES:
        if first.startswith(magic):
            raise user_error(str(path), f"this is no safetensors file: {meaning}. {_NEEDED}")
    raise user_error(
        str(path),
        "this is no safetensors file, or a damaged one: its first 8 bytes promise a header of "
        f"{length:,} bytes, the file has {size:,}. {_NEEDED}",
    )
