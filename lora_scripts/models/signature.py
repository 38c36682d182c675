"""What a `base_model` is, told from its configs or from a file's header.

No tensor is read, no network is used and no heavy library is imported: a wrong base model is
answered in a fraction of a second. What cannot be taken is refused by name. A new family is one
more `case` in `_signature_of_file` and in `_signature_of_pipeline`, and in `kinds.py` what tells it
from the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_scripts.errors import user_error
from lora_scripts.models import kinds
from lora_scripts.models.header import TensorInfo, read_header, read_metadata
from lora_scripts.models.json_file import read_json
from lora_scripts.models.kinds import FULL, TAKES, Family, refuse
from lora_scripts.models.original_names import PREFIXES

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
# What a folder of each family must hold: the parts with weights, and the others.
_WEIGHTED: Mapping[Family, tuple[str, ...]] = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
_OTHERS: Mapping[Family, tuple[str, ...]] = {
    "sd1": ("tokenizer", "scheduler"),
    "sd2": ("tokenizer", "scheduler"),
    "sdxl": ("tokenizer", "tokenizer_2", "scheduler"),
}
_SPOKEN = {
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
NAMES: Mapping[Family, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
)
_PREDICTIONS: Mapping[str, Literal["epsilon", "v_prediction"]] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "velocity": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
# Headers that tell it, the plainest first: the model spec's own, ComfyUI's, and the architecture.
_TELLING = ("modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture")


@dataclass(frozen=True)
class Marks:
    """What a single file says of its predictions; None where it says nothing.

    Programs mark v-models by empty tensors `v_pred` and `ztsnr` (NoobAI's files; ComfyUI and Forge
    go by them), or in the header, by the Stability AI model spec or ComfyUI's `predict_key`.

    Attributes:
        prediction: What the UNet predicts.
        zero_snr: True if the noise schedule ends in pure noise.
        source: The tensor or the line of the header that says so, in words.
    """

    prediction: Literal["epsilon", "v_prediction"] | None = None
    zero_snr: bool | None = None
    source: str = "the file"


@dataclass(frozen=True)
class Signature:
    """What a base model is.

    Attributes:
        path: The file or folder looked at.
        family: The image family.
        layout: "diffusers" for a folder, "ldm" for a single file in the original layout (LDM's or,
            for SDXL, sgm's).
        cross_attention_dim: Width of the text states that the UNet takes: 768 for the real SD 1.x,
            1024 for SD 2.x, 2048 for SDXL.
        ema: How many tensors of EMA copies a file carries beside its weights (0 for a folder).
        variant: The `variant` that `from_pretrained` needs for the folder's files, e.g. "fp16".
        marks: What a file says of its predictions (nothing for a folder: its scheduler says it).
    """

    path: Path
    family: Family
    layout: Literal["diffusers", "ldm"]
    cross_attention_dim: int
    ema: int = 0
    variant: str | None = None
    marks: Marks = Marks()


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


# --- one file -------------------------------------------------------------------------------------


def _signature_of_file(path: Path) -> Signature:
    refuse_pickle(path, "base_model")
    tensors = read_header(path)
    match kinds.kind_of_file(tensors):
        case "sd1" | "sd2" | "sdxl" as family:
            return _checkpoint(path, family, tensors)
        case "unknown":
            names = ", ".join(sorted(tensors)[:3]) or "no tensors at all"
            refuse(path, "unknown", f" (it holds {len(tensors)} tensors: {names} …)")
        case kind:
            refuse(path, kind)


def refuse_pickle(path: Path, key: str) -> None:
    """Say why a pickle is not opened, and how to make a .safetensors file of it for this key.

    Raises:
        UserError: if the file's name is that of a pickle.
    """
    suffix = path.suffix.lower()
    if suffix not in PICKLES:
        return
    raise user_error(
        str(path),
        f"a {suffix} file is a Python pickle: opening one can run any code that somebody put "
        "into it, so it is never opened here. Open it once in a program you trust and save it "
        "as .safetensors (AUTOMATIC1111: Checkpoint Merger, one model, safetensors), or make a "
        "folder of it with diffusers: "
        f"StableDiffusionPipeline.from_single_file({path.name!r}).save_pretrained({path.stem!r})"
        f"; then name the new file or folder as {key}",
    )


def _checkpoint(path: Path, family: Family, tensors: Mapping[str, TensorInfo]) -> Signature:
    missing = [
        f"{_SPOKEN[part]} (nothing under {prefix}*)"
        for part, prefix in PREFIXES[family].items()
        if part in _SPOKEN and not any(name.startswith(prefix) for name in tensors)
    ]
    if missing:
        raise user_error(
            str(path), f"this {NAMES[family]} file holds no {' and no '.join(missing)}; {FULL}"
        )
    width = kinds.context_width(tensors)
    assert width is not None
    ema = sum(name.startswith("model_ema.") for name in tensors)
    marks = _marks(tensors, read_metadata(path))
    return Signature(path, family, "ldm", width, ema=ema, marks=marks)


def _marks(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Marks:
    """The marker tensors before the header: other programs act by them."""
    zero_snr = True if "ztsnr" in tensors else None
    if "v_pred" in tensors:
        return Marks("v_prediction", zero_snr, "the file's tensor v_pred")
    for key in _TELLING:
        prediction = _PREDICTIONS.get(metadata.get(key, ""))
        if prediction is not None:
            return Marks(prediction, zero_snr, f"{key} in the file's header")
    return Marks(None, zero_snr, "the file's tensor ztsnr" if zero_snr else "the file")


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
        refuse(path, "text-model", f" or another transformers model ({', '.join(classes)})")
    files = sorted(file.name for file in path.glob("*.safetensors"))
    advice = f"; to use a file in it, name the file: {path / files[0]}" if files else ""
    raise user_error(str(path), f"this folder has no model_index.json{advice}. {TAKES}")


def _signature_of_pipeline(path: Path) -> Signature:
    index = read_json(path / "model_index.json")
    name = str(index.get("_class_name"))
    unet = read_json(path / "unet" / "config.json") if (path / "unet").is_dir() else {}
    match kinds.kind_of_pipeline(name, unet):
        case "sd1" | "sd2" | "sdxl" as family:
            parts = (*_WEIGHTED[family], *_OTHERS[family])
            missing = [part for part in parts if not (path / part).is_dir()]
            if missing:
                raise user_error(str(path), f"it lacks {', '.join(missing)}; fetch it whole")
            width = int(unet["cross_attention_dim"])
            variant = variant_of(path, _WEIGHTED[family])
            return Signature(path, family, "diffusers", width, variant=variant)
        case "unknown":
            raise user_error(str(path), f"this is a diffusers folder of the class {name}. {TAKES}")
        case kind:
            refuse(path, kind)


def variant_of(path: Path, parts: tuple[str, ...]) -> str | None:
    """The one `variant` under which every part has whole .safetensors weights (None: no suffix).

    Raises:
        UserError: if a part has none, or the parts have no variant in common.
    """
    found: dict[str, set[str | None]] = {}
    for part in parts:
        files = {file: _WEIGHTS.fullmatch(file.name) for file in (path / part).iterdir()}
        weights = {file: match["variant"] for file, match in files.items() if match}
        if not weights:
            pickled = sorted(file.name for file in files if file.suffix in PICKLES)
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


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """The .safetensors files that hold a part's weights under a variant, else those without."""
    files = {file: _WEIGHTS.fullmatch(file.name) for file in sorted(part.iterdir())}
    found = {file: match["variant"] for file, match in files.items() if match}
    wanted = [file for file, variants in found.items() if variants == variant]
    return wanted or [file for file, variants in found.items() if variants is None]
