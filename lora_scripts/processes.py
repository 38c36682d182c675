"""Several processes that train one LoRA: who is who, sums over all, what one tells the others.

torchrun (or `accelerate launch`) starts them, on one machine or on many, and says in the
environment of each which one it is. Gradients go through NCCL between cards and through gloo
between CPUs; everything else through gloo.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lora_scripts import pulse
from lora_scripts.pulse import Pulse

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
# Rank 0 may encode a large data set while the others wait; that one of them is gone is noticed by
# the pulse, not by this.
PATIENCE = timedelta(days=7)
FEW = 4  # processes that are named


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. Alone it is the first of one.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        local_rank: Which one on its host.
        local_size: How many there are on its host.
        pulse: Its sign of life, if there are others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    pulse: Pulse | None = None

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """For messages: `rank 3 on worker-2`."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This one's of what is dealt out in turn; all of them together have each once."""
        return items[self.rank :: self.size]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum of it over all processes; it is of one shape in all."""
        if self.size > 1:
            import torch.distributed

            with self._speaking():
                torch.distributed.all_reduce(tensor)

    def told_by_first(self, value: Value) -> Value:
        """What the first process has for `value`."""
        if self.size == 1:
            return value
        import torch.distributed

        box = [value]
        with self._speaking():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, in the order of ranks, in all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.size
        with self._speaking():
            torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all have come here."""
        self.gathered(None)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """A connection that breaks is answered by the pulse, which knows whose it is."""
        try:
            yield
        except RuntimeError:
            if self.pulse is not None:
                self.pulse.wait_for_verdict()
            raise

    @contextmanager
    def part_of_step(self) -> Iterator[None]:
        """Within this context work is done that never takes far longer than before."""
        if self.pulse is None:
            yield
            return
        with self.pulse.piece():
            yield

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process, then one on each other host, then all others.

        What the earlier ones have put into a cache the later ones find there, whether the hosts
        share it or not.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()


ALONE = Processes()


def some_of(names: Sequence[str]) -> str:
    """Names of processes for a message: the first few, and how many there are besides."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, within this context able to speak; else this one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(_backend(), timeout=PATIENCE)
    here = Processes(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=local_rank,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
    )
    with _pulse(here) as sign_of_life:
        yield replace(here, pulse=sign_of_life)
    torch.distributed.destroy_process_group()


def able_to_speak() -> None:
    """Make a process that is alone a group of one, as libraries for several ask for; else nothing.

    It lasts as long as the process: nobody waits for it.
    """
    import torch.distributed

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(_backend(), store=store, rank=0, world_size=1)
        atexit.register(torch.distributed.destroy_process_group)


def _backend() -> str:
    """Cards speak through NCCL, where PyTorch has it (not on Windows); CPUs through gloo."""
    import torch.distributed

    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if nccl else "gloo"


def _pulse(here: Processes) -> Pulse:
    """The sign of life of this process, in a store that the first one keeps."""
    host = os.environ["MASTER_ADDR"]
    names = here.gathered(here.name)
    store = pulse.open_store(host, 0, here=True) if here.is_first else None
    port = here.told_by_first(store.port if store else 0)
    store = store or pulse.open_store(host, port, here=False)
    return Pulse(store, here.name, here.rank, names)
