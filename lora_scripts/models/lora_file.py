"""LoRA files for images, of this and of other programs, read into adapters of a family's layers.

Names are looked up, never taken apart: for each layer of the loaded model all names are listed
under which the known programs write its adapter (see `names_of`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lora_scripts.errors import user_error
from lora_scripts.models import lora, lora_layouts, original_names, unet
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.json_file import read_json
from lora_scripts.models.lora import AdaptedLayer
from lora_scripts.models.lora_layouts import Module, Sorted
from lora_scripts.run_files import ADAPTER_NAME, DIFFUSERS_NAME

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's settings in a header
Place = tuple[str, str]  # component, path of a layer


class Named(Protocol):
    """What must be known of a model to read its LoRA files: a loaded family, or a skeleton."""

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        """The modules that a LoRA can sit on, by component."""

    def webui_name(self, component: str, path: str) -> str:
        """The name under which WebUI and ComfyUI look for the adapter of a layer."""

    def metadata(self) -> dict[str, str]:
        """The header fields by which programs recognise the family."""


def locate(path: Path) -> Path:
    """The file that is meant: itself, or that of a run's or PEFT's folder.

    Raises:
        UserError: if there is none.
    """
    if not path.is_dir():
        if path.is_file():
            return path
        raise user_error(str(path), "there is no such LoRA file")
    for name in (DIFFUSERS_NAME, ADAPTER_NAME):
        if (path / name).is_file():
            return path / name
    raise user_error(str(path), f"there is no {DIFFUSERS_NAME} in this folder; name the file")


def read(path: Path, family: Named) -> dict[str, list[AdaptedLayer]]:
    """The adapters in a LoRA file, by component of the family, in float32 on the CPU.

    Raises:
        UserError: if it is no LoRA of two matrices (LoHa, LoKr …), or does not fit the model.
    """
    file = locate(path)
    found = lora_layouts.sort(read_header(file))
    refuse_others(file, found)
    places = names_of(family)
    strangers = [name for name in found.modules if _bare(name) not in places]
    if strangers:
        raise user_error(str(file), _does_not_fit(strangers, len(found.modules), family))
    settings = Settings.of(file)
    adapters: dict[str, list[AdaptedLayer]] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for name, module in found.modules.items():
                component, layer = places[_bare(name)]
                shape = shape_of(family, component, layer)
                adapter = _adapter(file, stored, module, layer, shape, settings.of_layer(name))
                adapters.setdefault(component, []).append(adapter)
    except SafetensorError as error:
        raise user_error(str(file), f"cannot be read: {error}") from None
    return adapters


def shape_of(family: Named, component: str, path: str) -> tuple[int, ...]:
    """The shape of a layer's weight, whether it is adapted already or not."""
    layer: Any = family.adapted[component].get_submodule(path)
    weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
    return tuple(weight.shape)


def fits(path: Path, family: Named) -> bool:
    """Whether all layers of a LoRA file are in a model, of these shapes. Reads the header alone."""
    header = read_header(locate(path))
    modules = lora_layouts.sort(header).modules
    places = names_of(family)
    for name, module in modules.items():
        if _bare(name) not in places or not {"down", "up"} <= module.tensors.keys():
            return False
        shape = shape_of(family, *places[_bare(name)])
        down, up = (header[module.tensors[part]].shape for part in ("down", "up"))
        if (up[0], down[1]) != shape[:2] or (len(down) == len(shape) and down[1:] != shape[1:]):
            return False
    return bool(modules)


def put_on(family: ImageFamily, loras: Sequence[tuple[Path, float]]) -> None:
    """Let these LoRAs act together, each at its strength (1.0: as trained), and no others.

    Raises:
        UserError: if one is no LoRA or does not fit.
    """
    for module in family.adapted.values():
        for name in lora.names_on(module):
            lora.remove(module, name)
    files = {f"lora_{n}": (read(path, family), scale) for n, (path, scale) in enumerate(loras)}
    for component, module in family.adapted.items():
        for name, (found, _) in files.items():
            lora.put(module, name, found.get(component, ()))
        lora.set_strengths(module, {name: scale for name, (_, scale) in files.items()})


def refuse_others(file: Path, found: Sorted) -> None:
    """Only LoRAs of two matrices are read.

    Raises:
        UserError: naming what else is there.
    """
    if found.others:
        kinds = ", ".join(f"{kind}: {count} tensors" for kind, count in found.others.items())
        raise user_error(str(file), f"holds {kinds}; only LoRA, rsLoRA and DoRA are read")
    if found.unknown or not found.modules:
        names = ", ".join(found.unknown[:3]) or "no LoRA at all"
        raise user_error(str(file), f"is no LoRA file that is known here; it holds {names}")
    halves = [m.name for m in found.modules.values() if not {"down", "up"} <= m.tensors.keys()]
    if halves:
        raise user_error(str(file), f"lacks one of the two matrices of {halves[0]}")


def names_of(family: Named) -> dict[str, Place]:
    """Every name under which a program may write the adapter of a layer -> the layer.

    WebUI's names with diffusers' and with the original blocks; paths with and without the
    component in front; with and without the level `text_model` that transformers once had.
    """
    names: dict[str, Place] = {}
    for component, module in family.adapted.items():
        for path in unet.adaptable(component, module):
            place = (component, path)
            names[family.webui_name(component, path)] = place
            bare = path.removeprefix("text_model.")
            for each in {path, bare, f"text_model.{bare}"} if component != "unet" else {path}:
                names[f"{component}.{each}"] = place
            if component == "unet":
                names[path] = place
                config: Any = module.config
                original = original_names.unet_path(path, dict(config))
                names[f"lora_unet_{original.replace('.', '_')}"] = place
    return names


def _bare(name: str) -> str:
    """Without what PEFT puts in front of every name."""
    return name.removeprefix("base_model.model.")


def _adapter(
    file: Path, stored: Any, module: Module, path: str, shape: tuple[int, ...], alpha: float | None
) -> AdaptedLayer:
    """One layer's adapter, its matrices in the form of the layer (1×1 kernels or none)."""
    parts = {part: stored.get_tensor(name).float() for part, name in module.tensors.items()}
    down, up = _as_layer(parts["down"], shape), _as_layer(parts["up"], shape)
    if (up.shape[0], *down.shape[1:]) != shape or up.shape[1] != down.shape[0]:
        what = (
            f"{module.name} is for a layer of {[parts['up'].shape[0], *parts['down'].shape[1:]]}, "
            f"this model's is {list(shape)}: it belongs to another model"
        )
        raise user_error(str(file), what)
    magnitude = parts.get("magnitude")
    if magnitude is not None and magnitude.numel() != shape[0]:
        what = f"{module.name} has a magnitude for each input; only those for each output are read"
        raise user_error(str(file), what)
    rank = down.shape[0]
    own = float(parts["alpha"]) if "alpha" in parts else alpha
    return AdaptedLayer(
        path, down, up, float(rank) if own is None else own,
        None if magnitude is None else magnitude.flatten(),
    )  # fmt: skip


def _as_layer(matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """1×1 kernels put on or taken off, as the layer has them."""
    if len(shape) == 4 and matrix.ndim == 2:
        return matrix[:, :, None, None]
    if len(shape) == 2 and matrix.ndim == 4 and matrix.shape[2:] == (1, 1):
        return matrix[:, :, 0, 0]
    return matrix


def _does_not_fit(strangers: list[str], count: int, family: Named) -> str:
    version = family.metadata().get("ss_base_model_version", "this family")
    return (
        f"{len(strangers)} of its {count} layers are not in this model ({version}): "
        f"{', '.join(strangers[:3])}"
    )


class Settings:
    """PEFT's settings of a file, from its header or from adapter_config.json beside it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @classmethod
    def of(cls, file: Path) -> Settings:
        """What is written of a file; nothing for most."""
        text = read_metadata(file).get(ADAPTER_METADATA)
        if text is not None:
            return cls(json.loads(text))
        beside = file.parent / "adapter_config.json"
        return cls(read_json(beside) if file.name == ADAPTER_NAME and beside.is_file() else {})

    def of_layer(self, name: str) -> float | None:
        """The alpha with which alpha / rank is the scale; None where nothing is written."""
        component, _, path = _bare(name).partition(".")
        prefix = f"{component}." if any(k.startswith(f"{component}.") for k in self.values) else ""
        path = path if prefix else _bare(name)
        own = {key.removeprefix(prefix): value for key, value in self.values.items()
               if key.startswith(prefix)}  # fmt: skip
        if "lora_alpha" not in own:
            return None
        alpha = float(lora.patterned(own.get("alpha_pattern"), path, own["lora_alpha"]))
        rank = int(lora.patterned(own.get("rank_pattern"), path, own["r"]))
        return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
