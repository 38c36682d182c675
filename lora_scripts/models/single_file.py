"""Stable Diffusion 1.x, 2.x and XL from one .safetensors file in the original layout, offline.

Every tensor of the file is either loaded or of a kind that is set aside; anything else is an error.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
)

from lora_scripts.errors import user_error
from lora_scripts.models import shapes
from lora_scripts.models.filling import check, fill, some, weights
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.kinds import OPEN_CLIP
from lora_scripts.models.original_names import PREFIXES, TEXT_LEVEL, Source, places
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


class Checkpoint:
    """An SD 1.x, 2.x or XL checkpoint in the original layout, read part by part, offline.

    Of a file that holds both, the weights proper (`model.diffusion_model.*`) are taken and the EMA
    copies (`model_ema.*`) are set aside, as AUTOMATIC1111 and diffusers do; the log says how many.
    """

    def __init__(self, found: Signature) -> None:
        """`found`: of a .safetensors file.

        Raises:
            UserError: The file lacks tensors, holds unknown ones, or ones of a wrong shape, type or
                noise schedule.
        """
        self.found = found
        header = read_header(found.path)
        kept = _kept(found, header)
        for kind, count in Counter(set_aside(found, header).values()).items():
            logger.info("%s: %d tensors set aside (%s)", found.path.name, count, kind)
        self._modules = _empty_modules(found, kept)
        if "alphas_cumprod" in header and not found.marks.zero_snr:
            with safe_open(found.path, framework="pt") as file:
                _check_schedule(found, file.get_tensor("alphas_cumprod"))
        self._where: dict[str, Mapping[str, Source]] = {}
        for part, module in self._modules.items():
            prefix = PREFIXES[found.family][part]
            own = {name: info for name, info in kept.items() if name.startswith(prefix)}
            level = TEXT_LEVEL if any(n.startswith(prefix + TEXT_LEVEL) for n in own) else ""
            config = {} if part.startswith("text") else module.config
            self._where[part] = places(found.family, part, module.state_dict(), config, level)
            what = f"{NAMES[found.family]}'s {type(module).__name__}"
            check(found.path, module, own, self._where[part], what)

    def part(self, name: str, dtype: torch.dtype) -> Any:
        """A component with its weights as `dtype`, on the CPU; nothing in it refers to the file."""
        fill(self._modules[name], self.found.path, self._where[name], dtype)
        return self._modules[name]

    def config(self, name: str) -> Mapping[str, Any]:
        """The config of a component."""
        config: Mapping[str, Any] = self._modules[name].config
        return config

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The weights of a component once more, in float32."""
        like = self._modules[name].state_dict()
        return weights(self.found.path, self._where[name], like, torch.float32)

    def others(self) -> dict[str, Any]:
        """Tokenizers, and the family's scheduler, set to what the file's marks say."""
        tokenizers = {"tokenizer": clip_tokenizer(ZERO if self.found.family == "sd2" else END)}
        if self.found.family == "sdxl":
            tokenizers["tokenizer_2"] = clip_tokenizer(ZERO)
        return {**tokenizers, "scheduler": _scheduler(self.found)}


def _scheduler(found: Signature) -> SchedulerMixin:
    config = packaged_config(found.family, "scheduler")
    if found.marks.prediction is not None:
        config["prediction_type"] = found.marks.prediction
    return _SCHEDULERS[config["_class_name"]].from_config(config)


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
