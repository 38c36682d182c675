"""A thread beside the one that computes has no helpers, and leaves the others theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest

BESIDE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from lora_scripts import threads
def count():
    return len(os.listdir("/proc/self/task"))
def compute():
    return torch.ones(3_000_000).mul(2.0).sum().item()
torch.set_num_threads(4)
compute()  # the main thread has its helpers
before = count()
initializer = threads.compute_alone if sys.argv[1] == "alone" else None
with ThreadPoolExecutor(1, initializer=initializer) as pool:
    assert pool.submit(compute).result() == 6_000_000
    print(count() - before, pool.submit(torch.get_num_threads).result(), torch.get_num_threads())
    later = ThreadPoolExecutor(1)  # nor is it for those that come after it
    print(later.submit(torch.get_num_threads).result())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize(("how", "said"), [("alone", "1 1 4\n4\n"), ("helped", "4 4 4\n4\n")])
def test_what_reads_ahead_takes_no_core_from_what_computes(how: str, said: str) -> None:
    """New threads by the system's count, and threads of arithmetic by PyTorch's."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, how],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == said
