"""SD 1.x's configs and CLIP's tokenizer, from the files in `sd1/` and the shapes of a checkpoint.

Widths and depths come from the shapes. Three things do not show there and are those of SD 1.x:
8 heads in the UNet, 32 groups in the norms, text heads of 64 (one head for a text encoder narrower
than 64).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.signature import TEXT, UNET, VAE

Header = Mapping[str, TensorInfo]

_GROUPS = 32
_TEXT_HEAD = 64


def clip_tokenizer() -> CLIPTokenizer:
    """OpenAI's CLIP tokenizer: 49,408 tokens, 77 at most in a text, padded with <|endoftext|>."""
    packed = files("lora_scripts.models") / "sd1" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1:48895])]
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=77,
    )


def _byte_symbols() -> list[str]:
    """One visible character a byte: Latin-1's own where it is visible, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)
    return [chr(code) for code in (*visible, *range(0x100, 0x100 + hidden))]


def packaged_config(part: str) -> dict[str, Any]:
    """SD 1.5's config of one part: "unet", "vae", "text_encoder" or "scheduler".

    As published, but for the text encoder's special tokens, which are CLIP's true ids here (the
    published 0, 2 and 1 are wrong, and changed nothing that SD 1.x uses).
    """
    text = (files("lora_scripts.models") / "sd1" / f"{part}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def text_name(name: str) -> str:
    """The name of a text encoder's tensor in `CLIPTextModel`.

    That class has no `text_model.` level since transformers 5.6; files of old merges never had it.
    """
    return name.removeprefix(TEXT).removeprefix("text_model.")


def unet_config(path: Path, header: Header) -> dict[str, Any]:
    """SD 1.5's UNet config with the widths and depths of this file."""
    levels: list[list[tuple[int, bool]]] = [[]]  # each layer's width and whether it attends
    number = 1
    while any(name.startswith(f"{UNET}input_blocks.{number}.") for name in header):
        block = f"{UNET}input_blocks.{number}"
        if f"{block}.0.op.weight" in header:
            levels.append([])
        else:
            width = _shape(path, header, f"{block}.0.out_layers.3.weight")[0]
            levels[-1].append((width, f"{block}.1.norm.weight" in header))
        number += 1
    if not all(levels) or any(layers != [layers[0]] * len(levels[0]) for layers in levels):
        raise user_error(
            str(path), f"the UNet's levels are not built like SD 1.x's (width, attention: {levels})"
        )
    widths, attends = zip(*(layers[0] for layers in levels), strict=True)
    _check_groups(path, "UNet", widths)
    return packaged_config("unet") | {
        "in_channels": _shape(path, header, f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": _shape(path, header, f"{UNET}out.2.weight")[0],
        "block_out_channels": list(widths),
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "cross_attention_dim": _shape(
            path, header, f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        )[1],
    }


def vae_config(path: Path, header: Header) -> dict[str, Any]:
    """SD 1.5's VAE config with the widths and depths of this file."""
    encoder = f"{VAE}encoder"
    depth = _count(header, f"{encoder}.down.{{}}.block.0.conv1.weight")
    widths = [
        _shape(path, header, f"{encoder}.down.{level}.block.0.conv1.weight")[0]
        for level in range(max(depth, 1))
    ]
    _check_groups(path, "VAE", widths)
    return packaged_config("vae") | {
        "in_channels": _shape(path, header, f"{encoder}.conv_in.weight")[1],
        "out_channels": _shape(path, header, f"{VAE}decoder.conv_out.weight")[0],
        "latent_channels": _shape(path, header, f"{VAE}post_quant_conv.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": _count(header, f"{encoder}.down.0.block.{{}}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def text_config(path: Path, header: Header) -> dict[str, Any]:
    """CLIP-L's config with the widths and depths of this file."""
    names = {text_name(name): info for name, info in header.items() if name.startswith(TEXT)}
    vocabulary, width = _shape(path, names, "embeddings.token_embedding.weight")
    published = packaged_config("text_encoder")
    if vocabulary != published["vocab_size"]:
        raise user_error(
            str(path),
            f"the text encoder knows {vocabulary:,} tokens, CLIP's tokenizer has "
            f"{published['vocab_size']:,}; a single file carries no tokenizer of its own, so "
            "one with another vocabulary must come as a diffusers folder",
        )
    heads = max(1, width // _TEXT_HEAD)
    if width % heads:
        raise user_error(str(path), f"a text encoder {width} wide has no heads of {_TEXT_HEAD}")
    return published | {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": _shape(path, names, "encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": _shape(path, names, "embeddings.position_embedding.weight")[0],
        "num_hidden_layers": _count(names, "encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": heads,
    }


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


def _check_groups(path: Path, part: str, widths: tuple[int, ...] | list[int]) -> None:
    if any(width % _GROUPS for width in widths):
        raise user_error(
            str(path), f"the {part}'s widths {list(widths)} are not all multiples of {_GROUPS}"
        )
