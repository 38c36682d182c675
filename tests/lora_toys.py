"""LoRA files in the layouts of the well-known trainers, with random matrices, for toy models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lora_scripts.models import original_names
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.lora import AdaptedLayer

Layers = Mapping[str, list[AdaptedLayer]]


def random_layers(
    family: ImageFamily, preset: str = "all", *, rank: int = 2, alpha: float = 3.0, seed: int = 1
) -> dict[str, list[AdaptedLayer]]:
    """Adapters of all layers of a preset, in every component."""
    source = torch.Generator().manual_seed(seed)
    found: dict[str, list[AdaptedLayer]] = {}
    for component, paths in family.targets(preset).items():  # type: ignore[arg-type]
        for path in paths:
            weight = family.adapted[component].get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            out, *inputs = weight.shape
            down = torch.randn(rank, *inputs, generator=source)
            up = 0.1 * torch.randn(out, rank, *(1 for _ in inputs[1:]), generator=source)
            found.setdefault(component, []).append(AdaptedLayer(path, down, up, alpha))
    return found


def probe_of(family: ImageFamily, layers: Layers) -> torch.Tensor:
    """The model's outputs with these adapters, added to its weights by hand."""
    for component, adapters in layers.items():
        for layer in adapters:
            weight = family.adapted[component].get_submodule(layer.path).weight
            assert isinstance(weight, torch.Tensor)
            update = layer.up.flatten(1) @ layer.down.flatten(1)
            weight.data += layer.alpha / layer.rank * update.reshape(weight.shape)
    with torch.no_grad():
        return family.probe()


def kohya(path: Path, family: ImageFamily, layers: Layers, *, original: bool = False) -> Path:
    """kohya's scripts, OneTrainer, ai-toolkit (SD), LyCORIS LoCon: names with underscores.

    `original`: the UNet's blocks as in the original layout, as kohya's scripts write for SDXL.
    """
    tensors = {}
    for component, adapters in layers.items():
        for layer in adapters:
            name = family.webui_name(component, layer.path)
            if original and component == "unet":
                config = dict(family.adapted["unet"].config)  # type: ignore[arg-type]
                place = original_names.unet_path(layer.path, config)
                name = f"lora_unet_{place.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = layer.down
            tensors[f"{name}.lora_up.weight"] = layer.up
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return path


def peft(folder: Path, layers: Layers, component: str = "unet") -> Path:
    """A PEFT directory of one component, as `model.save_pretrained` writes it."""
    folder.mkdir()
    prefix = "base_model.model."
    adapters = layers[component]
    tensors = {}
    for layer in adapters:
        tensors[f"{prefix}{layer.path}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{layer.path}.lora_B.weight"] = layer.up
    save_file(tensors, folder / "adapter_model.safetensors")
    rank, alpha = adapters[0].rank, adapters[0].alpha
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def diffusers_mixture(path: Path, layers: Layers) -> Path:
    """What diffusers' example scripts save: three ways of naming, PEFT's settings in the header."""
    tensors, settings = {}, {}
    for component, adapters in layers.items():
        config = LoraConfig(
            r=adapters[0].rank,
            lora_alpha=adapters[0].alpha,
            target_modules=[layer.path for layer in adapters],
        ).to_dict()
        settings |= {f"{component}.{key}": value for key, value in config.items()}
        for layer in adapters:
            name = f"{component}.{layer.path}"
            if component == "text_encoder":  # as before transformers 5.6
                name = f"{component}.text_model.{layer.path}"
            ends = ("lora_A", "lora_B")
            if re.search(r"\.to_(q|k|v|out\.0)$", layer.path):
                ends = ("lora.down", "lora.up")
            elif re.search(r"\.(q|k|v|out)_proj$", layer.path):
                ends = ("lora_linear_layer.down", "lora_linear_layer.up")
            tensors[f"{name}.{ends[0]}.weight"] = layer.down
            tensors[f"{name}.{ends[1]}.weight"] = layer.up
    text = json.dumps(settings, default=sorted)  # sets
    save_file(tensors, path, metadata={"lora_adapter_metadata": text})
    return path


def old_diffusers(path: Path, layers: Layers) -> Path:
    """Attention processors of diffusers before 0.26; the scale is 1."""
    tensors = {}
    for layer in layers["unet"]:
        block, kind = layer.path.removesuffix(".0").rsplit(".", 1)
        for part, matrix in (("down", layer.down), ("up", layer.up)):
            tensors[f"unet.{block}.processor.{kind}_lora.{part}.weight"] = matrix
    save_file(tensors, path)
    return path
