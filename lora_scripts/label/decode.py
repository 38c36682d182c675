"""Pictures from their files, decoded in threads ahead of the captioner, a few batches at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from lora_scripts.data.pixels import load_rgb
from lora_scripts.errors import UserError, user_error
from lora_scripts.label.journal import Stamp, stamp_of

LONGEST_SIDE = 2048  # pixels; no captioner looks closer, and a photograph of 50 MP takes 150 MB


@dataclass(frozen=True)
class Decoded:
    """One picture in RGB, and how its file looked just before it was read."""

    name: str
    image: Image.Image
    stamp: Stamp


def batches(
    folder: Path, names: Sequence[str], *, size: int, workers: int, unreadable: dict[str, str]
) -> Iterator[list[Decoded]]:
    """The pictures in the order of their names, `size` at a time; only the last batch is smaller.

    While the caller works on a batch, at most two more and one picture for each worker are
    decoded, so memory does not grow with the folder.

    Args:
        folder: What the names are relative to.
        names: Names of image files.
        size: Pictures in a batch.
        workers: Threads that decode.
        unreadable: Takes the name of each picture that cannot be decoded, and why.
    """
    pool = ThreadPoolExecutor(workers)
    left = iter(names)
    ahead: deque[tuple[str, Future[Decoded]]] = deque()
    batch: list[Decoded] = []
    try:
        while True:
            for name in islice(left, 2 * size + workers - len(ahead)):
                ahead.append((name, pool.submit(_decode, folder, name)))
            if not ahead:
                break
            name, future = ahead.popleft()
            try:
                batch.append(future.result())
            except UserError as error:
                unreadable[name] = error.problems[0].what
            del future
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def shrunk(image: Image.Image, longest_side: int) -> Image.Image:
    """The picture, or a mean over whole blocks of its pixels, at most `longest_side` long."""
    factor = -(-max(image.size) // longest_side)
    return image if factor == 1 else image.reduce(factor)


def _decode(folder: Path, name: str) -> Decoded:
    path = folder / name
    try:
        stamp = stamp_of(path)
    except OSError as error:
        raise user_error(str(path), f"the file cannot be read ({error.strerror})") from None
    return Decoded(name, shrunk(load_rgb(path), LONGEST_SIDE), stamp)
