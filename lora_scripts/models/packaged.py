"""What comes with the package in place of the hub: published configs and CLIP's tokenizer."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from typing import Any

from transformers import CLIPTokenizer

from lora_scripts.models.kinds import Family

END = "<|endoftext|>"
ZERO = "!"  # the token 0, with which OpenCLIP's tokenizer pads


def packaged_config(family: Family, part: str) -> dict[str, Any]:
    """The config of one part of SD 1.5, SD 2.1 (768 pixels) or SDXL base 1.0.

    As published, but for the text encoders' special tokens, which are CLIP's true ids here (the
    published 0, 2 and 1 are wrong, and changed nothing that is used), and for the projection of SD
    2's text encoder, which is not used.

    Args:
        family: Whose config.
        part: "unet", "vae", "text_encoder", "text_encoder_2" (SDXL) or "scheduler".
    """
    text = (files("lora_scripts.models") / family / f"{part}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """OpenAI's CLIP tokenizer: 49,408 tokens, 77 at most in a text, padded with `pad`.

    `pad`: END for SD 1.x and the first of SDXL, ZERO for SD 2.x and the second of SDXL. With ZERO a
    "!" in a prompt becomes 0, as with the tokenizers published for diffusers.
    """
    packed = files("lora_scripts.models") / "sd1" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1:48895])]
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        END,
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad,
        model_max_length=77,
    )


def _byte_symbols() -> list[str]:
    """One visible character a byte: Latin-1's own where it is visible, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)
    return [chr(code) for code in (*visible, *range(0x100, 0x100 + hidden))]
