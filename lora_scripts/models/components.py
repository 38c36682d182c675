"""What every family does with its modules: read them from a folder, hash them, move them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTokenizer

from lora_scripts.models import foreign
from lora_scripts.models.json_file import read_model_config


def read_part(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """One component of a diffusers folder, of the class `cls`. No network, no pickle.

    Raises:
        UserError: if its config or weights are not what the class takes, or some are not there.
    """
    read_model_config(folder / "config.json")
    with foreign.reading(folder, "this part of the model"):
        module, found = cls.from_pretrained(
            str(folder),
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    foreign.refuse_missing(folder, found["missing_keys"])
    return module


def read_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A text encoder's tokenizer.

    Raises:
        UserError: if its files cannot be read.
    """
    with foreign.reading(folder, "the tokenizer"):
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    foreign.check_vocabulary(folder, found)
    return found


def content_id(module: nn.Module, *more: str) -> str:
    """SHA-256 over a module's tensors, their names and `more`: the key of what it produces."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for text in more:
        digest.update(text.encode("utf-8"))
    return digest.hexdigest()


@contextmanager
def visit(modules: Sequence[Any], device: torch.device) -> Iterator[None]:
    """The modules on the device within this context, each back where it was after it."""
    homes = [module.device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
