"""The names under which programs write the adapter of a layer, for every layer of a model.

Names are looked up in this list, never taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lora_scripts.models import lora_layouts, original_names, unet
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.lora_layouts import bare

Place = tuple[str, str]  # component, path of a layer


class Named(Protocol):
    """What must be known of a model to read its LoRA files: a loaded family, or a skeleton."""

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The modules that a LoRA can sit on, by component."""

    def webui_name(self, component: str, path: str) -> str:
        """The name under which WebUI and ComfyUI look for the adapter of a layer."""

    def metadata(self) -> dict[str, str]:
        """The header fields by which programs recognise the family."""


def names_of(family: Named) -> dict[str, Place]:
    """Every name under which a program may write the adapter of a layer -> the layer.

    WebUI's names with diffusers' and with the original blocks; paths with and without the
    component in front; with and without the level `text_model` that transformers once had; the
    first text encoder as `lora_te1_` in any family, as diffusers' converter writes it.
    """
    names: dict[str, Place] = {}
    for component, module in family.adapted.items():
        for path in unet.adaptable(component, module):
            webui = family.webui_name(component, path)
            found = [webui, webui.replace("lora_te_", "lora_te1_", 1)]
            found += _unet_names(path, module) if component == "unet" else []
            found += [f"{component}.{each}" for each in _levels(component, path)]
            names |= dict.fromkeys(found, (component, path))
    return names


def shape_of(family: Named, component: str, path: str) -> tuple[int, ...]:
    """The shape of a layer's weight, whether it is adapted already or not."""
    layer: Any = family.adapted[component].get_submodule(path)
    weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
    return tuple(weight.shape)


def fits(header: Mapping[str, TensorInfo], family: Named) -> bool:
    """Whether all layers of a LoRA file are in a model, of these shapes."""
    modules = lora_layouts.sort(header).modules
    places = names_of(family)
    for name, module in modules.items():
        if bare(name) not in places or not {"down", "up"} <= module.tensors.keys():
            return False
        shape = shape_of(family, *places[bare(name)])
        down, up = (header[module.tensors[part]].shape for part in ("down", "up"))
        if (
            len(down) < 2
            or len(up) < 2
            or (up[0], down[1]) != shape[:2]
            or (len(down) == len(shape) and down[2:] != shape[2:])
        ):
            return False
    return bool(modules)


def _unet_names(path: str, module: nn.Module) -> list[str]:
    """With the original blocks, as ComfyUI's plain form, without the component in front."""
    config: Any = module.config
    original = original_names.unet_path(path, dict(config))
    return [
        path,
        f"lora_unet_{original.replace('.', '_')}",
        f"diffusion_model.{original}",
        f"lycoris_{path.replace('.', '_')}",  # SimpleTuner with LyCORIS
    ]


def _levels(component: str, path: str) -> list[str]:
    """A text encoder's path with and without the level `text_model`."""
    below = path.removeprefix("text_model.")
    return [path] if component == "unet" else [below, f"text_model.{below}"]
