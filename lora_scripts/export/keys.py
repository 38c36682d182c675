"""Key conversion: adapters of named layers -> the tensors of a file, and back. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from lora_scripts.models.lora import AdaptedLayer

Namer = Callable[[str, str], str]  # (component, path of the layer) -> module name in the file


def webui(
    adapters: Mapping[str, Sequence[AdaptedLayer]], name: Namer, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The layout that WebUI, ComfyUI and diffusers read alike.

    Three tensors a layer: `NAME.lora_down.weight` (rank, in, …), `NAME.lora_up.weight`
    (out, rank, …) and `NAME.alpha` (0-dim). Readers scale the product by alpha / rank, so alpha is
    always written, in float32 whatever `dtype`: without it they would take 1.0.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, layers in adapters.items():
        for layer in layers:
            module = name(component, layer.path)
            if f"{module}.alpha" in tensors:
                raise ValueError(f"two layers share the name {module}")
            tensors[f"{module}.lora_down.weight"] = layer.down.to(dtype).contiguous()
            tensors[f"{module}.lora_up.weight"] = layer.up.to(dtype).contiguous()
            tensors[f"{module}.alpha"] = torch.tensor(layer.alpha)
    return tensors
