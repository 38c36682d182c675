"""Writing .safetensors files so that what goes wrong on the disk is told as Python tells it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file.

    Raises:
        OSError: with its number, if the disk is full or the file may not be written (safetensors
            raises an error of its own kind, with the number in the text).
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        path.unlink(missing_ok=True)  # half of it
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        if os.name == "nt":
            raise OSError(0, str(error), str(path), number) from error
        raise OSError(number, os.strerror(number), str(path)) from error
