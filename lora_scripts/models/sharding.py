"""The frozen base spread over the processes of a run, so that each holds a share (torch's FSDP2).

Before a block computes its weights are gathered from all processes, after it they are let go, and
so again in the backward pass. Every process must therefore do as many passes, in the same order.
What is trained lies outside of it, whole in each process.

Offloaded, a share waits in RAM and comes to the card to be gathered; that of one process alone is
the whole base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_scripts.device import Compute
from lora_scripts.processes import able_to_speak

_ADAPTER = "lora_"  # in the name of every parameter of PEFT's


def shard(module: nn.Module, units: Sequence[nn.Module], compute: Compute) -> None:
    """Keep this process's share of each unit's frozen weights; adapters go to the device.

    Must be called by all processes.

    Args:
        module: A model of diffusers or transformers.
        units: What is gathered at once of it, each before the one that it stands in, which then
            holds the rest.
        compute: Tells whether a share waits in RAM or on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    able_to_speak()
    mesh = init_device_mesh(compute.device.type, (compute.processes.size,))
    kept = {p for unit in units for name, p in unit.named_parameters() if _ADAPTER in name}
    at_rest = OffloadPolicy()
    if compute.offloaded:
        at_rest = CPUOffloadPolicy(pin_memory=compute.device.type == "cuda")
    for unit in units:
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept, offload_policy=at_rest
        )
    for parameter in kept:
        parameter.data = parameter.data.to(compute.device)
    if compute.offloaded:
        _tell_device(module, compute.device)


def _tell_device(module: nn.Module, device: torch.device) -> None:
    """Have `module.device` name where a model computes.

    diffusers and transformers take it from the first weight, and it waits in RAM. What they know
    of a class they find by its name, which stays.
    """
    own = type(module)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    module.__class__ = type(own.__name__, (own,), {**names, "device": device})


def bring_rest(module: nn.Module, compute: Compute) -> None:
    """Put on the device what no unit of a module has."""
    from torch.distributed.tensor import DTensor

    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(compute.device)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are gathered when it computes."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_shared(module: nn.Module) -> bool:
    """Whether passes through a module must be done by several processes together."""
    import torch.distributed

    return is_sharded(module) and torch.distributed.get_world_size() > 1


@contextmanager
def gathered(unit: Any) -> Iterator[None]:
    """A unit's own weights, whole within this context, for what is computed without calling it."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def largest(units: Sequence[nn.Module]) -> int:
    """Bytes of the frozen weights of the unit that has most, as they are gathered."""
    known: set[int] = set()
    sizes = []
    for unit in units:
        own = {id(p): p for n, p in unit.named_parameters() if _ADAPTER not in n}
        sizes.append(sum(p.numel() * p.itemsize for key, p in own.items() if key not in known))
        known |= own.keys()
    return max(sizes)
