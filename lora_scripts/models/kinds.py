"""What a file or folder of weights is, told from names and shapes alone, and why it is refused.

No heavy library is imported. `UNET` and the other prefixes are those of a checkpoint in the
original layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo

Family = Literal["sd1", "sd2", "sdxl"]
Kind = Literal[
    "sd1",
    "sd2",
    "sdxl",
    "inpainting",
    "instruct-pix2pix",
    "depth",
    "other-input",
    "unclip",
    "edm",
    "sdxl-refiner",
    "sd3",
    "flux",
    "lora",
    "controlnet",
    "ema-only",
    "vae",
    "unet",
    "text-encoder",
    "embedding",
    "text-model",
    "unknown",
]

TAKES = (
    "This version trains on Stable Diffusion 1.x, 2.x and XL: a diffusers folder (with "
    "model_index.json), or one .safetensors file in the original layout such as "
    "v1-5-pruned.safetensors or sd_xl_base_1.0.safetensors"
)
FULL = "name the full checkpoint that holds UNet, VAE and text encoder together"
# For every kind that is refused: what it is, and what helps ("" where only another model does).
_REFUSED: Mapping[Kind, tuple[str, str]] = {
    "inpainting": ("a Stable Diffusion inpainting model (a UNet with 9 input channels)", ""),
    "instruct-pix2pix": ("an instruct-pix2pix model (a UNet with 8 input channels)", ""),
    "depth": ("a Stable Diffusion depth-to-image model (a UNet with 5 input channels)", ""),
    "other-input": ("a Stable Diffusion variant (a UNet without 4 input channels)", ""),
    "unclip": ("a Stable Diffusion unCLIP model, which takes a picture in place of a prompt", ""),
    "edm": (
        "a Stable Diffusion XL model with EDM's noise schedule (Playground 2.5, CosXL), which is "
        "another than SDXL's",
        "",
    ),
    "sdxl-refiner": ("a Stable Diffusion XL refiner", ""),
    "sd3": ("a Stable Diffusion 3 model", ""),
    "flux": ("a FLUX model", ""),
    "lora": ("a LoRA, not a base model", "name the checkpoint that it was trained on"),
    "controlnet": ("a ControlNet, not a base model", ""),
    "ema-only": ("a file with only EMA copies (model_ema.*) and no model.diffusion_model.*", FULL),
    "vae": ("a VAE alone, not a base model", FULL),
    "unet": ("a UNet alone, not a base model", f"{FULL}, or the folder with model_index.json"),
    "text-encoder": ("a text encoder alone, not a base model", FULL),
    "embedding": ("a textual-inversion embedding, not a base model", ""),
    "text-model": ("a language model", "for it set `task_type: text-generation`"),
    "unknown": ("a file of an unknown kind", ""),
}
_BY_CHANNELS: Mapping[int, Kind] = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # SD 1.x
OPEN_CLIP = "cond_stage_model.model."  # SD 2.x
CLIP_XL = "conditioner.embedders.0.transformer."  # SDXL's first
OPEN_CLIP_XL = "conditioner.embedders.1.model."  # SDXL's second
_OPEN_CLIP_REFINER = "conditioner.embedders.0.model."
_REFINER_WIDTH = 1280  # of the text states
_TAKEN_PIPELINES = ("StableDiffusion", "StableDiffusionXL")
_TAKEN_USES = ("Pipeline", "Img2ImgPipeline")


def refuse(path: Path, kind: Kind, detail: str = "") -> NoReturn:
    """Say what a file or folder is that is not taken.

    Raises:
        UserError: always.
    """
    what, advice = _REFUSED[kind]
    raise user_error(str(path), f"this is {what}{detail}{'; ' if advice else ''}{advice}. {TAKES}")


def kind_of_file(tensors: Mapping[str, TensorInfo]) -> Kind:
    """Told from names first, from shapes where the names are the same."""

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    def has(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    if starts("lora_unet_", "lora_te", "lycoris_") or has(
        ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora.down.", "lora.up.",
        "lora_linear_layer.", ".hada_w1_", ".lokr_w1",
    ):  # fmt: skip
        return "lora"
    if has("joint_blocks."):
        return "sd3"
    if starts("double_blocks.", f"{UNET}double_blocks.") or has("single_transformer_blocks."):
        return "flux"
    if f"{UNET}input_blocks.0.0.weight" in tensors:
        return _kind_of_checkpoint(tensors)
    if starts("model_ema.diffusion_model"):
        return "ema-only"
    if starts("control_model.", "controlnet_", "input_hint_block.", "zero_convs."):
        return "controlnet"
    if starts("model.layers.", "model.embed_tokens.", "transformer.h.", "lm_head."):
        return "text-model"
    if starts("input_blocks.0.0.", "down_blocks.0."):
        return "unet"
    if starts("encoder.conv_in.", "decoder.conv_in.", f"{VAE}decoder."):
        return "vae"
    if starts("text_model.encoder.", "encoder.layers.", "cond_stage_model.", "conditioner."):
        return "text-encoder"
    if starts("emb_params", "string_to_param", "clip_l", "clip_g"):
        return "embedding"
    return "unknown"


def _kind_of_checkpoint(tensors: Mapping[str, TensorInfo]) -> Kind:
    """Families that share the UNet's names: told by channels, text encoders and projections."""
    context = context_width(tensors)
    if context is None:
        return "unknown"
    shape = tensors[f"{UNET}input_blocks.0.0.weight"].shape
    channels = shape[1] if len(shape) == 4 else 0
    if channels != 4:
        return _BY_CHANNELS.get(channels, "other-input")

    def starts(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    if starts("conditioner.") or starts(f"{UNET}label_emb."):
        return _kind_of_sgm(tensors, context)
    projections = [info for name, info in tensors.items() if name.endswith(".1.proj_in.weight")]
    linear = any(len(info.shape) == 2 for info in projections)
    return "sd2" if linear or starts(OPEN_CLIP) else "sd1"


def _kind_of_sgm(tensors: Mapping[str, TensorInfo], context: int) -> Kind:
    """Of the models whose UNet is told more than a text: SDXL, its refiner, unCLIP."""
    if any(name.startswith("edm_") for name in tensors):
        return "edm"
    if any(name.startswith(("cond_stage_model.", "embedder.")) for name in tensors):
        return "unclip"
    refiner = any(name.startswith(_OPEN_CLIP_REFINER) for name in tensors)
    return "sdxl-refiner" if refiner or context == _REFINER_WIDTH else "sdxl"


def context_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Width of the text states that the UNet of a checkpoint takes, None if it takes none."""
    for name, info in tensors.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(info.shape) == 2:
            return info.shape[1]
    return None


def kind_of_pipeline(name: str, unet: Mapping[str, Any]) -> Kind:
    """Told from a diffusers folder: the pipeline's class, and the config of its UNet."""
    if name.startswith("StableDiffusion3"):
        return "sd3"
    if name.startswith("Flux"):
        return "flux"
    named: Mapping[str, Kind] = {
        "InpaintPipeline": "inpainting",
        "InstructPix2PixPipeline": "instruct-pix2pix",
    }
    for family in _TAKEN_PIPELINES:
        use = name.removeprefix(family)
        if name.startswith(family) and use in named:
            return named[use]
    width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    taken = {family + use for family in _TAKEN_PIPELINES for use in _TAKEN_USES}
    depth = name == "StableDiffusionDepth2ImgPipeline"
    if not (name in taken or depth) or not isinstance(width, int):
        return "unknown"
    if not isinstance(channels, int):
        return "other-input"
    if channels != 4:
        return _BY_CHANNELS.get(channels, "other-input")
    if name.startswith("StableDiffusionXL") or unet.get("addition_embed_type") == "text_time":
        return "sdxl-refiner" if width == _REFINER_WIDTH else "sdxl"
    return "sd2" if width == 1024 or unet.get("use_linear_projection") else "sd1"
