"""Key conversion: adapters of named layers -> the tensors of a file. Pure functions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_scripts.models.lora import AdaptedLayer

Namer = Callable[[str, str], str]  # (component, path of the layer) -> module name in the file
Adapters = Mapping[str, Sequence[AdaptedLayer]]  # by component


def is_dora(adapters: Adapters) -> bool:
    """Whether any layer has a magnitude."""
    return any(layer.magnitude is not None for layers in adapters.values() for layer in layers)


def webui(adapters: Adapters, name: Namer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The layout that WebUI, ComfyUI and (but for DoRA) diffusers read alike.

    Three tensors a layer: `NAME.lora_down.weight` (rank, in, …), `NAME.lora_up.weight`
    (out, rank, …) and `NAME.alpha` (0-dim). Readers scale the product by alpha / rank, so alpha is
    always written, in float32 whatever `dtype`: without it they would take 1.0. DoRA adds
    `NAME.dora_scale`, a magnitude for each output: (out, 1, …), as many dimensions as the weight.
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
            if layer.magnitude is not None:
                shape = (-1, *(1 for _ in layer.down.shape[1:]))
                tensors[f"{module}.dora_scale"] = layer.magnitude.to(dtype).reshape(shape)
    return tensors


def diffusers(adapters: Adapters, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """diffusers' own layout: `COMPONENT.PATH.lora_A.weight`, `.lora_B.weight`, magnitudes.

    It has no place for alpha; that goes into the header, see `settings`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, layers in adapters.items():
        for layer in layers:
            module = f"{component}.{layer.path}"
            tensors[f"{module}.lora_A.weight"] = layer.down.to(dtype).contiguous()
            tensors[f"{module}.lora_B.weight"] = layer.up.to(dtype).contiguous()
            if layer.magnitude is not None:
                magnitude = layer.magnitude.to(dtype)
                if layer.down.ndim == 4:  # PEFT's shape for convolutions
                    magnitude = magnitude[None, :, None, None]
                # transformers, which reads those of text encoders, looks for `.weight` behind it
                end = "" if component == "unet" else ".weight"
                tensors[f"{module}.lora_magnitude_vector{end}"] = magnitude.contiguous()
    return tensors


def settings(adapters: Adapters) -> str:
    """PEFT's settings of all components as JSON, for diffusers' `lora_adapter_metadata`."""
    values: dict[str, Any] = {}
    for component, layers in adapters.items():
        if layers:
            own = _settings(layers)
            values |= {f"{component}.{key}": value for key, value in own.items()}
    return json.dumps(values, sort_keys=True)


def _settings(layers: Sequence[AdaptedLayer]) -> dict[str, Any]:
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(x.path): x.rank for x in layers if x.rank != rank},
        "alpha_pattern": {re.escape(x.path): x.alpha for x in layers if x.alpha != alpha},
        "target_modules": [layer.path for layer in layers],
        "use_dora": any(layer.magnitude is not None for layer in layers),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }
