"""Captions by BLIP: a short sentence, learned from pictures of the web."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from lora_scripts.label.generation import arguments, compute_on, open_model, tensors
from lora_scripts.label.processors import open_processor
from lora_scripts.label.settings import Caption, Settings

MAX_NEW_TOKENS = 50


def load(path: Path, settings: Settings, device: str) -> Caption:
    """BLIP with the weights of a folder; `settings.prompt` is what every caption begins with.

    Raises:
        UserError: The folder is no whole BLIP for captions, or the device is not there.
    """
    compute = compute_on(device)
    processor = open_processor(BlipProcessor, path)
    model = open_model(BlipForConditionalGeneration, path, compute)

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        beginning = None if settings.prompt is None else [settings.prompt] * len(pictures)
        inputs = processor(images=list(pictures), text=beginning, return_tensors="pt")
        told = arguments(settings, pictures, max_new_tokens=MAX_NEW_TOKENS)
        with torch.inference_mode():
            tokens_BT = model.generate(**tensors(inputs, compute), **told)
        return [
            text.strip() for text in processor.batch_decode(tokens_BT, skip_special_tokens=True)
        ]

    return caption
