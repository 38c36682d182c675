"""Where each tensor of a diffusers module lies in a checkpoint of the original layout.

The original names are those of CompVis/stable-diffusion (LDM: SD 1.x and 2.x) and of
Stability-AI/generative-models (sgm: SDXL), which share the UNet and the VAE. The text encoder of
SD 1.x and the first of SDXL lie there as transformers names them; that of SD 2.x and the second of
SDXL as OpenCLIP names them, with query, key and value in one tensor. Pure functions of names; the
component's own prefix in the file (`model.diffusion_model.` …) is added by `places` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_scripts.models.kinds import CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIP_XL, UNET, VAE, Family

_UNET_ENDS: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION: Mapping[str, str] = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP: Mapping[str, str] = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER: Mapping[str, str] = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PREFIXES: Mapping[Family, Mapping[str, str]] = {
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": CLIP},
    "sd2": {"unet": UNET, "vae": VAE, "text_encoder": OPEN_CLIP},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": CLIP_XL,
        "text_encoder_2": OPEN_CLIP_XL,
    },
}
_PROJECTION = "text_projection.weight"
TEXT_LEVEL = "text_model."
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+?)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+?)\.(\d+)\.(.+)"
)
_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """What a module's tensor is in the file.

    Attributes:
        name: The tensor's name in the file.
        third: Which third of its rows (0 query, 1 key, 2 value), or None for the whole tensor.
        transposed: Whether rows and columns are the other way round there.
    """

    name: str
    third: int | None = None
    transposed: bool = False


def places(
    family: Family, part: str, names: Iterable[str], config: Mapping[str, Any], level: str
) -> dict[str, Source]:
    """Where a checkpoint of the family holds each tensor of a part.

    Args:
        family: Of the checkpoint.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        names: The tensors' names in the module.
        config: The module's config; text encoders need none.
        level: As for `clip`; the real files have `TEXT_LEVEL`.

    Raises:
        ValueError: if the original layout has no such tensor.
    """

    def place(name: str) -> Source:
        match part, family:
            case "unet", _:
                return unet(name, config)
            case "vae", _:
                return vae(name, config)
            case "text_encoder", "sd1" | "sdxl":
                return clip(name, level)
            case _:
                return open_clip(name)

    prefix = PREFIXES[family][part]
    found = {name: place(name) for name in names}
    return {name: replace(source, name=prefix + source.name) for name, source in found.items()}


def unet_path(path: str, config: Mapping[str, Any]) -> str:
    """The original path of a layer of a `UNet2DConditionModel` of this config.

    For example `down_blocks.1.attentions.0.proj_in` is `input_blocks.4.1.proj_in` with two layers
    in each block.

    Raises:
        ValueError: if the original UNet has no such layer.
    """
    if path in _UNET_ENDS:
        return _UNET_ENDS[path]
    match = _BLOCK.fullmatch(path)
    if match is None:
        raise ValueError(f"the original UNet has no layer like {path}")
    side, kind, tail = match[1], match[3], match[5]
    layers = config["layers_per_block"]
    block, number = int(match[2] or 0), int(match[4])
    first = block * (layers + 1)
    if kind == "resnets":
        if tail not in _UNET_RESNET:
            raise ValueError(f"the original UNet has no layer like {path}")
        tail = _UNET_RESNET[tail]
    match side, kind:
        case "mid", "resnets":
            return f"middle_block.{2 * number}.{tail}"
        case "mid", "attentions":
            return f"middle_block.1.{tail}"
        case "down", "resnets":
            return f"input_blocks.{1 + first + number}.0.{tail}"
        case "down", "attentions":
            return f"input_blocks.{1 + first + number}.1.{tail}"
        case "down", "downsamplers":
            return f"input_blocks.{1 + first + layers}.0.op"
        case "up", "resnets":
            return f"output_blocks.{first + number}.0.{tail}"
        case "up", "attentions":
            return f"output_blocks.{first + number}.1.{tail}"
        case "up", "upsamplers":
            slot = 2 if "CrossAttn" in config["up_block_types"][block] else 1
            return f"output_blocks.{first + layers}.{slot}.conv"
    raise ValueError(f"the original UNet has no layer like {path}")


def vae_path(path: str, config: Mapping[str, Any]) -> str:
    """The original path of a layer of an `AutoencoderKL` of this config.

    The decoder's levels are numbered from the picture there, from the latents in diffusers.

    Raises:
        ValueError: if the original VAE has no such layer.
    """
    match = _VAE_BLOCK.fullmatch(path)
    if match is None:
        return path.replace("conv_norm_out", "norm_out")
    side, where, kind, number, tail = match[1], match[2], match[4], int(match[5]), match[6]
    block = int(match[3] or 0)
    level = len(config["block_out_channels"]) - 1 - block if where == "up" else block
    tail = tail.replace("conv_shortcut", "nin_shortcut")
    match where, kind:
        case "mid", "resnets":
            return f"{side}.mid.block_{number + 1}.{tail}"
        case "mid", "attentions":
            return f"{side}.mid.attn_1.{_VAE_ATTENTION[tail]}"
        case _, "resnets":
            return f"{side}.{where}.{level}.block.{number}.{tail}"
        case _, "downsamplers" | "upsamplers":
            return f"{side}.{where}.{level}.{kind.removesuffix('rs')}.conv"
    raise ValueError(f"the original VAE has no layer like {path}")


def unet(name: str, config: Mapping[str, Any]) -> Source:
    """Where a tensor of a `UNet2DConditionModel` lies."""
    path, leaf = name.rsplit(".", 1)
    return Source(f"{unet_path(path, config)}.{leaf}")


def vae(name: str, config: Mapping[str, Any]) -> Source:
    """Where a tensor of an `AutoencoderKL` lies. Its linear layers are 1×1 convolutions there."""
    path, leaf = name.rsplit(".", 1)
    return Source(f"{vae_path(path, config)}.{leaf}")


def clip(name: str, level: str = TEXT_LEVEL) -> Source:
    """Where a tensor of a `CLIPTextModel` lies in a file with transformers' names.

    `level` is what that class has lost since transformers 5.6; files of old merges lack it, too.
    """
    return Source(level + name.removeprefix("text_model."))


def open_clip(name: str) -> Source:
    """Where a tensor of a `CLIPTextModel`, or of one with a projection, lies in OpenCLIP's layout.

    Raises:
        ValueError: if OpenCLIP has no such tensor.
    """
    if name == _PROJECTION:
        return Source("text_projection", transposed=True)
    name = name.removeprefix("text_model.")
    if name in _OPEN_CLIP:
        return Source(_OPEN_CLIP[name])
    if match := _FUSED.fullmatch(name):
        layer, which, leaf = match.groups()
        fused = f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"
        return Source(fused, third="qkv".index(which))
    match = _TEXT_LAYER.fullmatch(name)
    if match is None or match[2] not in _OPEN_CLIP_LAYER:
        raise ValueError(f"OpenCLIP's text encoder has no tensor like {name}")
    return Source(f"transformer.resblocks.{match[1]}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}")
