"""What a `base_model` is, told from its configs or from a file's header.

No tensor is read, no network is used and no heavy library is imported: a wrong base model is
answered in a fraction of a second. What cannot be taken is refused by name. A new family is one
more `case` in `_signature_of_file` and in `_signature_of_pipeline`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.json_file import read_json

Family = Literal["sd1"]
Kind = Literal[
    "sd1",
    "sd1-inpainting",
    "sd1-instruct-pix2pix",
    "sd1-other-input",
    "sd2",
    "sdxl",
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
    "This version trains on Stable Diffusion 1.x: a diffusers folder (with model_index.json), or "
    "one .safetensors file in the original layout such as v1-5-pruned.safetensors"
)

_FULL = "name the full checkpoint that holds UNet, VAE and text encoder together"
# For every kind that is refused: what it is, and what helps ("" where only another model does).
_REFUSED: dict[Kind, tuple[str, str]] = {
    "sd1-inpainting": (
        "a Stable Diffusion inpainting model (a UNet with 9 input channels)",
        "",
    ),
    "sd1-instruct-pix2pix": ("an instruct-pix2pix model (a UNet with 8 input channels)", ""),
    "sd1-other-input": ("a Stable Diffusion 1.x variant (a UNet without 4 input channels)", ""),
    "sd2": ("a Stable Diffusion 2.x model", ""),
    "sdxl": ("a Stable Diffusion XL model", ""),
    "sdxl-refiner": ("a Stable Diffusion XL refiner", ""),
    "sd3": ("a Stable Diffusion 3 model", ""),
    "flux": ("a FLUX model", ""),
    "lora": ("a LoRA, not a base model", "name the checkpoint that it was trained on"),
    "controlnet": ("a ControlNet, not a base model", ""),
    "ema-only": ("a file with only EMA copies (model_ema.*) and no model.diffusion_model.*", _FULL),
    "vae": ("a VAE alone, not a base model", _FULL),
    "unet": ("a UNet alone, not a base model", f"{_FULL}, or the folder with model_index.json"),
    "text-encoder": ("a text encoder alone, not a base model", _FULL),
    "embedding": ("a textual-inversion embedding, not a base model", ""),
    "text-model": ("a language model", "for it set `task_type: text-generation`"),
    "unknown": ("a file of an unknown kind", ""),
}

_PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."
_PARTS = ("unet", "vae", "text_encoder")
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
)


@dataclass(frozen=True)
class Signature:
    """What a base model is.

    Attributes:
        path: The file or folder looked at.
        family: The image family.
        layout: "diffusers" for a folder, "ldm" for a single file in the original layout.
        cross_attention_dim: Width of the text states that the UNet takes (768 for the real SD 1.x).
        ema: How many tensors of EMA copies a file carries beside its weights (0 for a folder).
        variant: The `variant` that `from_pretrained` needs for the folder's files, e.g. "fp16".
    """

    path: Path
    family: Family
    layout: Literal["diffusers", "ldm"]
    cross_attention_dim: int
    ema: int = 0
    variant: str | None = None


def read_signature(path: Path) -> Signature:
    """Recognise a base model on disk.

    Args:
        path: A diffusers folder or a single .safetensors file.

    Raises:
        UserError: Nothing is there, or what is there cannot be taken; the message names what was
            found and what is taken.
    """
    if not path.exists():
        raise user_error(str(path), f"nothing is there. {TAKES}")
    return _signature_of_folder(path) if path.is_dir() else _signature_of_file(path)


def _refuse(path: Path, kind: Kind, detail: str = "") -> NoReturn:
    what, advice = _REFUSED[kind]
    raise user_error(str(path), f"this is {what}{detail}{'; ' if advice else ''}{advice}. {TAKES}")


# --- one file -------------------------------------------------------------------------------------


def _signature_of_file(path: Path) -> Signature:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise user_error(
            str(path),
            f"a {suffix} file is a Python pickle: opening one can run any code that somebody put "
            "into it, so it is never opened here. Open it once in a program you trust and save it "
            "as .safetensors (AUTOMATIC1111: Checkpoint Merger, one model, safetensors), or make a "
            "folder of it with diffusers: "
            f"StableDiffusionPipeline.from_single_file({path.name!r}).save_pretrained({path.stem!r})"
            "; then name the new file or folder as base_model",
        )
    tensors = read_header(path)
    match _kind_of_file(tensors):
        case "sd1":
            return _sd1_file(path, tensors)
        case "unknown":
            names = ", ".join(sorted(tensors)[:3]) or "no tensors at all"
            _refuse(path, "unknown", f" (it holds {len(tensors)} tensors: {names} …)")
        case kind:
            _refuse(path, kind)


def _kind_of_file(tensors: Mapping[str, TensorInfo]) -> Kind:
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
        return _kind_of_ldm(tensors)
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


def _kind_of_ldm(tensors: Mapping[str, TensorInfo]) -> Kind:
    """Families that share the LDM names: told by text width and encoder, by 1x1 convolutions."""
    context = _context_width(tensors)
    if context is None:
        return "unknown"
    if any(name.startswith((f"{UNET}label_emb.", "conditioner.")) for name in tensors):
        return "sdxl-refiner" if context == 1280 else "sd2" if context == 1024 else "sdxl"
    projections = [info for name, info in tensors.items() if name.endswith(".1.proj_in.weight")]
    linear = any(len(info.shape) == 2 for info in projections)
    if linear or any(name.startswith("cond_stage_model.model.") for name in tensors):
        return "sd2"
    shape = tensors[f"{UNET}input_blocks.0.0.weight"].shape
    match shape[1] if len(shape) == 4 else 0:
        case 4:
            return "sd1"
        case 9:
            return "sd1-inpainting"
        case 8:
            return "sd1-instruct-pix2pix"
        case _:
            return "sd1-other-input"


def _context_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    for name, info in tensors.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(info.shape) == 2:
            return info.shape[1]
    return None


def _sd1_file(path: Path, tensors: Mapping[str, TensorInfo]) -> Signature:
    parts = {"text encoder": TEXT, "VAE": VAE}
    missing = [
        f"{part} (nothing under {prefix}*)"
        for part, prefix in parts.items()
        if not any(name.startswith(prefix) for name in tensors)
    ]
    if missing:
        raise user_error(
            str(path),
            f"this SD 1.x file holds no {' and no '.join(missing)}; {_FULL}",
        )
    width = _context_width(tensors)
    assert width is not None
    ema = sum(name.startswith("model_ema.") for name in tensors)
    return Signature(path, "sd1", "ldm", width, ema=ema)


# --- a folder -------------------------------------------------------------------------------------


def _signature_of_folder(path: Path) -> Signature:
    if (path / "model_index.json").is_file():
        return _signature_of_pipeline(path)
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise user_error(
            str(path), f"this is a PEFT adapter, not a base model; its base is {base!r}. {TAKES}"
        )
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if "_class_name" in config:
            raise user_error(
                str(path),
                f"this is one part of a model ({config['_class_name']}); name the folder above it, "
                f"the one with model_index.json. {TAKES}",
            )
        classes = config.get("architectures") or [config.get("model_type", "of an unknown class")]
        _refuse(path, "text-model", f" or another transformers model ({', '.join(classes)})")
    files = sorted(file.name for file in path.glob("*.safetensors"))
    advice = f"; to use a file in it, name the file: {path / files[0]}" if files else ""
    raise user_error(str(path), f"this folder has no model_index.json{advice}. {TAKES}")


def _signature_of_pipeline(path: Path) -> Signature:
    index = read_json(path / "model_index.json")
    name = str(index.get("_class_name"))
    unet = read_json(path / "unet" / "config.json") if (path / "unet").is_dir() else {}
    match _kind_of_pipeline(name, unet):
        case "sd1":
            parts = (*_PARTS, "tokenizer", "scheduler")
            missing = [part for part in parts if not (path / part).is_dir()]
            if missing:
                raise user_error(str(path), f"it lacks {', '.join(missing)}; fetch it whole")
            width = int(unet["cross_attention_dim"])
            return Signature(path, "sd1", "diffusers", width, variant=_variant(path))
        case "unknown":
            raise user_error(str(path), f"this is a diffusers folder of the class {name}. {TAKES}")
        case kind:
            _refuse(path, kind)


def _kind_of_pipeline(name: str, unet: Mapping[str, Any]) -> Kind:
    if name.startswith("StableDiffusionXL") or unet.get("addition_embed_type") == "text_time":
        return "sdxl-refiner" if unet.get("cross_attention_dim") == 1280 else "sdxl"
    if name.startswith("StableDiffusion3"):
        return "sd3"
    if name.startswith("Flux"):
        return "flux"
    if name not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        named: dict[str, Kind] = {
            "StableDiffusionInpaintPipeline": "sd1-inpainting",
            "StableDiffusionInstructPix2PixPipeline": "sd1-instruct-pix2pix",
        }
        return named.get(name, "unknown")
    if unet.get("cross_attention_dim") == 1024 or unet.get("use_linear_projection"):
        return "sd2"
    if not isinstance(unet.get("cross_attention_dim"), int):
        return "unknown"
    match unet.get("in_channels", 4):
        case 4:
            return "sd1"
        case 9:
            return "sd1-inpainting"
        case 8:
            return "sd1-instruct-pix2pix"
        case _:
            return "sd1-other-input"


def _variant(path: Path) -> str | None:
    """The one `variant` under which every part has whole .safetensors weights (None: no suffix)."""
    found: dict[str, set[str | None]] = {}
    for part in _PARTS:
        files = {file: _WEIGHTS.fullmatch(file.name) for file in (path / part).iterdir()}
        weights = {file: match["variant"] for file, match in files.items() if match}
        if not weights:
            pickled = sorted(file.name for file in files if file.suffix in _PICKLES)
            reason = (
                f"only {pickled[0]}, a Python pickle, which can run any code and is never opened "
                "here; in a program you trust, load the folder with diffusers and save it again by "
                "save_pretrained(…), which writes .safetensors"
                if pickled
                else "no .safetensors weights; fetch the folder whole"
            )
            raise user_error(str(path / part), f"there is {reason}")
        for file in weights:
            read_header(file)
        found[part] = set(weights.values())
    if all(None in variants for variants in found.values()):
        return None
    common = set.intersection(*(v for v in found.values() if None not in v))
    if not common:
        raise user_error(str(path), f"the parts have no variant of weights in common: {found}")
    return sorted(variant for variant in common if variant is not None)[0]
