"""What every family does with its modules: read them from a folder, hash them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTokenizer

from lora_scripts.models import filling, foreign
from lora_scripts.models.header import read_header
from lora_scripts.models.json_file import read_model_config
from lora_scripts.models.original_names import TEXT_LEVEL, Source
from lora_scripts.models.signature import weight_files


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


def read_unet(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """As `read_part`, but of the files only a little lies in memory beside what is made of them.

    Left to diffusers' own reader are files that hold `dtype` already, as it takes their pages for
    the weights, and files that are not laid out as the class writes them today.
    """
    with foreign.reading(folder, "this part of the model"), torch.device("meta"):
        module = cls.from_config(read_model_config(folder / "config.json"))
    held = [read_header(file) for file in weight_files(folder, variant)]
    types = {filling.STORED.get(info.dtype) for header in held for info in header.values()}
    names = [name for header in held for name in header]
    is_plain = (
        types != {dtype}
        and sorted(names) == sorted(module.state_dict())
        and not any(True for _ in module.buffers())  # which files need not have
        and "quantization_config" not in module.config
    )
    tensors = plain_tensors(folder, variant, module.state_dict(), dtype) if is_plain else None
    if tensors is None:
        return read_part(cls, folder, variant, dtype)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def plain_tensors(
    folder: Path, variant: str | None, like: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """A part's tensors from its files, a piece at a time; None if these have not each once.

    Args:
        folder: The part's.
        variant: Of the files.
        like: Tensors by name of the shapes wanted; may be on the meta device.
        dtype: What the tensors become.
    """
    places: dict[Path, dict[str, Source]] = {}
    found = {}
    for file in weight_files(folder, variant):
        for name, info in read_header(file).items():
            own = name if name in like else name.removeprefix(TEXT_LEVEL)
            if own in found:
                return None  # which file counts is known to the library alone
            if own in like and info.dtype in filling.STORED:
                found[own] = info.shape
                places.setdefault(file, {})[own] = Source(name)
    if found != {name: tuple(tensor.shape) for name, tensor in like.items()}:
        return None
    tensors: dict[str, torch.Tensor] = {}
    for file, where in places.items():
        tensors |= filling.weights(file, where, like, dtype)
    return tensors


def read_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A text encoder's tokenizer.

    Raises:
        UserError: if its files cannot be read.
    """
    with foreign.reading(folder, "the tokenizer"):
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    foreign.check_vocabulary(folder, found)
    return found


def content_digest(module: nn.Module) -> Any:
    """SHA-256 over a module's tensors and their names, to go on with (a `hashlib` object)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def content_id(module: nn.Module) -> str:
    """The digest in hexadecimal: same id, same weights."""
    found: str = content_digest(module).hexdigest()
    return found
