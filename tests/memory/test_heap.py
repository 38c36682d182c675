"""glibc's heap, replayed."""

from __future__ import annotations

from lora_scripts.memory import heap
from lora_scripts.memory.heap import MAPPED, PIECES, Growth, Heap
from lora_scripts.memory.tracker import Event

MB = 2**20


def test_large_blocks_are_given_back_at_once() -> None:
    events = [event for n in range(5) for event in (Event(n, MAPPED), Event(n, -MAPPED))]
    assert heap.growth(events) == Growth(total=MAPPED, kept=0, mapped=MAPPED)


def test_a_hole_is_too_small_for_the_next_tensor_of_its_size() -> None:
    """Between tensors that stay, holes of one size are not filled by the same size again."""
    stays = [Event(2 * n, MB) for n in range(20)]
    comes = [Event(2 * n + 1, MB) for n in range(20)]
    events = [event for pair in zip(stays, comes, strict=True) for event in pair]
    events += [Event(event.number, -MB) for event in comes]
    events += [Event(100 + n, MB) for n in range(20)]
    assert 55 * MB < heap.growth(events).total <= 60 * (MB + PIECES)


def test_a_smaller_tensor_goes_into_a_hole() -> None:
    found = Heap(seed=0, staying=1.0)
    for number in range(4):
        found.take((0, number), MB)
    found.give((0, 1))
    before = found.peak
    found.take((0, 9), MB // 2)
    assert found.peak == before


def test_what_an_optimizer_keeps_is_made_once_and_stays() -> None:
    """Gradients of a step die at its end; those of its second micro-batch at once."""
    step = [Event(0, MB), Event(1, MB), Event(1, -MB)]  # a gradient, an activation
    found = heap.growth_of_steps(step, batches=1, lasting=[2 * MB])
    assert 4 * MB <= found.total < 4.01 * MB
    more = heap.growth_of_steps(step, batches=2, lasting=[2 * MB])
    assert found.total <= more.total < 6.01 * MB


def test_pieces_that_do_not_stay_go_with_the_next_tensor() -> None:
    """Then neighbours become one hole again."""
    found = Heap(seed=0, staying=0.0)
    for number in range(3):
        found.take((0, number), MB)
    found.give((0, 0))
    found.give((0, 1))
    found.take((0, 9), 100)  # too small for the heap that is replayed, but it holds the pieces
    found.give((0, 9))
    before = found.peak
    found.take((0, 10), 2 * MB)
    assert found.peak == before
