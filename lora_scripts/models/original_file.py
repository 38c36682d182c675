"""One checkpoint in the original layout, written from the modules of a model: for the WebUIs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_scripts import files, tensor_files
from lora_scripts.errors import user_error
from lora_scripts.models.header import read_header
from lora_scripts.models.kinds import UNET, Family
from lora_scripts.models.original_names import PREFIXES, TEXT_LEVEL, Source, places
from lora_scripts.models.signature import Signature, weight_files
from lora_scripts.models.single_file import EMA, VAE_LOSS, set_aside

# Float types of files that can hold a changed weight; from 8 bits it goes to 16.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float16,
    "F8_E5M2": torch.float16,
}
_MARKED = ("sd1", "sdxl")  # families whose v-models programs tell by marker tensors


def write_single_file(
    path: Path, parts: Mapping[str, Any], *, like: Signature, dtype: torch.dtype | None = None
) -> None:
    """Write a model as one .safetensors file in its family's original layout.

    What the base model's file holds beside the weights (position ids, noise schedule, CLIP's
    projection, the layer that SD 2.x does not use) is taken over; EMA copies are not, since they
    are not of these weights. A file made of a diffusers folder lacks them, as such files do; all
    programs read it. Says what the model predicts: in the header, and for SD 1.x and SDXL by the
    marker tensors `v_pred` and `ztsnr`.

    Args:
        path: A new file; the folder is there.
        parts: The family's modules under diffusers' names ("unet", "vae" …), without adapters, on
            any device, and "scheduler", set to what the model predicts.
        like: The base model that the modules come from.
        dtype: Of the modules' weights; None: of each as in the base model's files (16 bits for 8).

    Raises:
        UserError: if the file is there already.
        ValueError: if a module has adapters, or a tensor that the layout does not know.
    """
    if path.exists():
        raise user_error(str(path), "is there already and is not overwritten; name another file")
    zero_snr = bool(parts["scheduler"].config.get("rescale_betas_zero_snr", False))
    zero_snr = zero_snr or bool(like.marks.zero_snr)
    is_v = parts["scheduler"].config.prediction_type == "v_prediction"
    tensors = _taken_over(like)
    for part in PREFIXES[like.family]:
        tensors |= _original(like, part, parts[part], dtype)
    if is_v and like.family in _MARKED:
        tensors["v_pred"] = torch.zeros(0)
        if zero_snr:
            tensors["ztsnr"] = torch.zeros(0)
    temporary = path.with_name(f"{path.name}.tmp")
    tensor_files.save(temporary, tensors, _metadata(path, like.family, is_v=is_v))
    files.replace(temporary, path)


def _taken_over(like: Signature) -> dict[str, Tensor]:
    if like.layout == "diffusers":
        return {}
    aside = set_aside(like, read_header(like.path))
    with safe_open(like.path, framework="pt") as file:
        return {
            name: file.get_tensor(name).clone()
            for name, kind in aside.items()
            if kind not in (EMA, VAE_LOSS)
        }


def _original(
    like: Signature, part: str, module: Any, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A module's tensors under their original names. What need not change is not copied."""
    state = module.state_dict()
    if adapted := [name for name in state if ".base_layer." in name]:
        raise ValueError(f"{part} has adapters, as on {adapted[0]}; merge them first")
    config = {} if part.startswith("text") else module.config
    where = places(like.family, part, state, config, TEXT_LEVEL)
    stored = _stored_types(like, part, where)
    thirds: dict[str, list[str]] = {}
    tensors = {}
    for name, source in where.items():
        if source.third is not None:
            thirds.setdefault(source.name, [""] * 3)[source.third] = name
            continue
        tensor = state[name].T if source.transposed else state[name]
        if part == "vae" and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        tensors[source.name] = tensor
    for name, three in thirds.items():
        tensors[name] = torch.cat([state[third] for third in three])
    return {
        name: tensor.detach().to("cpu", dtype or stored[name]).contiguous()
        for name, tensor in tensors.items()
    }


def _stored_types(
    like: Signature, part: str, where: Mapping[str, Source]
) -> dict[str, torch.dtype]:
    """The type in which the base model's files hold each tensor, by original name.

    Of a folder the first tensor of a part stands for all of it.
    """
    names = {source.name for source in where.values()}
    if like.layout == "ldm":
        header = read_header(like.path)
        usual = header[f"{UNET}input_blocks.0.0.weight"]  # for names that old merges lack
        return {name: _TYPES[header.get(name, usual).dtype] for name in names}
    return dict.fromkeys(names, stored_dtype(like, part))


def stored_dtype(like: Signature, part: str) -> torch.dtype:
    """The type in which the base model's files hold a part (16 bits for 8)."""
    if like.layout == "ldm":
        prefix, file = PREFIXES[like.family][part], like.path
    else:
        prefix, file = "", weight_files(like.path / part, like.variant)[0]
    found = (info for name, info in read_header(file).items() if name.startswith(prefix))
    return next(_TYPES[info.dtype] for info in found if info.dtype in _TYPES)


def _metadata(path: Path, family: Family, *, is_v: bool) -> dict[str, str]:
    """The header by the Stability AI model spec 1.0."""
    match family:
        case "sd1":
            architecture = "stable-diffusion-v1"
        case "sd2":
            architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
        case "sdxl":
            architecture = "stable-diffusion-xl-v1-base"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }
