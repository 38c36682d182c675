"""The precision that `mixed_precision: auto` finds on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from lora_scripts.device import choose

BUSY = """
import torch
torch.set_num_threads(1)
matrix = torch.randn(1000, 1000)
print("busy", flush=True)
while True:
    matrix @ matrix
"""


@pytest.mark.skipif(os.name == "nt", reason="a thread's own time is too coarse on Windows")
def test_it_is_the_same_while_the_machine_is_busy() -> None:
    quiet = choose("cpu", "auto").precision
    with ExitStack() as stack:
        for _ in range(min(8, 2 * (os.cpu_count() or 1))):
            other = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
            )
            stack.callback(other.kill)
            assert other.stdout is not None and other.stdout.readline()
        assert {choose("cpu", "auto").precision for _ in range(5)} == {quiet}


def test_looking_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    choose("cpu", "auto")
    assert torch.get_num_threads() == before
