"""LoRA files: written, read back, checked.

For images one layout serves diffusers, AUTOMATIC1111 and ComfyUI. It stands under two names, with
the same bytes: `pytorch_lora_weights.safetensors`, which diffusers looks for, and
`NAME.safetensors`, the name typed in a prompt, `<lora:NAME:0.8>`. DoRA is the exception: diffusers
drops `.dora_scale`, so its file is then in its own layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lora_scripts import tensor_files
from lora_scripts.errors import WorkError
from lora_scripts.export import keys
from lora_scripts.files import replace, sync
from lora_scripts.models.lora_file import ADAPTER_METADATA
from lora_scripts.run_files import DIFFUSERS_NAME

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_lora(
    path: Path,
    adapters: keys.Adapters,
    name: keys.Namer,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write one LoRA file in the WebUI's layout; see `write_tensors`."""
    write_tensors(path, keys.webui(adapters, name, dtype), metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file atomically, then read it back and compare every tensor.

    Raises:
        WorkError: if a value does not fit its dtype or the file does not hold what was written.
    """
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"{path}: {key} holds values that are not finite in {tensor.dtype}")
    temporary = path.with_name(f"{path.name}.tmp")
    tensor_files.save(temporary, tensors, {**metadata, "format": "pt"})
    sync(temporary)
    replace(temporary, path)
    verify(path, tensors)


def verify(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare a file with what should be in it: every key, shape, dtype, alpha and value.

    Raises:
        WorkError: naming the first differences.
    """
    with safe_open(path, framework="pt") as stored:
        found = set(stored.keys())
        differences = [f"{key} is missing" for key in sorted(set(expected) - found)]
        differences += [f"{key} is not expected" for key in sorted(found - set(expected))]
        for key in sorted(found & set(expected)):
            tensor = stored.get_tensor(key)
            if tensor.dtype != expected[key].dtype or not torch.equal(tensor, expected[key]):
                differences.append(f"{key} differs")
    if differences:
        raise WorkError(f"{path} is not what was written: {'; '.join(differences[:5])}")


def write_finished(
    folder: Path,
    output_name: str,
    adapters: keys.Adapters,
    name: keys.Namer,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[Path]:
    """The LoRA of a finished run under both its names. Returns the paths, diffusers' first.

    The same bytes twice; of a DoRA each in the layout that its readers know.
    """
    prompt_path = folder / f"{output_name}.safetensors"
    diffusers_path = folder / DIFFUSERS_NAME
    write_lora(prompt_path, adapters, name, dtype, metadata)
    if keys.is_dora(adapters):
        write_diffusers(diffusers_path, adapters, dtype, metadata)
        return [diffusers_path, prompt_path]
    temporary = folder / f"{DIFFUSERS_NAME}.tmp"
    shutil.copyfile(prompt_path, temporary)
    replace(temporary, diffusers_path)
    verify(diffusers_path, keys.webui(adapters, name, dtype))
    return [diffusers_path, prompt_path]


def write_diffusers(
    path: Path, adapters: keys.Adapters, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write one LoRA file in diffusers' own layout; see `write_tensors`."""
    settings = {ADAPTER_METADATA: keys.settings(adapters)}
    write_tensors(path, keys.diffusers(adapters, dtype), {**metadata, **settings})
