"""Encoded pictures and captions on disk: content-addressed, written once, memory-mapped at use.

An entry is one small safetensors file whose name is a hash of everything it depends on (the
picture's bytes, the encoder's weights, the size, the mirror). A changed file or setting therefore
has another name and is encoded again; nothing else is. Entries appear atomically, so a stopped run
leaves only whole ones and the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_scripts import tensor_files
from lora_scripts.errors import user_error
from lora_scripts.files import replace

CACHE_VERSION = 1


class Cache:
    """Entries of one kind ("latents", "prompts") below a folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / f"{kind}-v{CACHE_VERSION}"

    def path(self, key: str) -> Path:
        """Where the entry `key` lies; spread over 256 folders."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no entry yet, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self.path(key).is_file()]

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store an entry; it is there whole or not at all."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        tensor_files.save(
            temporary, {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        replace(temporary, path)

    def read(self, key: str, leaving: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The tensors of an entry but those `leaving`, read through a map that is closed again.

        Raises:
            UserError: if the entry is damaged; deleting it makes the next run encode it again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as entry:
                names = set(entry.keys()) - set(leaving)
                return {name: entry.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError) as error:
            what = f"this cache entry cannot be read ({error}); delete it, it is made again"
            raise user_error(str(path), what) from None


def key_of(*parts: object) -> str:
    """A name for an entry that depends on every part."""
    return hashlib.sha256(repr((CACHE_VERSION, *parts)).encode("utf-8")).hexdigest()


def fill(
    cache: Cache,
    keys: Iterable[str],
    encode: Callable[[str], Mapping[str, torch.Tensor]],
    progress: Callable[[int, int], None],
) -> int:
    """Encode what is missing, one entry at a time, so that an entry depends on itself alone.

    `progress(done, total)` is called after each. Returns how many were made.
    """
    missing = cache.missing(keys)
    for done, key in enumerate(missing, start=1):
        cache.write(key, encode(key))
        progress(done, len(missing))
    return len(missing)
