"""Writing files so that they are there whole or not at all, on every system."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

AnyPath = str | os.PathLike[str]
REPLACE_TRIES = 10
REPLACE_WAIT_SECONDS = 0.05


def replace(source: AnyPath, target: AnyPath) -> None:
    """Rename over `target`. On Windows a virus scanner may hold a file for a moment: try again."""
    for attempt in range(REPLACE_TRIES):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if attempt == REPLACE_TRIES - 1:
                raise
            time.sleep(REPLACE_WAIT_SECONDS * 2**attempt)


def remove(path: AnyPath) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        os.remove(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with \\n line ends, atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    replace(temporary, path)


def sync(path: Path) -> None:
    """Have the operating system put a file's bytes (or a folder's entries) on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: AnyPath) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
