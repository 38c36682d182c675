"""Bytes of live storages while tensors without memory go through a model.

Every operation, forward and backward, passes `Tracker`; a storage counts from the operation that
makes it until nothing refers to it, whatever autograd keeps of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Event:
    """A storage that is born (`bytes` above 0) or dies (below 0). Each has a number of its own."""

    number: int
    bytes: int


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations leave alive.

    Attributes:
        live: Bytes that are alive now.
        peak: The most that was alive at once.
        at_work: The same with what convolutions copy while they are at work.
        peak_wide: Of these, what belongs to tensors whose last dimension is `wide`.
        events: Every birth and death in order.
    """

    def __init__(self, wide: int | None = None) -> None:
        """`wide`: the size of a vocabulary, to tell logits from other activations."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.peak_wide = self.at_work = 0
        self.events: list[Event] = []
        self._wide = wide
        self._live_wide = 0
        self._kept: list[torch.UntypedStorage] = []
        self._known: dict[int, Any] = {}

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """These were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            self._known[id(storage)] = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        self.at_work = max(self.at_work, self.live + _laid_out_anew(func, args, result))
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        birth = Event(len(self.events), storage.nbytes())
        is_wide = self._wide is not None and tensor.shape[-1:] == (self._wide,)
        # the storage's death is heard of through the reference, whoever held it last
        self._known[key] = weakref.ref(storage, lambda _: self._die(key, birth, is_wide))
        self.events.append(birth)
        self.live += birth.bytes
        self._live_wide += birth.bytes * is_wide
        if self.live > self.peak:
            self.peak, self.peak_wide = self.live, self._live_wide

    def _die(self, key: int, birth: Event, is_wide: bool) -> None:
        del self._known[key]
        self.events.append(Event(birth.number, -birth.bytes))
        self.live -= birth.bytes
        self._live_wide -= birth.bytes * is_wide


def _laid_out_anew(func: Any, args: Sequence[Any], result: Any) -> int:
    """Bytes that a convolution takes while it is at work.

    oneDNN copies input or output, whichever is larger, and the kernel into an order of its own.
    """
    aten = torch.ops.aten
    if func is aten.convolution.default:
        source, kernel, made = args[0], args[1], result
    elif func is aten.convolution_backward.default:
        source, kernel, made = args[0], args[2], args[1]  # made: the gradient of the input
    else:
        return 0
    return max(_bytes(source), _bytes(made)) + _bytes(kernel)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take, storages that they share counted once."""
    storages = {id(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())
