"""What the process gives back to the system when tensors die."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set up"
)
MB = 10**6

# A large tensor dies: glibc takes its heap for all that are smaller from now on. Then come tensors
# of half a megabyte with smaller ones between them, which stay when the others die.
TENSORS_COME_AND_GO = """
import resource, sys
from lora_scripts import allocator
import torch
if sys.argv[1] == "alone":
    print(allocator.map_alone(), allocator.maps_alone())
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
large = [torch.ones(7_500_000)]
large.clear()
tensors, staying = [], []
for number in range(400):
    tensors.append(torch.ones(125_000))
    staying.append(torch.ones(5_000))
most = resident() - before
tensors.clear()
if sys.argv[1] == "given back":
    allocator.give_back()
print(most, resident() - before)
"""


def come_and_go(how: str, **environment: str) -> tuple[list[str], int, int]:
    """What was said, and bytes of the resident set with the tensors and after them."""
    done = subprocess.run(
        [sys.executable, "-c", TENSORS_COME_AND_GO, how],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    *said, most, after = done.stdout.split()
    return said, int(most), int(after)


def test_a_tensor_that_dies_goes_back_to_the_system() -> None:
    said, most, after = come_and_go("alone")
    assert said == ["True", "True"]
    assert most > 190 * MB
    assert after < 20 * MB
    _, _, kept = come_and_go("left as it is")  # else there would be nothing to do
    assert kept > 150 * MB


def test_what_the_user_has_set_stays() -> None:
    said, _, kept = come_and_go("alone", MALLOC_MMAP_THRESHOLD_=str(32 * 2**20))
    assert said == ["False", "False"]
    assert kept > 150 * MB


def test_what_is_given_back_is_the_systems_again() -> None:
    """As things are left, it would stay with the process."""
    said, most, after = come_and_go("given back")
    assert said == []
    assert most > 190 * MB
    assert after < 20 * MB
