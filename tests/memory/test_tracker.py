"""Bytes of live storages, counted and compared with what is worked out by hand."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
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


def test_a_convolution_lays_its_tensors_out_anew() -> None:
    mode = FakeTensorMode()
    with mode:
        pixels, kernel = torch.empty(1, 4, 32, 32), torch.empty(6, 4, 3, 3)
        tracker = Tracker()
        tracker.leave_out([pixels, kernel])
        with tracker:
            made = torch.nn.functional.conv2d(pixels, kernel, padding=1)
    output = 6 * 32 * 32 * FLOAT
    assert tracker.live == made.nbytes == output
    assert tracker.peak == output
    assert tracker.at_work == output + output + 6 * 4 * 3 * 3 * FLOAT


WHAT_THE_SYSTEM_SEES = """
from lora_scripts import allocator
assert allocator.map_alone()
import torch
from diffusers import AutoencoderKL
from lora_scripts.memory import room
from lora_scripts.memory.tracker import Tracker, tensors_of
# three levels: the attention in the middle, among a quarter of the pixels, stays cheap
down, up = ["DownEncoderBlock2D"] * 3, ["UpDecoderBlock2D"] * 3
vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=[32, 32, 64])
vae.requires_grad_(False)
pixels = torch.randn(2, 3, 256, 256).requires_grad_(True)

def step():
    loss = vae(pixels).sample.square().mean()
    loss.backward()
    pixels.grad = None

step()  # code that runs for the first time
allocator.give_back()
before = room.resident()
room.forget_peak()
step()
seen = room.peak_resident() - before
tracker = Tracker()
tracker.leave_out([pixels, *tensors_of(vae)])
with tracker:
    step()
print(seen, max(tracker.peak, tracker.at_work))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems allocate otherwise")
def test_what_is_counted_is_what_the_system_sees() -> None:
    """Of a step through a VAE, whose convolutions are the largest of a run."""
    done = subprocess.run(
        [sys.executable, "-c", WHAT_THE_SYSTEM_SEES], capture_output=True, text=True, check=True
    )
    seen, counted = map(int, done.stdout.split())
    assert counted > 200e6
    assert counted == pytest.approx(seen, rel=0.03)


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
