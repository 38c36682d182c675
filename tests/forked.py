"""Processes of a run without a start of their own: forked from one that has imported everything.

A start of Python with PyTorch and the libraries takes four seconds of a core, of torchrun two more.
Here a server of multiprocessing's imports all of it once in a session; the processes that it forks
find in the environment what torchrun would put there.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRELOADED = ["tests.forked_imports"]


def together(
    count: int, work: Callable[..., object], *arguments: Any, code: int = 0, seconds: float = 300
) -> str:
    """What processes say (to stdout and stderr) that all do this work and end with this code.

    Args:
        count: How many.
        work: A function of a module, as it must be pickled; one thread computes.
        arguments: Of the function.
        seconds: After which they are ended.

    Raises:
        AssertionError: with what they said, if one ends otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1",
              "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "said.txt"
        processes = [
            context.Process(
                target=_run,
                args=({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(output), work,
                      arguments),
            )
            for rank in range(count)
        ]  # fmt: skip
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        said = output.read_text(encoding="utf-8")
    assert [process.exitcode for process in processes] == [code] * count, said
    return said


def command(arguments: Sequence[str]) -> None:
    """`lora-scripts` with these arguments, to its end."""
    from lora_scripts.cli import main

    sys.argv = ["lora-scripts", *arguments]
    main(list(arguments))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _run(environment: dict[str, str], output: str, work: Callable[..., object], given: Any) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    work(*given)
