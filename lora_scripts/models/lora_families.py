"""Which family of models a LoRA file is for, told without a model: by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from lora_scripts.models import lora_names, skeleton
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.kinds import Family

FAMILY_NAMES: Mapping[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
}
LANGUAGE = "a language model"
_OTHER_SIZE = " by its header, but its layers are of another size"
_VERSIONS: Mapping[str, Family] = {  # ss_base_model_version, where the layers do not say
    "sd_v1": "sd1",
    "sd_v2": "sd2",
    "sd_v2_v": "sd2",
    "sdxl_base_v1-0": "sdxl",
}
# Families that are not trained here: a mark in a layer's name -> the family
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
)


def family_of(header: Mapping[str, TensorInfo]) -> Family | None:
    """The family whose layers, at their published sizes, are those of a LoRA file."""
    return next((name for name in skeleton.FAMILIES
                 if lora_names.fits(header, skeleton.of(name))), None)  # fmt: skip


def recognise(header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """What a LoRA file is for, in words; None if nothing tells."""
    if (name := family_of(header)) is not None:
        return FAMILY_NAMES[name]
    for mark, family in _OTHERS:
        if any(mark in tensor for tensor in header):
            return family
    version = _VERSIONS.get(metadata.get("ss_base_model_version", ""))
    return None if version is None else f"{FAMILY_NAMES[version]}{_OTHER_SIZE}"
