"""Threads beside the one that computes."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def compute_alone() -> None:
    """From now on the calling thread does its own arithmetic, without helpers.

    OpenMP gives each thread that computes helpers of its own. Once all of them are more than there
    are cores, GNU's runtime lets every helper sleep between two operations, and waking them costs a
    small model half of its speed, in the main thread, too (docs/benchmarks.md).
    """
    torch.get_num_threads()  # PyTorch sets a thread up when it is first asked, and would undo this
    threadpool_limits(1, user_api="openmp")
