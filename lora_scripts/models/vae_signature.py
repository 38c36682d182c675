"""What the key `vae` names: a VAE in one of the layouts that people have, told without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_scripts.errors import user_error
from lora_scripts.models import kinds
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.json_file import read_json
from lora_scripts.models.signature import refuse_pickle, variant_of

TAKES = (
    "`vae` takes a diffusers VAE folder (with config.json and .safetensors weights), a diffusers "
    "model folder (its vae/ is used), a .safetensors file of a VAE, or a whole checkpoint"
)
_MARK = {"original": "encoder.down.0.block.0.conv1.weight",
         "renamed": "encoder.down_blocks.0.resnets.0.conv1.weight"}  # fmt: skip


@dataclass(frozen=True)
class VaeSignature:
    """Where a VAE lies.

    Attributes:
        path: The folder with the VAE's config.json, or the file.
        layout: "folder", or the names in the file: "original", or "renamed" as diffusers has them.
        prefix: What stands before the VAE's names in the file.
        variant: The `variant` of a folder's files, e.g. "fp16".
    """

    path: Path
    layout: Literal["folder", "original", "renamed"]
    prefix: str = ""
    variant: str | None = None


def read_vae(path: Path) -> VaeSignature:
    """Recognise a VAE on disk.

    Raises:
        UserError: Nothing is there, or what is there holds no VAE that can be taken.
    """
    if not path.exists():
        raise user_error(str(path), f"nothing is there. {TAKES}")
    return _in_folder(path) if path.is_dir() else _in_file(path)


def _in_folder(path: Path) -> VaeSignature:
    folder = path / "vae" if (path / "model_index.json").is_file() else path
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        advice = f"; to use a file in it, name the file: {path / files[0]}" if files else ""
        raise user_error(str(folder), f"there is no config.json of a VAE{advice}. {TAKES}")
    name = read_json(folder / "config.json").get("_class_name")
    if name != "AutoencoderKL":
        raise user_error(str(folder), f"its config.json is of the class {name}, no VAE. {TAKES}")
    return VaeSignature(folder, "folder", variant=variant_of(folder.parent, (folder.name,)))


def _in_file(path: Path) -> VaeSignature:
    refuse_pickle(path, "vae")
    tensors = read_header(path)
    for prefix in (kinds.VAE, ""):
        if prefix + _MARK["original"] in tensors:
            return VaeSignature(path, "original", prefix)
    if _MARK["renamed"] in tensors:
        return VaeSignature(path, "renamed")
    what = f"it holds no VAE's encoder ({_first(tensors)})"
    raise user_error(str(path), f"{what}. {TAKES}")


def _first(tensors: Mapping[str, TensorInfo]) -> str:
    names = ", ".join(sorted(tensors)[:3])
    return f"{len(tensors)} tensors: {names} …" if names else "no tensors at all"
