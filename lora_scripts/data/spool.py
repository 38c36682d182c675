"""Bytes, numbers and values that lie on disk while a program runs: there may be more than fits into
memory.

The files have no name and are gone with the process, however it ends. What is smaller than
`IN_MEMORY` never becomes a file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

IN_MEMORY = 1 << 16  # bytes
_BLOCK = 1 << 20  # bytes read or written at once
_FEW = 1 << 15  # the same of numbers that become Python's, which take four times as much
Item = TypeVar("Item")


class Spool:
    """Bytes, written one behind the other and read at any place, also by several threads."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: it, or the nearest above it that is there, holds the file; None: the system's
        folder for such files, as where the disk of `folder` may not be written to."""
        self._folder = _writable(folder)
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115 read as long as it is
            IN_MEMORY, dir=str(self._folder)
        )
        self._at_end = True
        self._lock = threading.Lock()  # the file has one position
        self.size = 0  # bytes

    def append(self, data: bytes) -> None:
        """Put bytes at the end.

        Raises:
            OSError: naming the folder, if the disk is full.
        """
        with self._lock:
            try:
                if not self._at_end:
                    self._file.seek(self.size)
                    self._at_end = True
                self._file.write(data)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._folder)) from None
            self.size += len(data)

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        with self._lock:
            self._at_end = False
            self._file.seek(start)
            return self._file.read(end - start)

    def copy_to(self, stream: IO[bytes]) -> None:
        """Write all bytes to a stream."""
        with self._lock:
            self._at_end = False
            self._file.seek(0)
            shutil.copyfileobj(self._file, stream, _BLOCK)


class Column:
    """Numbers (or records of numbers) of one kind, appended one behind the other."""

    def __init__(self, dtype: npt.DTypeLike, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.spool = Spool(folder)

    def __len__(self) -> int:
        return self.spool.size // self.dtype.itemsize

    def append(self, values: npt.ArrayLike) -> None:
        """Put one or several at the end."""
        self.spool.append(np.asarray(values, dtype=self.dtype).tobytes())

    def read(self, start: int, end: int) -> np.ndarray:
        """Those from `start` on and before `end`; they may not be changed."""
        size = self.dtype.itemsize
        return np.frombuffer(self.spool.read(start * size, end * size), dtype=self.dtype)

    def blocks(self, size: int | None = None) -> Iterator[np.ndarray]:
        """All of them, some at a time: so many bytes."""
        step = (size or _BLOCK) // self.dtype.itemsize
        for start in range(0, len(self), step):
            yield self.read(start, min(start + step, len(self)))


class Values(Sequence[Any]):
    """Values that JSON knows (tuples come back as lists), appended one behind the other.

    Attributes:
        characters: Of all of them, as JSON.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._ends = Column("<u8", folder)
        self._spool = Spool(folder)
        self.characters = 0

    def append(self, value: object) -> None:
        """Put one at the end.

        Raises:
            TypeError: if JSON does not know it.
        """
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self._spool.append(text.encode("utf-8", "surrogatepass"))
        self._ends.append(self._spool.size)
        self.characters += len(text)

    def longer_than(self, size: int) -> Iterator[int]:
        """The numbers of those of more bytes."""
        start = number = 0
        for ends in self._ends.blocks():
            sizes = np.diff(ends.astype(np.int64), prepend=start)
            yield from (number + np.flatnonzero(sizes > size)).tolist()
            start, number = int(ends[-1]), number + len(ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        place = range(len(self))[index]
        ends = self._ends.read(max(0, place - 1), place + 1).tolist()
        return self._read(ends[0] if place else 0, ends[-1])

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for ends in self._ends.blocks(_FEW):
            for end in ends.tolist():
                yield self._read(start, end)
                start = end

    def _read(self, start: int, end: int) -> Any:
        return json.loads(self._spool.read(start, end).decode("utf-8", "surrogatepass"))


class Stored(Sequence[Item], ABC, Generic[Item]):
    """Things that lie on disk as `Values` and are made again when they are asked for."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where to put files, as `Spool` takes it."""
        self._values = Values(folder)

    @abstractmethod
    def _made(self, value: Any) -> Item:
        """The thing that a value stands for."""

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._made(self._values[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._made, self._values)

    def __eq__(self, other: object) -> bool:
        """As lists are equal."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def table(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path | None = None) -> np.ndarray:
    """Zeros to be written over, mapped from a file; what lies in them is no memory of the process.

    Raises:
        OSError: naming the folder, if the disk is full: later, in a map, that would end the
            process.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    folder = _writable(folder)
    file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed with its map
    try:
        for start in range(0, size, _BLOCK):
            file.write(bytes(min(_BLOCK, size - start)))
        file.flush()
    except OSError as error:
        file.close()
        raise OSError(error.errno, error.strerror, str(folder)) from None
    return np.memmap(file, dtype, "r+", shape=shape)


def _writable(folder: Path | None) -> Path:
    """The nearest folder that is there, or the system's own if nothing may be written there."""
    if folder is not None:
        found = folder.expanduser().absolute()
        nearest = next((path for path in (found, *found.parents) if path.is_dir()), None)
        if nearest is not None and os.access(nearest, os.W_OK):
            return nearest
    return Path(tempfile.gettempdir())
