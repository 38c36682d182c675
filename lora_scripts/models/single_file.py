"""Stable Diffusion 1.x, 2.x and XL from one .safetensors file in the original layout, offline.

Every tensor of the file is either loaded or of a kind that is set aside; anything else is an error.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lora_scripts.errors import user_error
from lora_scripts.models import shapes
from lora_scripts.models.filling import check, fill, some
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.kinds import OPEN_CLIP
from lora_scripts.models.original_names import PREFIXES, TEXT_LEVEL, places
from lora_scripts.models.packaged import END, ZERO, clip_tokenizer, packaged_config
from lora_scripts.models.signature import NAMES, Signature

logger = logging.getLogger(__name__)

Header = Mapping[str, TensorInfo]

_SCHEDULE = (
    r"denoiser\.sigmas|betas|logvar|(?:sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|"
    "sqrt_recipm1_)?alphas_cumprod(?:_prev)?|"
    "posterior_(?:variance|log_variance_clipped|mean_coef1|mean_coef2)"
)
_TEXT = r"(?:cond_stage_model|conditioner\.embedders\.[01])\."
EMA, VAE_LOSS = "EMA copies", "the VAE's training loss"
# What a file may carry beside the weights, by kind.
_SET_ASIDE = {
    EMA: re.compile(r"(?:first_stage_model\.)?model_ema\..+"),
    "position ids": re.compile(rf"{_TEXT}transformer\.(?:text_model\.)?embeddings\.position_ids"),
    "noise schedule": re.compile(_SCHEDULE),
    "marks of what it predicts": re.compile("v_pred|ztsnr"),
    "CLIP's projection": re.compile(
        rf"{_TEXT}(?:transformer\.|model\.)?logit_scale|"
        r"(?:cond_stage_model|conditioner\.embedders\.0)\."
        r"(?:transformer\.|model\.)?text_projection(?:\.weight)?"
    ),
    "OpenCLIP's mask": re.compile(rf"{_TEXT}model\.attn_mask"),
    VAE_LOSS: re.compile(r"first_stage_model\.loss\..+"),
}
_UNUSED = "the text encoder's last layer, which SD 2.x does not use"
_SCHEDULERS = {cls.__name__: cls for cls in (PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler)}
_BASE_SIZE = 64  # latent pixels of SD 2.0 base and 2.1 base, which predict ε


class Parts(TypedDict):
    """The components of a Stable Diffusion pipeline, under diffusers' names."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin


class PartsXL(TypedDict):
    """The components of a Stable Diffusion XL pipeline, under diffusers' names."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    scheduler: SchedulerMixin


def load(found: Signature, dtype: torch.dtype, encoder_dtype: torch.dtype = torch.float32) -> Parts:
    """Load an SD 1.x or 2.x checkpoint in the original layout without the network.

    Of a file that holds both, the weights proper (`model.diffusion_model.*`) are taken and the EMA
    copies (`model_ema.*`) are set aside, as AUTOMATIC1111 and diffusers do; the log says how many.

    Args:
        found: Of a .safetensors file.
        dtype: What the UNet's weights become, converted straight from the file.
        encoder_dtype: The same for the VAE and the text encoder.

    Returns:
        The five components on the CPU, in evaluation mode; nothing in them refers to the file. The
        scheduler is the family's, set to what the file's marks say.

    Raises:
        UserError: The file lacks tensors, holds unknown ones, or ones of a wrong shape, type or
            noise schedule.
    """
    modules = _load_modules(found, dtype, encoder_dtype)
    return Parts(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules["text_encoder"],
        tokenizer=clip_tokenizer(END if found.family == "sd1" else ZERO),
        scheduler=_scheduler(found),
    )


def load_xl(
    found: Signature, dtype: torch.dtype, encoder_dtype: torch.dtype = torch.float32
) -> PartsXL:
    """Load an SDXL checkpoint in the original layout: as `load`, with two text encoders."""
    modules = _load_modules(found, dtype, encoder_dtype)
    return PartsXL(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=clip_tokenizer(END),
        tokenizer_2=clip_tokenizer(ZERO),
        scheduler=_scheduler(found),
    )


def _scheduler(found: Signature) -> SchedulerMixin:
    config = packaged_config(found.family, "scheduler")
    if found.marks.prediction is not None:
        config["prediction_type"] = found.marks.prediction
    return _SCHEDULERS[config["_class_name"]].from_config(config)


def _load_modules(
    found: Signature, dtype: torch.dtype, encoder_dtype: torch.dtype
) -> dict[str, Any]:
    header = read_header(found.path)
    kept = _kept(found, header)
    for kind, count in Counter(set_aside(found, header).values()).items():
        logger.info("%s: %d tensors set aside (%s)", found.path.name, count, kind)
    modules = _empty_modules(found, kept)
    with safe_open(found.path, framework="pt") as file:
        if "alphas_cumprod" in header and not found.marks.zero_snr:
            _check_schedule(found, file.get_tensor("alphas_cumprod"))
        for part, module in modules.items():
            prefix = PREFIXES[found.family][part]
            own = {name: info for name, info in kept.items() if name.startswith(prefix)}
            level = TEXT_LEVEL if any(n.startswith(prefix + TEXT_LEVEL) for n in own) else ""
            config = {} if part.startswith("text") else module.config
            where = places(found.family, part, module.state_dict(), config, level)
            what = f"{NAMES[found.family]}'s {type(module).__name__}"
            check(found.path, module, own, where, what)
            fill(module, file, where, dtype if part == "unet" else encoder_dtype)
    return modules


def set_aside(found: Signature, header: Header) -> dict[str, str]:
    """The tensors of a checkpoint that are not loaded: name -> of which kind they are."""
    patterns = dict(_SET_ASIDE)
    if found.family == "sd2":
        own = shapes.without(header, OPEN_CLIP)
        if shapes.last_unused(own):
            last = shapes.open_clip_layers(own) - 1
            patterns[_UNUSED] = re.compile(rf"{OPEN_CLIP}transformer\.resblocks\.{last}\..+")
    return {
        name: kind for name in header for kind, names in patterns.items() if names.fullmatch(name)
    }


def _kept(found: Signature, header: Header) -> dict[str, TensorInfo]:
    """The tensors to load; the others must be of a kind that may be set aside."""
    aside = set_aside(found, header)
    kept = {name: info for name, info in header.items() if name not in aside}
    prefixes = tuple(PREFIXES[found.family].values())
    unknown = [name for name in kept if not name.startswith(prefixes)]
    if unknown:
        what = f"holds {len(unknown)} tensors that no {NAMES[found.family]} model has"
        raise user_error(str(found.path), f"{what}: {some(unknown)}")
    return kept


def empty_modules(found: Signature) -> dict[str, Any]:
    """A checkpoint's modules without weights (on the meta device), by the shapes in its header.

    Raises:
        UserError: if the file lacks tensors, or holds unknown ones.
    """
    return _empty_modules(found, _kept(found, read_header(found.path)))


def _empty_modules(found: Signature, kept: Header) -> dict[str, Any]:
    """The family's modules on the meta device, with the widths and depths of the file."""
    path, family = found.path, found.family
    own = {part: shapes.without(kept, prefix) for part, prefix in PREFIXES[family].items()}
    unet = shapes.unet_config(path, own["unet"], family)
    vae = shapes.vae_config(path, own["vae"], packaged_config(family, "vae"))
    if family == "sd2" and found.marks.prediction == "epsilon":
        unet["sample_size"] = _BASE_SIZE
    texts: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {}
    if family == "sd2":
        config = shapes.open_clip_config(path, own["text_encoder"], family)
        texts["text_encoder"] = (CLIPTextModel, config)
    else:
        names = {n.removeprefix(TEXT_LEVEL): info for n, info in own["text_encoder"].items()}
        texts["text_encoder"] = (CLIPTextModel, shapes.clip_config(path, names, family))
    if family == "sdxl":
        config = shapes.open_clip_config(path, own["text_encoder_2"], family)
        texts["text_encoder_2"] = (CLIPTextModelWithProjection, config)
        unet |= shapes.time_embedding(unet, config["projection_dim"])
    with torch.device("meta"):
        modules = {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae)}
        for part, (cls, config) in texts.items():
            modules[part] = cls(CLIPTextConfig(**config))
    # Buffers that are computed, not stored, were left on the meta device.
    for part, (_, config) in texts.items():
        inner = modules[part].text_model if part == "text_encoder_2" else modules[part]
        inner.embeddings.position_ids = torch.arange(config["max_position_embeddings"])[None]
    return {part: module.eval() for part, module in modules.items()}


def _check_schedule(found: Signature, alphas_T: Tensor) -> None:
    """The file's own noise schedule, where it has one, must be the one that is trained on."""
    expected_T = _scheduler(found).alphas_cumprod
    same = alphas_T.shape == expected_T.shape and torch.allclose(
        alphas_T.float(), expected_T.float(), atol=2e-3
    )
    if not same:
        what = (
            f"its noise schedule (alphas_cumprod) is not {NAMES[found.family]}'s; it cannot be "
            "trained on"
        )
        raise user_error(str(found.path), what)
