"""The layers of a model without weights: of the published SD 1.5, SD 2.1 and SDXL, or of a base.

Enough to read a LoRA file, or to see whether it fits, before anything is loaded. The modules are on
the meta device; they have names and shapes, and take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.models import sd, sdxl, single_file
from lora_scripts.models import unet as unet_layers
from lora_scripts.models.json_file import read_json
from lora_scripts.models.kinds import Family
from lora_scripts.models.packaged import packaged_config
from lora_scripts.models.signature import Signature

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")


class Skeleton:
    """A model's layers and their names, as a LoRA file of its family knows them."""

    def __init__(self, name: Family, adapted: Mapping[str, nn.Module]) -> None:
        self.name = name
        self.prefixes = sdxl.PREFIXES if name == "sdxl" else sd.PREFIXES
        self.adapted = adapted

    def webui_name(self, component: str, path: str) -> str:
        """The name under which WebUI and ComfyUI look for the adapter of a layer."""
        prefix = self.prefixes[component]
        return unet_layers.webui_name(prefix, path, is_text=component != "unet")

    def metadata(self) -> dict[str, str]:
        """The header fields by which programs recognise the family."""
        match self.name:
            case "sd1" | "sd2":
                version, architecture = sd.VERSIONS[self.name, "epsilon"]
            case "sdxl":
                version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
        return {
            "ss_base_model_version": version,
            "ss_v2": str(self.name == "sd2"),
            "modelspec.architecture": f"{architecture}/lora",
        }


@cache
def of(name: Family) -> Skeleton:
    """The skeleton of a family at its published sizes, made once."""
    parts = ("unet", *_text_parts(name))
    return Skeleton(name, _modules(name, {part: packaged_config(name, part) for part in parts}))


def of_base(found: Signature) -> Skeleton:
    """The skeleton of a base model, told from its configs or from its file's header.

    Raises:
        UserError: if a file lacks tensors, or holds unknown ones.
    """
    parts = ("unet", *_text_parts(found.family))
    if found.layout == "ldm":
        modules = single_file.empty_modules(found)
        return Skeleton(found.family, {part: modules[part] for part in parts})
    configs = {part: read_json(found.path / part / "config.json") for part in parts}
    return Skeleton(found.family, _modules(found.family, configs))


def _text_parts(name: Family) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if name == "sdxl" else ("text_encoder",)


def _modules(name: Family, configs: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Modules on the meta device by their configs."""
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"unet": UNet2DConditionModel.from_config(configs["unet"])}
        for part in _text_parts(name):
            modules[part] = classes[part](CLIPTextConfig.from_dict(dict(configs[part])))
    return modules
