"""Encoded pictures and captions on disk: content-addressed, written once, memory-mapped at use.

An entry is one small safetensors file whose name is a hash of everything it depends on (the
picture's bytes, the encoder's weights, the size, the mirror). A changed file or setting therefore
has another name and is encoded again; nothing else is. Entries appear atomically, so a stopped run
leaves only whole ones and the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lora_scripts import tensor_files
from lora_scripts.errors import UserError, user_error
from lora_scripts.files import replace
from lora_scripts.tensor_files import Part

CACHE_VERSION = 1

Job = tuple[str, Callable[[], Mapping[str, torch.Tensor]]]  # a key, and what makes its entry


class Cache:
    """Entries of one kind ("latents", "prompts") below a folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / f"{kind}-v{CACHE_VERSION}"

    def path(self, key: str) -> str:
        """Where the entry `key` lies; spread over 256 folders."""
        return os.path.join(self.folder, key[:2], f"{key}.safetensors")

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no entry yet, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not os.path.isfile(self.path(key))]

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store an entry; it is there whole or not at all."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._put(key, lambda path: tensor_files.save(path, whole))

    def write_parts(self, key: str, parts: Mapping[str, Part]) -> None:
        """`write` of what is not in memory."""
        self._put(key, lambda path: tensor_files.save_parts(path, parts))

    def _put(self, key: str, save: Callable[[str], None]) -> None:
        path = self.path(key)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{os.path.splitext(path)[0]}.{os.getpid()}.tmp"
        save(temporary)
        replace(temporary, path)

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry, read through a map that is closed again.

        Raises:
            UserError: if the entry is damaged; deleting it makes the next run encode it again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as entry:
                names = list(entry.keys())
                return {name: entry.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None

    def mapped(self, key: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """Tensors of an entry, mapped into memory for as long as they are used.

        Raises:
            UserError: as `read`.
        """
        path = self.path(key)
        try:
            return tensor_files.mapped(path, names)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    what = f"this cache entry cannot be read ({error}); delete it, it is made again"
    return user_error(path, what)


def key_of(*parts: object) -> str:
    """A name for an entry that depends on every part.

    An iterator counts as the list of what it gives; that list is never made.
    """
    digest = hashlib.sha256()
    separator = "("
    for part in (CACHE_VERSION, *parts):
        digest.update(separator.encode())
        pieces = _list_in_pieces(part) if isinstance(part, Iterator) else [repr(part)]
        for piece in pieces:
            digest.update(piece.encode("utf-8"))
        separator = ", "
    digest.update(b")")
    return digest.hexdigest()


def _list_in_pieces(items: Iterator[object]) -> Iterator[str]:
    """The `repr` of the list of these items, of some of them at a time."""
    yield "["
    separator = ""
    while some := list(itertools.islice(items, 1000)):
        yield separator + repr(some)[1:-1]
        separator = ", "
    yield "]"


def fill(
    cache: Cache,
    jobs: Callable[[], Iterator[Job]],
    progress: Callable[[int, int], None],
) -> int:
    """Encode what is missing, one entry at a time, so that an entry depends on itself alone.

    `jobs` gives all of them, each time it is called; a key may come several times.
    `progress(done, total)` is called after each. Returns how many were made.
    """
    found = array("Q")
    for key, _ in jobs():
        if not os.path.isfile(cache.path(key)):
            found.append(int(key[:16], 16))
    keys = np.frombuffer(found, np.uint64)
    keys.sort()  # in place: there may be many
    missing = min(len(keys), 1 + int(np.count_nonzero(keys[1:] != keys[:-1])))
    done = 0
    for key, encode in jobs() if missing else ():
        if done < missing and not os.path.isfile(cache.path(key)):
            cache.write(key, encode())
            done += 1
            progress(done, missing)
    return done
