"""What glibc's heap grows to while tensors come and go.

PyTorch asks for memory aligned to 64 bytes. glibc's `memalign` takes a block that is larger by
the alignment and cuts off what stands before and behind. Small objects soon live in these pieces,
and a hole that a tensor left is then too small for the next tensor of the same size. The heap
grows to more than was ever alive at once: 1.4 to 3.2 times in the steps measured (docs/memory.md).

Here the same births and deaths are replayed: best fit, neighbours joined. Most pieces stay taken
until the end of the step, as autograd's nodes live until then; the others as long as the tensor
that is born next. With gradient checkpointing more of these objects die with the part of the pass
that is computed again. Blocks of 32 MiB and more are mapped alone and given back at once; the rest
of what is freed stays with the process.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_scripts.memory.tracker import Event

MAPPED = 32 * 2**20  # bytes from which glibc maps a block alone (DEFAULT_MMAP_THRESHOLD_MAX)
SMALL = 1024  # bytes below which blocks come from bins of their own
SWEPT_BETWEEN = 0.3  # of the pieces, freed with the graph of a micro-batch within a step
PIECES = 96  # alignment, and the smallest block: what `memalign` asks for beyond the size
STAYING, STAYING_THRIFTY = 0.96, 0.7  # of the pieces; fitted to real steps (docs/memory.md)
REPLAYS = 5  # with other pieces taken, of which the middle one counts
STEPS, MOST_BATCHES = 2, 2  # that are replayed; later ones find the heap as these leave it


@dataclass(frozen=True)
class Growth:
    """By how many bytes the resident set grows.

    Attributes:
        total: At most.
        kept: What stays with the process when everything has died.
        mapped: The most that was mapped alone at once.
    """

    total: int
    kept: int
    mapped: int


Name = tuple[int, int]  # of a storage: its micro-batch and its number in it


class Heap:
    """Blocks in a row, from address 0 up to `top`.

    `staying`: the share of pieces that stay taken to the end of a step; `seed`: which.
    """

    def __init__(self, seed: int, staying: float) -> None:
        self._random = random.Random(seed)
        self._staying = staying
        self.top = 0  # the highest address ever used
        self.peak = self.mapped = self.most_mapped = 0
        self._holes: list[tuple[int, int]] = []  # (bytes, address), sorted
        self._by_start: dict[int, int] = {}  # address -> bytes
        self._by_end: dict[int, int] = {}  # end -> address
        self._blocks: dict[Name, tuple[int, int]] = {}  # (address, bytes)
        self._alone: dict[Name, int] = {}
        self._pieces: list[int] = []  # addresses of those that stay taken
        self._waiting: list[int] = []  # for the next tensor
        self._attached: dict[Name, list[int]] = {}  # that go with a tensor

    def take(self, name: Name, size: int) -> None:
        """A tensor is born."""
        if self._waiting:
            self._attached[name], self._waiting = self._waiting, []
        if size >= MAPPED:
            self._alone[name] = size
            self.mapped += size
            self.most_mapped = max(self.most_mapped, self.mapped)
        elif size >= SMALL:
            needed = -(-size // 16) * 16 + PIECES
            self._blocks[name] = (self._place(needed), needed)
        self.peak = max(self.peak, self.top + self.mapped)

    def give(self, name: Name) -> None:
        """It dies, and leaves a hole with a piece beside it."""
        if name in self._alone:
            self.mapped -= self._alone.pop(name)
        elif name in self._blocks:
            address, size = self._blocks.pop(name)
            stays = self._random.random() < self._staying
            (self._pieces if stays else self._waiting).append(address)
            self._join(address + PIECES, size - PIECES)
        for address in self._attached.pop(name, ()):
            self._join(address, PIECES)

    def sweep(self, share: float = 1.0) -> None:
        """Small objects in the pieces die, too: all of them, or a share."""
        kept = []
        for address in self._pieces:
            if self._random.random() < share:
                self._join(address, PIECES)
            else:
                kept.append(address)
        for address in self._waiting:
            self._join(address, PIECES)
        self._pieces, self._waiting = kept, []

    def _place(self, needed: int) -> int:
        index = bisect.bisect_left(self._holes, (needed, -1))
        if index == len(self._holes):
            self.top += needed
            return self.top - needed
        size, address = self._holes[index]
        self._remove(size, address)
        self._join(address + needed, size - needed)
        return address

    def _join(self, address: int, size: int) -> None:
        """A hole, made one with those beside it."""
        if not size:
            return
        if address in self._by_end:
            before = self._by_end[address]
            self._remove(address - before, before)
            address, size = before, size + address - before
        if address + size in self._by_start:
            behind = self._by_start[address + size]
            self._remove(behind, address + size)
            size += behind
        self._by_start[address], self._by_end[address + size] = size, address
        bisect.insort(self._holes, (size, address))

    def _remove(self, size: int, address: int) -> None:
        del self._holes[bisect.bisect_left(self._holes, (size, address))]
        del self._by_start[address], self._by_end[address + size]


def growth(events: Sequence[Event]) -> Growth:
    """By how much the process grows while these storages come and go once."""
    return _middle(lambda heap: _play(heap, events, 0), STAYING)


def growth_of_steps(
    events: Sequence[Event], batches: int, lasting: Sequence[int], *, thrifty: bool = False
) -> Growth:
    """The same of optimizer steps, what is made in the first one and stays included.

    Args:
        events: Of a micro-batch; what is left of the first one, its gradients, lives to the end of
            the step.
        batches: Micro-batches of a step.
        lasting: Bytes of each tensor that the optimizer keeps.
        thrifty: With gradient checkpointing.
    """

    def play(heap: Heap) -> None:
        for step in range(STEPS):
            gradients = _play(heap, events, 0)
            for batch in range(1, min(batches, MOST_BATCHES)):
                heap.sweep(SWEPT_BETWEEN)
                for name in _play(heap, events, batch):
                    heap.give(name)
            for number, size in enumerate(lasting if step == 0 else ()):
                heap.take((-1, number), size)
            for name in gradients:
                heap.give(name)
            heap.sweep()

    return _middle(play, STAYING_THRIFTY if thrifty else STAYING)


def _play(heap: Heap, events: Sequence[Event], batch: int) -> list[Name]:
    """Replay a micro-batch. Returns what is left alive."""
    alive: dict[Name, None] = {}
    for event in events:
        name = batch, event.number
        if event.bytes > 0:
            heap.take(name, event.bytes)
            alive[name] = None
        else:
            heap.give(name)
            del alive[name]
    return list(alive)


def _middle(play: Callable[[Heap], object], staying: float) -> Growth:
    """The middle one of several replays by its total."""
    found = []
    for seed in range(REPLAYS):
        heap = Heap(seed, staying)
        play(heap)
        found.append(Growth(heap.peak, heap.top, heap.most_mapped))
    return sorted(found, key=lambda growth: growth.total)[REPLAYS // 2]
