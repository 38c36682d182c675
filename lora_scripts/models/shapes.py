"""Configs of a checkpoint's parts: the published ones with the widths and depths of its shapes.

What does not show in shapes is that of the family: 32 groups in the norms, heads of 64 in text
encoders and in the UNets of SD 2.x and SDXL (one head where a layer is narrower), 8 heads in the
UNet of SD 1.x. All functions take the header without the component's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.kinds import Family
from lora_scripts.models.packaged import packaged_config

Header = Mapping[str, TensorInfo]

_GROUPS = 32
_HEAD = 64
_WHOLE_OPEN_CLIP_H = 24  # layers; SD 2.x takes the states before the last one
_SIZES_TOLD = 6  # numbers that SDXL's UNet is told of a picture's size and cut


def without(header: Header, prefix: str) -> dict[str, TensorInfo]:
    """The part of a header under a prefix, without the prefix."""
    return {
        name.removeprefix(prefix): info for name, info in header.items() if name.startswith(prefix)
    }


def unet_config(path: Path, header: Header, family: Family) -> dict[str, Any]:
    """The UNet's config. `path` is only named in errors, here and below.

    Raises:
        UserError: if levels are built otherwise than the family's, or a tensor is missing.
    """
    levels = _levels(path, header, family)
    widths, depths = zip(*(layers[0] for layers in levels), strict=True)
    _check_groups(path, "UNet", widths, _GROUPS)
    config = packaged_config(family, "unet") | {
        "in_channels": _shape(path, header, "input_blocks.0.0.weight")[1],
        "out_channels": _shape(path, header, "out.2.weight")[0],
        "block_out_channels": list(widths),
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths[::-1]],
        "cross_attention_dim": _shape(
            path, header, "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        )[1],
    }
    if family == "sd1":
        return config
    config["attention_head_dim"] = [_heads(path, "UNet", width) for width in widths]
    if family == "sd2":
        return config
    told = _shape(path, header, "label_emb.0.0.weight")[1]
    return config | {
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        "projection_class_embeddings_input_dim": told,
    }


def _levels(path: Path, header: Header, family: Family) -> list[list[tuple[int, int]]]:
    """For each level of the way down its layers, each as width and number of transformer blocks."""
    levels: list[list[tuple[int, int]]] = [[]]
    number = 1
    while any(name.startswith(f"input_blocks.{number}.") for name in header):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in header:
            levels.append([])
        else:
            width = _shape(path, header, f"{block}.0.out_layers.3.weight")[0]
            depth = _count(header, f"{block}.1.transformer_blocks.{{}}.norm1.weight")
            levels[-1].append((width, depth))
        number += 1
    if not all(levels) or any(layers != [layers[0]] * len(levels[0]) for layers in levels):
        what = f"the UNet's levels are not built like {family}'s (width, transformers: {levels})"
        raise user_error(str(path), what)
    return levels


def vae_config(
    path: Path, header: Header, base: Mapping[str, Any], *, renamed: bool = False
) -> dict[str, Any]:
    """The VAE's config: `base` with the widths and depths of the shapes.

    `renamed`: whether the header has diffusers' names rather than the original ones.

    Raises:
        UserError: if a tensor is missing or a width cannot be.
    """
    level, layer = "encoder.down.{}.block.0.conv1.weight", "encoder.down.0.block.{}.conv1.weight"
    if renamed:
        level = "encoder.down_blocks.{}.resnets.0.conv1.weight"
        layer = "encoder.down_blocks.0.resnets.{}.conv1.weight"
    depth = _count(header, level)
    widths = [_shape(path, header, level.format(number))[0] for number in range(max(depth, 1))]
    _check_groups(path, "VAE", widths, base["norm_num_groups"])
    return {
        **base,
        "in_channels": _shape(path, header, "encoder.conv_in.weight")[1],
        "out_channels": _shape(path, header, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(path, header, "decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": _count(header, layer),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def clip_config(path: Path, header: Header, family: Family) -> dict[str, Any]:
    """The config of a text encoder with transformers' names, `text_model.` taken off.

    Raises:
        UserError: if its vocabulary is not CLIP's, a tensor is missing or a width cannot be.
    """
    width = _text_width(path, header, "embeddings.token_embedding.weight")
    return packaged_config(family, "text_encoder") | {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": _shape(path, header, "encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": _shape(path, header, "embeddings.position_embedding.weight")[0],
        "num_hidden_layers": _count(header, "encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": _heads(path, "text encoder", width),
    }


def open_clip_config(path: Path, header: Header, family: Family) -> dict[str, Any]:
    """The config of a text encoder with OpenCLIP's names: SD 2.x's, or the second of SDXL.

    Raises:
        UserError: as `clip_config` does.
    """
    width = _text_width(path, header, "token_embedding.weight")
    layers = open_clip_layers(header)
    projection = width
    if family == "sdxl":
        projection = _shape(path, header, "text_projection")[1]
    part = "text_encoder_2" if family == "sdxl" else "text_encoder"
    return packaged_config(family, part) | {
        "hidden_size": width,
        "projection_dim": projection,
        "intermediate_size": _shape(path, header, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        "max_position_embeddings": _shape(path, header, "positional_embedding")[0],
        "num_hidden_layers": layers - 1 if family == "sd2" and last_unused(header) else layers,
        "num_attention_heads": _heads(path, "text encoder", width),
    }


def open_clip_layers(header: Header) -> int:
    """How many layers an OpenCLIP text encoder has in the file."""
    return _count(header, "transformer.resblocks.{}.mlp.c_fc.weight")


def last_unused(header: Header) -> bool:
    """Whether the last layer of SD 2.x's text encoder is one that the model does not use.

    The whole OpenCLIP ViT-H has 24 layers, of which SD 2.x takes 23. Files that went through
    diffusers, such as Waifu Diffusion 1.4's, lack the last layer and the projection.
    """
    return "text_projection" in header or open_clip_layers(header) == _WHOLE_OPEN_CLIP_H


def time_embedding(unet: Mapping[str, Any], pooled: int) -> dict[str, Any]:
    """How wide SDXL's UNet is told each of the sizes: what the pooled text leaves, in six parts."""
    told = unet["projection_class_embeddings_input_dim"] - pooled
    return {"addition_time_embed_dim": told // _SIZES_TOLD}


def _text_width(path: Path, header: Header, name: str) -> int:
    vocabulary, width = _shape(path, header, name)
    clips = packaged_config("sd1", "text_encoder")["vocab_size"]
    if vocabulary != clips:
        raise user_error(
            str(path),
            f"the text encoder knows {vocabulary:,} tokens, CLIP's tokenizer has {clips:,}; a "
            "single file carries no tokenizer of its own, so one with another vocabulary must "
            "come as a diffusers folder",
        )
    return width


def _heads(path: Path, part: str, width: int) -> int:
    heads = max(1, width // _HEAD)
    if width % heads:
        raise user_error(str(path), f"a {part} {width} wide has no heads of {_HEAD}")
    return heads


def _shape(path: Path, header: Header, name: str) -> tuple[int, ...]:
    if name not in header:
        raise user_error(str(path), f"the checkpoint is not whole: the tensor {name} is missing")
    return header[name].shape


def _count(header: Header, pattern: str) -> int:
    """How many of the names that `pattern` gives for 0, 1, 2 … are there without a gap."""
    number = 0
    while pattern.format(number) in header:
        number += 1
    return number


def _check_groups(path: Path, part: str, widths: Sequence[int], groups: int) -> None:
    if any(width % groups for width in widths):
        raise user_error(
            str(path), f"the {part}'s widths {list(widths)} are not all multiples of {groups}"
        )
