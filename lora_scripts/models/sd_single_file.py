"""Stable Diffusion 1.x from one .safetensors file in the original (LDM) layout, offline.

Every tensor of the file is either loaded or of a kind in `_SET_ASIDE`; anything else is an error.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from diffusers import AutoencoderKL, PNDMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_scripts.errors import user_error
from lora_scripts.models.header import read_header
from lora_scripts.models.sd1_configs import (
    Header,
    clip_tokenizer,
    packaged_config,
    text_config,
    text_name,
    unet_config,
    vae_config,
)
from lora_scripts.models.signature import TEXT, UNET, VAE, read_signature

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

_SCHEDULE = (
    "betas|logvar|(?:sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?"
    "alphas_cumprod(?:_prev)?|posterior_(?:variance|log_variance_clipped|mean_coef1|mean_coef2)"
)
# What a file may carry beside the weights, by kind.
_SET_ASIDE = {
    "EMA copies": re.compile(r"(?:first_stage_model\.)?model_ema\..+"),
    "position ids": re.compile(
        r"cond_stage_model\.transformer\.(?:text_model\.)?embeddings\.position_ids"
    ),
    "noise schedule": re.compile(_SCHEDULE),
    "CLIP's projection": re.compile(
        r"cond_stage_model\.(?:transformer\.)?(?:logit_scale|text_projection(?:\.weight)?)"
    ),
    "the VAE's training loss": re.compile(r"first_stage_model\.loss\..+"),
}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


class Parts(TypedDict):
    """The components of a Stable Diffusion pipeline, under diffusers' names."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin


def load_single_file(
    path: Path, dtype: torch.dtype, encoder_dtype: torch.dtype = torch.float32
) -> Parts:
    """Load an SD 1.x checkpoint in the original layout without the network.

    Of a file that holds both, the weights proper (`model.diffusion_model.*`) are taken and the EMA
    copies (`model_ema.*`) are set aside, as AUTOMATIC1111 and diffusers do; the log says how many.

    Args:
        path: A .safetensors file.
        dtype: What the UNet's weights become, converted straight from the file.
        encoder_dtype: The same for the VAE and the text encoder.

    Returns:
        The five components on the CPU, in evaluation mode; nothing in them refers to the file.

    Raises:
        UserError: The file is not an SD 1.x checkpoint (see `read_signature`), or it lacks tensors,
            holds unknown ones, or ones of a wrong shape, type or noise schedule.
    """
    read_signature(path)
    header = read_header(path)
    weights = _weights_of(path, header)
    scheduler = PNDMScheduler.from_config(packaged_config("scheduler"))
    unet_settings = unet_config(path, header)
    vae_settings = vae_config(path, header)
    text_settings = text_config(path, header)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_settings)
        vae = AutoencoderKL(**vae_settings)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings))
    # Buffers that are computed, not stored, were left on the meta device.
    positions = torch.arange(text_settings["max_position_embeddings"])
    text_encoder.embeddings.position_ids = positions[None]

    with safe_open(path, framework="pt") as file:
        if "alphas_cumprod" in header:
            _check_schedule(path, file.get_tensor("alphas_cumprod"), scheduler)

        def fill(
            module: nn.Module,
            prefix: str,
            convert: Callable[[Tensors], Tensors],
            dtype: torch.dtype,
        ) -> None:
            source = {name: file.get_tensor(name) for name in weights if name.startswith(prefix)}
            _fill(path, module, source, convert(source), dtype)

        fill(unet, UNET, lambda t: convert_ldm_unet_checkpoint(t, unet_settings), dtype)
        fill(vae, VAE, lambda t: convert_ldm_vae_checkpoint(t, vae_settings), encoder_dtype)
        fill(text_encoder, TEXT, _convert_text, encoder_dtype)
    return Parts(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
    )


def _weights_of(path: Path, header: Header) -> list[str]:
    """Names of the tensors to load; the others must be of a kind that may be set aside."""
    aside: Counter[str] = Counter()
    weights, unknown = [], []
    for name in header:
        kind = next((kind for kind, names in _SET_ASIDE.items() if names.fullmatch(name)), None)
        if kind is not None:
            aside[kind] += 1
        elif name.startswith((UNET, VAE, TEXT)):
            weights.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise user_error(
            str(path), f"holds {len(unknown)} tensors that no SD 1.x model has: {_some(unknown)}"
        )
    odd = [name for name in weights if header[name].dtype not in _FLOATS]
    if odd:
        types = sorted({header[name].dtype for name in odd})
        raise user_error(
            str(path), f"holds weights of the type {', '.join(types)}, not floats: {_some(odd)}"
        )
    for kind, count in aside.items():
        log.info("%s: %d tensors set aside (%s)", path.name, count, kind)
    return weights


def _convert_text(source: Tensors) -> Tensors:
    return {text_name(name): tensor for name, tensor in source.items()}


def _fill(
    path: Path, module: nn.Module, source: Tensors, converted: Tensors, dtype: torch.dtype
) -> None:
    """Give the module on the meta device its weights; each tensor is copied once, as `dtype`."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    used = {tensor.data_ptr() for name, tensor in converted.items() if name in expected}
    left = [name for name, tensor in source.items() if tensor.data_ptr() not in used]
    missing = [name for name in expected if name not in converted]
    wrong = [
        f"{name} {tuple(converted[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in converted and tuple(converted[name].shape) != shape
    ]
    problems = {"unknown": left, "missing (diffusers' names)": missing, "of a wrong shape": wrong}
    found = [
        f"{len(names)} tensors {what}: {_some(names)}" for what, names in problems.items() if names
    ]
    if found:
        kind = type(module).__name__
        raise user_error(str(path), f"does not fit SD 1.x's {kind}: {'; '.join(found)}")
    module.load_state_dict(
        {name: tensor.to(dtype, copy=True) for name, tensor in converted.items()}, assign=True
    )


def _check_schedule(path: Path, alphas_T: Tensor, scheduler: PNDMScheduler) -> None:
    """The file's own noise schedule, where it has one, must be the one that is trained on."""
    expected_T = scheduler.alphas_cumprod
    same = alphas_T.shape == expected_T.shape and torch.allclose(
        alphas_T.float(), expected_T.float(), atol=2e-3
    )
    if not same:
        raise user_error(
            str(path),
            "its noise schedule (alphas_cumprod) is not SD 1.x's; it cannot be trained on",
        )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
