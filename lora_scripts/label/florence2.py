"""Captions by Florence-2 in three lengths, or the text in a picture, or its objects' names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from lora_scripts.errors import user_error
from lora_scripts.label.generation import arguments, compute_on, open_model, tensors
from lora_scripts.label.processors import open_processor
from lora_scripts.label.settings import Caption, Settings

MAX_NEW_TOKENS = 1024
TASK = "<DETAILED_CAPTION>"
# Those whose answer is a text, or places with names.
TASKS = (
    "<CAPTION>",
    "<DETAILED_CAPTION>",
    "<MORE_DETAILED_CAPTION>",
    "<OCR>",
    "<OD>",
    "<DENSE_REGION_CAPTION>",
)


def load(path: Path, settings: Settings, device: str) -> Caption:
    """Florence-2 with the weights of a folder; `settings.prompt` is one of `TASKS`.

    Raises:
        UserError: The folder is no whole Florence-2 of transformers' own layout, the prompt is none
            of the tasks, or the device is not there.
    """
    task = TASK if settings.prompt is None else settings.prompt
    if task not in TASKS:
        what = f"found {task!r}; Florence-2 knows fixed tasks only: {', '.join(TASKS)}"
        raise user_error("--prompt", what)
    compute = compute_on(device)
    processor = open_processor(Florence2Processor, path)
    model = open_model(Florence2ForConditionalGeneration, path, compute)

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        inputs = processor(images=list(pictures), text=[task] * len(pictures), return_tensors="pt")
        told = arguments(settings, pictures, max_new_tokens=MAX_NEW_TOKENS)
        with torch.inference_mode():
            tokens_BT = model.generate(**tensors(inputs, compute), **told)
        return [
            _answer(processor, tokens_T, task, picture.size)
            for tokens_T, picture in zip(tokens_BT, pictures, strict=True)
        ]

    return caption


def _answer(processor: Any, tokens_T: torch.Tensor, task: str, size: tuple[int, int]) -> str:
    """The text of an answer; of places with names the names, each once."""
    real_T = tokens_T[tokens_T != processor.tokenizer.pad_token_id]  # pads of a shorter answer
    text = processor.decode(real_T, skip_special_tokens=False)
    answer = processor.post_process_generation(text, task=task, image_size=size)[task]
    return answer if isinstance(answer, str) else ", ".join(dict.fromkeys(answer["labels"]))
