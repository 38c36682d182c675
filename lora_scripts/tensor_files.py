""".safetensors files: written so that what goes wrong on the disk is told as Python tells it, and
written and read in pieces where they are too large for the memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_scripts.files import AnyPath, remove

_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    path: AnyPath, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file.

    Raises:
        OSError: with its number, if the disk is full or the file may not be written (safetensors
            raises an error of its own kind, with the number in the text).
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        remove(path)  # half of it
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        if os.name == "nt":
            raise OSError(0, str(error), str(path), number) from error
        raise OSError(number, os.strerror(number), str(path)) from error


class Part(NamedTuple):
    """A tensor that lies elsewhere on the disk: its kind and shape, and what writes its bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    copy_to: Callable[[IO[bytes]], None]


def save_parts(path: AnyPath, parts: Mapping[str, Part]) -> None:
    """Write a .safetensors file of tensors that are never in memory whole.

    `parts`: those of the largest numbers first, so that all are aligned.

    Raises:
        OSError: if the disk is full or the file may not be written.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, end = {}, 0
    for name, part in parts.items():
        start, end = end, end + int(np.prod(part.shape)) * part.dtype.itemsize
        header[name] = {
            "dtype": names[part.dtype],
            "shape": part.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for part in parts.values():
                part.copy_to(stream)
    except OSError as error:
        remove(path)  # half of it
        raise OSError(error.errno, error.strerror, str(path)) from None


def mapped(path: AnyPath, names: Collection[str]) -> dict[str, np.ndarray]:
    """Tensors of whole numbers of a file, mapped into memory: only what is looked at is read.

    Raises:
        SafetensorError, OSError: if the file is damaged or cannot be read.
    """
    with safe_open(path, framework="np"):
        pass  # the header is in order, and the file is as long as it says
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found: dict[str, np.ndarray] = {}
    for name in names:
        if name not in header or header[name]["dtype"] not in _DTYPES:
            raise SafetensorError(f"it holds no {name} of whole numbers")
        dtype, shape = _DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        start, end = header[name]["data_offsets"]
        found[name] = (
            np.memmap(path, dtype, "r", 8 + length + start, shape)
            if end > start
            else np.empty(shape, dtype)
        )
    return found
