"""The layers of SD 1.5, SD 2.1 and SDXL without weights: enough to read a LoRA file without a base.

The modules are on the meta device; they have names and shapes, and take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_scripts.models import sd, sdxl
from lora_scripts.models import unet as unet_layers
from lora_scripts.models.kinds import Family
from lora_scripts.models.packaged import packaged_config

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")


class Skeleton:
    """A family's layers and their names, as a LoRA file of it knows them."""

    def __init__(self, name: Family) -> None:
        self.name = name
        self.prefixes = sdxl.PREFIXES if name == "sdxl" else sd.PREFIXES
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {
                "unet": UNet2DConditionModel.from_config(packaged_config(name, "unet")),
                "text_encoder": CLIPTextModel(
                    CLIPTextConfig(**packaged_config(name, "text_encoder"))
                ),
            }
            if name == "sdxl":
                second = CLIPTextConfig(**packaged_config(name, "text_encoder_2"))
                modules["text_encoder_2"] = CLIPTextModelWithProjection(second)
        self.adapted: Mapping[str, nn.Module] = modules

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
    """The skeleton of a family, made once."""
    return Skeleton(name)
