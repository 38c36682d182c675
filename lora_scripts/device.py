"""Which device and which precision a run computes in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from lora_scripts import threads
from lora_scripts.errors import user_error
from lora_scripts.processes import ALONE, Processes

Precision = Literal["no", "fp16", "bf16"]
Value = TypeVar("Value")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """A device, the precision of frozen weights and arithmetic, and who else computes.

    Attributes:
        sharded: Whether the frozen base is spread over the processes (`models/sharding.py`): all of
            them do the same passes then.
        offloaded: Whether what this process has of a sharded base waits in RAM; it may be all.
    """

    device: torch.device
    precision: Precision
    processes: Processes = ALONE
    sharded: bool = False
    offloaded: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frozen weights."""
        return DTYPES[self.precision]

    @property
    def home(self) -> torch.device:
        """Where a base is read to: the device, or the CPU until it is spread."""
        return torch.device("cpu") if self.sharded else self.device

    def share(self, items: Sequence[Value]) -> list[tuple[Value, bool]]:
        """This process's of what is dealt out in turn, each with whether it counts.

        Where all must do as many passes one that has fewer does the first again, for nothing.
        """
        own = [(item, True) for item in self.processes.share(items)]
        lacks = self.sharded and len(own) * self.processes.size < len(items)
        return [*own, (items[0], False)] if lacks else own

    def autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of a forward pass: mixed precision, or plain float32."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@contextmanager
def determinism(*, on: bool) -> Iterator[None]:
    """Within this context only algorithms that give the same bits each time, if `on`.

    On a CPU they do so in any case. cuBLAS wants its workspace named before it is first used.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # finds faults, costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fills


def choose(
    device: str,
    precision: str,
    processes: Processes = ALONE,
    *,
    sharded: bool = False,
    offloaded: bool = False,
) -> Compute:
    """Resolve `auto`: CUDA where there is one; bf16 where it is native, else fp16 or float32.

    Of several processes each takes its own card, and all the precision that the first has chosen.

    Raises:
        UserError: if CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise user_error(
            "device", "found cuda, but this torch sees no CUDA device; use auto or cpu"
        )
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    chosen = torch.device(kind)
    if kind == "cuda" and processes.size > 1:
        chosen = torch.device(kind, processes.local_rank)
    if precision == "auto":
        precision = _fastest_on_cuda() if kind == "cuda" else _fastest_on_cpu()
    precision = processes.told_by_first(precision)
    match precision:
        case "no" | "fp16" | "bf16":
            return Compute(chosen, precision, processes, sharded or offloaded, offloaded)
        case _:
            raise ValueError(f"precision {precision!r}")


def _fastest_on_cuda() -> Precision:
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def _fastest_on_cpu() -> Precision:
    """bf16 where the CPU computes it natively, found by timing matrix products.

    With native support bf16 is several times faster than float32; without, far slower. Counted is
    the time that one thread computes, which other programs on a busy machine do not lengthen.
    """
    with ThreadPoolExecutor(1, initializer=threads.compute_alone) as aside:
        return aside.submit(_faster).result()


def _faster() -> Precision:
    small, large = 256, 768  # where bf16 is slow, the small one tells, and is soon done
    if _matmul_seconds(torch.bfloat16, small) > 5 * _matmul_seconds(torch.float32, small):
        return "no"
    plain = _matmul_seconds(torch.float32, large)
    return "bf16" if _matmul_seconds(torch.bfloat16, large) < 0.85 * plain else "no"


def _matmul_seconds(dtype: torch.dtype, size: int, rounds: int = 5) -> float:
    """The shortest of `rounds` products of two square matrices, after one that is not timed."""
    # Windows counts a thread's time in sixtieths of a second
    clock = time.perf_counter if os.name == "nt" else time.thread_time
    matrix = torch.ones(size, size, dtype=dtype)
    torch.mm(matrix, matrix)
    seconds = []
    for _ in range(rounds):
        start = clock()
        torch.mm(matrix, matrix)
        seconds.append(clock() - start)
    return min(seconds)
