"""Which family of models a LoRA file is for, told without a model: by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from lora_scripts.models import lora_layouts, lora_names, skeleton
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.kinds import Family

FAMILY_NAMES: Mapping[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
}
LANGUAGE = "a language model"
_BY_HEADER = " by its header"
_OTHER_SIZE = f"{_BY_HEADER}, but its layers are of another size"
_VERSIONS: Mapping[str, Family] = {  # ss_base_model_version, where the layers do not say
    "sd_v1": "sd1",
    "sd_v2": "sd2",
    "sd_v2_v": "sd2",
    "sdxl_base_v1-0": "sdxl",
}
# A mark in a layer's name -> the family; most of these are not trained here
_OTHERS = (
    ("double_blocks", "FLUX"),
    ("single_transformer_blocks", "FLUX"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("lora_te3", "Stable Diffusion 3 or FLUX"),
    ("transformer.transformer_blocks", "a diffusion transformer (Stable Diffusion 3, FLUX …)"),
    ("lora_transformer_", "a diffusion transformer (Stable Diffusion 3, FLUX …)"),
    ("lora_prior_unet", "Stable Cascade"),
    ("model.layers.", LANGUAGE),
    ("transformer.h.", LANGUAGE),
    ("transformer.encoder.layers.", LANGUAGE),
    ("lora_te2_", FAMILY_NAMES["sdxl"]),
    ("text_encoder_2.", FAMILY_NAMES["sdxl"]),
)


def family_of(header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Family | None:
    """The family whose layers, at their published sizes, a LoRA file has; else its header's."""
    return _by_layers(header) or _VERSIONS.get(metadata.get("ss_base_model_version", ""))


def recognise(header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """What a LoRA file is for, in words; None if nothing tells."""
    if (name := _by_layers(header)) is not None:
        return FAMILY_NAMES[name]
    for mark, family in _OTHERS:
        if any(mark in tensor for tensor in header):
            return family
    if (name := family_of(header, metadata)) is None:
        return None
    ending = _BY_HEADER if lora_layouts.sort(header).others else _OTHER_SIZE
    return f"{FAMILY_NAMES[name]}{ending}"


def _by_layers(header: Mapping[str, TensorInfo]) -> Family | None:
    return next((name for name in skeleton.FAMILIES
                 if lora_names.fits(header, skeleton.of(name))), None)  # fmt: skip
