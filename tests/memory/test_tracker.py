"""Bytes of live storages, counted and compared with what is worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lora_scripts.memory import fakes
from lora_scripts.memory.tracker import Tracker, tensors_of

ROWS, WIDE, NARROW = 1024, 128, 64
FLOAT = 4


def test_a_step_of_two_layers_is_what_one_counts_by_hand() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(NARROW, WIDE), nn.ReLU(), nn.Linear(WIDE, NARROW))

    peak, left = step(model, ROWS)
    last_layer = (WIDE * NARROW + NARROW) * FLOAT
    assert left == (NARROW * WIDE + WIDE) * FLOAT + last_layer
    # Most is alive when the rectifier's gradient is made: its output, which autograd has kept, the
    # gradients before and behind it, those of the last layer; the loss and its gradient.
    hidden = ROWS * WIDE * FLOAT
    assert peak == 3 * hidden + last_layer + 2 * FLOAT


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(NARROW, NARROW) for _ in range(6)))

    one, left = step(model, ROWS)
    two, left_of_two = step(model, 2 * ROWS)
    assert left == left_of_two
    assert two - one == 6 * ROWS * NARROW * FLOAT


def test_checkpointing_keeps_less() -> None:
    def layers() -> list[nn.Module]:
        return [
            nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW))
            for _ in range(6)
        ]

    plain, _ = step(lambda: nn.Sequential(*layers()), ROWS)
    thrifty, _ = step(lambda: Checkpointed(layers()), ROWS)
    assert thrifty < 0.6 * plain


def test_shared_storages_count_once_and_logits_are_told_apart() -> None:
    mode = FakeTensorMode()
    with mode, (tracker := Tracker(wide=50)):
        states = torch.ones(10, 8)
        views = [states[:5], states.T, states.reshape(80)]
        logits = torch.ones(10, 50)
    assert tracker.live == tracker.peak == (80 + 500) * FLOAT
    assert tracker.peak_wide == 500 * FLOAT
    del states, views, logits
    assert tracker.live == 0


class Checkpointed(nn.Module):
    """Layers whose insides are computed again in the backward pass."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = checkpoint(layer, states, use_reentrant=False)
        return states


def step(make: Callable[[], nn.Module], rows: int) -> tuple[int, int]:
    """The peak of forward and backward, and what is left after them."""
    with torch.device("meta"):
        model = make()
    mode = FakeTensorMode()
    fakes.pretend([model], mode)
    with mode:
        inputs = torch.empty(rows, NARROW)
        tracker = Tracker()
        tracker.leave_out([inputs, *tensors_of(model)])
        with tracker:
            model(inputs).sum().backward()
    return tracker.peak, tracker.live
