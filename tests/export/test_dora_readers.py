"""What other programs make of a DoRA: replays of their formulas beside the trained layer.

From the sources in 2026-11, in our own words: ComfyUI 0.3.77 (`comfy/weight_adapter/base.py`) and
Forge of 2025-06 (`backend/patcher/lora.py`) multiply W + ΔW by `dora_scale` over the norms of W's
rows, if its first size is that of W; AUTOMATIC1111 1.10 (`extensions-builtin/Lora/network.py`) by
`dora_scale` over the norms of the columns of W + ΔW. The method divides by the rows of W + ΔW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lora_scripts.export import keys
from lora_scripts.models import lora
from lora_scripts.models.lora import AdaptedLayer

LAYERS: dict[str, Callable[[], nn.Linear | nn.Conv2d]] = {
    "linear": lambda: nn.Linear(24, 24),
    "convolution": lambda: nn.Conv2d(24, 16, 3),
}


def trained(layer: nn.Linear | nn.Conv2d) -> AdaptedLayer:
    """A DoRA whose update is about a tenth of the weight, its magnitudes a little moved."""
    weight = layer.weight.detach()
    source = torch.Generator().manual_seed(1)
    out, *inputs = weight.shape
    down = torch.randn(2, *inputs, generator=source)
    up = torch.randn(out, 2, *(1 for _ in inputs[1:]), generator=source)
    size = 0.1 * weight.norm() / (up.flatten(1) @ down.flatten(1)).norm()
    magnitude = weight.flatten(1).norm(dim=1) * (1 + 0.05 * torch.randn(out, generator=source))
    return AdaptedLayer("0", down, up * size, alpha=2.0, magnitude=magnitude)


def merged(layer: nn.Linear | nn.Conv2d, adapter: AdaptedLayer) -> torch.Tensor:
    """The layer's weight with the DoRA in it, by PEFT."""
    module = nn.Sequential(copy.deepcopy(layer))
    lora.put(module, "a", [adapter])
    lora.set_strengths(module, {"a": 1.0})
    lora.merge_into(module)
    weight: torch.Tensor = module.get_parameter("0.weight").detach()
    return weight


@pytest.mark.parametrize("kind", LAYERS)
def test_comfyui_comes_close_and_a1111_does_not(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    adapter = trained(layer)
    tensors = keys.webui({"unet": [adapter]}, lambda component, path: path, torch.float32)
    scale = tensors["0.dora_scale"]
    weight = layer.weight.detach()
    assert scale.shape == (len(weight), *(1 for _ in weight.shape[1:]))
    update = (adapter.up.flatten(1) @ adapter.down.flatten(1)).reshape(weight.shape)
    together = weight + adapter.alpha / adapter.rank * update
    rows = together.flatten(1).norm(dim=1).reshape(scale.shape)
    exact = together * scale / rows
    torch.testing.assert_close(merged(layer, adapter), exact)
    comfy = together * scale / weight.flatten(1).norm(dim=1).reshape(scale.shape)
    columns = together.transpose(0, 1).flatten(1).norm(dim=1)
    a1111 = together * scale / columns.reshape(1, -1, *(1 for _ in weight.shape[2:]))
    size = exact.norm()
    assert (comfy - exact).norm() / size > 0.001
    assert (a1111 - exact).norm() / size > 0.05 > (comfy - exact).norm() / size
