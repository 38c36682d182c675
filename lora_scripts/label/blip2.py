"""Captions or answers by BLIP-2: a language model (OPT or T5) that is shown pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from lora_scripts.errors import user_error
from lora_scripts.label.generation import arguments, compute_on, open_model, tensors
from lora_scripts.label.processors import open_processor
from lora_scripts.label.settings import Caption, Settings

MAX_NEW_TOKENS = 50


def load(path: Path, settings: Settings, device: str) -> Caption:
    """BLIP-2 with the weights of a folder.

    Without `settings.prompt` it captions; with one it goes on from it, as in `Question: what is
    the weather like? Answer:`. The prompt itself is not part of the caption.

    Raises:
        UserError: The folder is no whole BLIP-2, or the device is not there.
    """
    compute = compute_on(device)
    processor = open_processor(Blip2Processor, path)
    if processor.num_query_tokens is None:
        what = (
            "its processor_config.json has no num_query_tokens: the files are of 2023; fetch anew"
        )
        raise user_error(str(path), what)
    model = open_model(Blip2ForConditionalGeneration, path, compute)
    answers_alone = model.language_model.config.is_encoder_decoder

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        text = [settings.prompt or ""] * len(pictures)
        inputs = processor(images=list(pictures), text=text, return_tensors="pt")
        told = arguments(settings, pictures, max_new_tokens=MAX_NEW_TOKENS)
        with torch.inference_mode():
            tokens_BT = model.generate(**tensors(inputs, compute), **told)
        if not answers_alone:
            tokens_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in processor.batch_decode(tokens_BT, skip_special_tokens=True)
        ]

    return caption
