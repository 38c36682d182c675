"""LoRA on a module: attach, list, read out. The only file that imports peft.

The update of a linear layer with weight W is W + (alpha / rank) * up @ down (Hu et al. 2021,
arXiv 2106.09685), with `down` of shape (rank, in) and `up` of shape (out, rank).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

ADAPTER = "default"


@dataclass(frozen=True)
class AdaptedLayer:
    """The adapter of one layer. `down`: (rank, in, ...), `up`: (out, rank, ...), both float32."""

    path: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def attach(
    module: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, dropout: float, seed: int
) -> None:
    """Freeze `module` and put float32 LoRA layers on every sub-module named in `targets`.

    `targets` are full paths or ends of paths (`to_q`). `down` is drawn from `seed`, `up` is zero,
    so that the module's output is unchanged. The global generator is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their path in `module`."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def layers(module: nn.Module) -> list[AdaptedLayer]:
    """The adapters of `module` as float32 copies on the CPU, paths as in the bare module."""
    from peft.tuners.lora import LoraLayer

    return [
        AdaptedLayer(
            path=path,
            down=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            up=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            alpha=float(layer.lora_alpha[ADAPTER]),
        )
        for path, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    ]


def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the adapters to `dtype` and hold them in float32 again, as a reader of a file would."""
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to(dtype).float()


def describe(module: nn.Module) -> str:
    """What is adapted, in words: `128 layers (32 each of to_k, to_out.0, to_q, to_v)`."""
    kinds = Counter(_kind(layer.path) for layer in layers(module))
    by_count: dict[int, list[str]] = {}
    for kind, count in sorted(kinds.items()):
        by_count.setdefault(count, []).append(kind)
    groups = [f"{count} each of {', '.join(names)}" for count, names in by_count.items()]
    return f"{kinds.total()} layers ({'; '.join(groups)})"


def share(modules: Mapping[str, nn.Module]) -> str:
    """Trainable parameters and their share of the base: `797,184 of 860,318,148 (0.093%)`."""
    trained = sum(p.numel() for module in modules.values() for p in trainable(module).values())
    total = sum(p.numel() for module in modules.values() for p in module.parameters())
    base = total - trained
    return f"{trained:,} parameters, {100 * trained / base:.3f}% of the base's {base:,}"


def _kind(path: str) -> str:
    """The part of a path that says what a layer does: `to_q`, or `to_out.0`."""
    *_, before, last = path.split(".")
    return f"{before}.{last}" if last.isdigit() else last
