"""Captions by any chat model that sees: Qwen-VL, SmolVLM, LLaVA and the like, asked in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_scripts.errors import user_error
from lora_scripts.label.generation import arguments, compute_on, open_model, tensors
from lora_scripts.label.processors import open_processor
from lora_scripts.label.settings import Caption, Settings
from lora_scripts.models.json_file import read_json

MAX_NEW_TOKENS = 256
PROMPT = "Describe this image in one sentence."
# Larger pictures are made smaller: a photograph of 12 megapixels would be 16,000 tokens to some.
MAX_PIXELS = 1024 * 1024
# SmolVLM's own processor asks for num2words, for videos. It treats pictures as Idefics3's does.
_PROCESSORS = {"smolvlm": "Idefics3Processor"}


def load(path: Path, settings: Settings, device: str) -> Caption:
    """A chat model with the weights of a folder; `settings.prompt` is what it is asked to do.

    Raises:
        UserError: The model is none that transformers knows to talk about pictures, the folder is
            not whole, or the device is not there.
    """
    from transformers import AutoModelForImageTextToText

    compute = compute_on(device)
    processor = open_processor(processor_class(path), path)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    request = _request(processor, path, PROMPT if settings.prompt is None else settings.prompt)
    model = open_model(AutoModelForImageTextToText, path, compute)

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        inputs = processor(
            images=[[_smaller(picture)] for picture in pictures],
            text=[request] * len(pictures),
            padding=True,
            return_tensors="pt",
        )
        told = arguments(settings, pictures, max_new_tokens=MAX_NEW_TOKENS)
        with torch.inference_mode():
            tokens_BT = model.generate(**tensors(inputs, compute), **told)
        answers_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip()
            for text in processor.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
        ]

    return caption


def processor_class(path: Path) -> Any:
    """transformers' class of processor for the model in a folder.

    Raises:
        UserError: transformers knows none, or no such model that talks about pictures.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model_type = str(read_json(path / "config.json").get("model_type"))
    name = _PROCESSORS.get(model_type, PROCESSOR_MAPPING_NAMES.get(model_type))
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or name is None:
        what = (
            f"transformers {transformers.__version__} has no chat model for pictures of the type "
            f"{model_type!r}. Among those it has: qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, "
            "idefics3, llava, gemma3, internvl"
        )
        raise user_error(str(path), what)
    return getattr(transformers, name)


def _request(processor: Any, path: Path, prompt: str) -> str:
    """The conversation up to where the model answers, with a placeholder for the picture."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        what = (
            "there is no chat template beside the weights; take the model's -Instruct or chat kind"
        )
        raise user_error(str(path), what)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text: str = processor.apply_chat_template(
        [message], chat_template=template, add_generation_prompt=True
    )
    return text


def _smaller(picture: Image.Image) -> Image.Image:
    """The picture, or a copy of at most `MAX_PIXELS` with the same shape."""
    pixels = picture.width * picture.height
    if pixels <= MAX_PIXELS:
        return picture
    shrink = math.sqrt(MAX_PIXELS / pixels)
    size = (max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink)))
    return picture.resize(size, Image.Resampling.LANCZOS)
