"""What the families with a UNet and CLIP text encoders share: a LoRA's layers, one forward pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers.models.clip.modeling_clip import (
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPTextEmbeddings,
)

from lora_scripts.errors import user_error
from lora_scripts.models.clip_text import MASK
from lora_scripts.models.family import Conditioning, Preset

_UNET_ATTENTION = re.compile(r".+\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0)")
_UNET_LINEAR = re.compile(r".+\.attentions\.\d+\..+")  # attention, feed-forward, proj_in, proj_out
_UNET_ALL = re.compile(r"(?:down_blocks\.|mid_block\.|up_blocks\.).+")  # convolutions, too
_TEXT_ATTENTION = re.compile(r".+\.self_attn\.(?:q|k|v|out)_proj")
_TEXT_LINEAR = re.compile(r".+\.layers\.\d+\..+")
_ADAPTER = re.compile(r"\.lora_[AB]\.")
_PRESETS: Mapping[str, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "attention": (_UNET_ATTENTION, _TEXT_ATTENTION),
    "linear": (_UNET_LINEAR, _TEXT_LINEAR),
    "all": (_UNET_ALL, _TEXT_LINEAR),
}


def adaptable(component: str, module: nn.Module) -> list[str]:
    """The paths of all layers of a component that a LoRA can sit on: preset `all`."""
    pattern = _PRESETS["all"][component != "unet"]
    return [
        path.removesuffix(".base_layer")  # below an adapter that is there already
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and pattern.fullmatch(path)
        and not _ADAPTER.search(path)
    ]


def targets(
    modules: Mapping[str, nn.Module], chosen: Preset | Sequence[str]
) -> dict[str, list[str]]:
    """The layers of a preset, or those whose paths end in one of the names, by component.

    Raises:
        UserError: if a name fits no layer, with the names that there are.
    """
    layers = {component: adaptable(component, module) for component, module in modules.items()}
    if isinstance(chosen, str):
        patterns = _PRESETS[chosen]
        return {
            component: [path for path in paths if patterns[component != "unet"].fullmatch(path)]
            for component, paths in layers.items()
        }
    every = [path for paths in layers.values() for path in paths]
    unknown = [name for name in chosen if not any(_ends(path, name) for path in every)]
    if unknown:
        kinds = sorted({re.sub(r"^.*\.(?=[a-z])", "", path) for path in every})
        what = f"found {', '.join(unknown)}; this model's layers are {', '.join(kinds)}"
        raise user_error("lora_targets", what)
    return {
        component: [path for path in paths if any(_ends(path, name) for name in chosen)]
        for component, paths in layers.items()
    }


def units(module: nn.Module) -> list[nn.Module]:
    """What is gathered at once where a UNet or text encoder is spread, each before what holds it.

    A text encoder as a whole is none: FSDP gives a unit a class of its own, and transformers would
    not know which states to collect of that.
    """
    kinds = (
        UNet2DConditionModel, BasicTransformerBlock, ResnetBlock2D,
        CLIPEncoder, CLIPEncoderLayer, CLIPTextEmbeddings,
    )  # fmt: skip
    names = ("final_layer_norm", "text_projection")
    parts = [
        part
        for path, part in module.named_modules()
        if isinstance(part, kinds) or path.rpartition(".")[2] in names
    ]
    return parts[::-1]


def denoise(
    unet: UNet2DConditionModel,
    noisy_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    conditioning: Conditioning,
    added: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The UNet's output for a conditioning's `embedding` (B, S, D), past what its mask hides.

    `added`: what the UNet is told beside the text, under diffusers' names.
    """
    dtype = unet.dtype  # asked once: diffusers goes through all modules for it
    output_BCHW: torch.Tensor = unet(
        noisy_BCHW.to(dtype),
        timesteps_B,
        encoder_hidden_states=conditioning["embedding"].to(dtype),
        encoder_attention_mask=conditioning.get(MASK),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output_BCHW


def webui_name(prefix: str, path: str, *, is_text: bool) -> str:
    """The name under which WebUI and ComfyUI look for the adapter of a layer.

    They expect the level `text_model.` in every text encoder; transformers >= 5.6 has it in those
    with a projection only.
    """
    if is_text and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def pixel_multiple(unet: UNet2DConditionModel, side_factor: int) -> int:
    """Sides of a picture must be multiples of this; `side_factor`: pixels of a latent pixel."""
    multiple: int = side_factor * 2 ** (len(unet.config.block_out_channels) - 1)
    return multiple


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
