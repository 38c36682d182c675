"""LoRA files for images, of this and of other programs, read into adapters of a family's layers.

Names are looked up, never taken apart: see `lora_names.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_scripts.errors import user_error
from lora_scripts.models import lora, lora_families, lora_layouts
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.header import read_header, read_metadata
from lora_scripts.models.json_file import read_json
from lora_scripts.models.lora import AdaptedLayer
from lora_scripts.models.lora_layouts import Module, Sorted, bare, locate
from lora_scripts.models.lora_names import Named, names_of, shape_of
from lora_scripts.run_files import ADAPTER_NAME

__all__ = ["ADAPTER_METADATA", "Settings", "locate", "put_on", "read"]

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's settings in a header


def read(path: Path, family: Named) -> dict[str, list[AdaptedLayer]]:
    """The adapters in a LoRA file, by component of the family, in float32 on the CPU.

    Raises:
        UserError: if it is no LoRA of two matrices (LoHa, LoKr …), or does not fit the model.
    """
    file = locate(path)
    header = read_header(file)
    found = lora_layouts.sort(header)
    refuse_others(file, found)
    lora_layouts.check_shapes(file, found.modules, header)
    places = names_of(family)
    strangers = [name for name in found.modules if bare(name) not in places]
    if strangers:
        raise user_error(str(file), _does_not_fit(strangers, file, family))
    _refuse_twice(file, [places[bare(name)] for name in found.modules])
    settings = Settings.of(file)
    adapters: dict[str, list[AdaptedLayer]] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for name, module in found.modules.items():
                component, layer = places[bare(name)]
                shape = shape_of(family, component, layer)
                adapter = _adapter(file, stored, module, layer, shape, settings.of_layer(name))
                adapters.setdefault(component, []).append(adapter)
    except SafetensorError as error:
        raise user_error(str(file), f"cannot be read: {error}") from None
    return adapters


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


def _adapter(
    file: Path, stored: Any, module: Module, path: str, shape: tuple[int, ...], alpha: float | None
) -> AdaptedLayer:
    """One layer's adapter, its matrices in the form of the layer (1×1 kernels or none)."""
    parts = {part: stored.get_tensor(name).float() for part, name in module.tensors.items()}
    down, up = _as_layer(parts["down"], shape), _as_layer(parts["up"], shape)
    if (up.shape[0], *down.shape[1:]) != shape or up.shape[1] != down.shape[0]:
        what = (
            f"{module.name} is for a layer of {[parts['up'].shape[0], *parts['down'].shape[1:]]}, "
            f"this model's is {list(shape)}{_meant(file)}"
        )
        raise user_error(str(file), what)
    magnitude = parts.get("magnitude")
    rank = down.shape[0]
    own = float(parts["alpha"]) if "alpha" in parts else alpha
    return AdaptedLayer(
        path, down, up, float(rank) if own is None else own,
        None if magnitude is None else _by_output(file, module, magnitude, shape[0]),
    )  # fmt: skip


def _by_output(file: Path, module: Module, magnitude: torch.Tensor, outputs: int) -> torch.Tensor:
    """DoRA's magnitudes, one for each output: the method's own way, and PEFT's.

    LyCORIS and OneTrainer write one for each input, (1, in), unless told otherwise.
    """
    is_kohya = module.layout == "kohya" and magnitude.ndim > 1
    if magnitude.numel() != outputs or (is_kohya and magnitude.shape[0] != outputs):
        what = (
            f"{module.name} has DoRA magnitudes for each input (shape {list(magnitude.shape)}); "
            "only those for each output are read"
        )
        raise user_error(str(file), what)
    return magnitude.flatten()


def _as_layer(matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """1×1 kernels put on or taken off, as the layer has them."""
    if len(shape) == 4 and matrix.ndim == 2:
        return matrix[:, :, None, None]
    if len(shape) == 2 and matrix.ndim == 4 and matrix.shape[2:] == (1, 1):
        return matrix[:, :, 0, 0]
    return matrix


def _does_not_fit(strangers: list[str], file: Path, family: Named) -> str:
    """Which layers the model lacks, and what the file seems to be for."""
    version = family.metadata().get("ss_base_model_version", "this family")
    named = ", ".join(strangers[:3])
    return f"{len(strangers)} layers are not in this model ({version}): {named}{_meant(file)}"


def _meant(file: Path) -> str:
    """What a file that does not fit is for, as the end of a sentence."""
    meant = lora_families.recognise(read_header(file), read_metadata(file))
    if meant is None:
        return "; it is for another model"
    advice = ", see `lora-scripts chat`" if meant == lora_families.LANGUAGE else ""
    return f"; it is for {meant}{advice}"


def _refuse_twice(file: Path, places: Sequence[tuple[str, str]]) -> None:
    (component, path), count = Counter(places).most_common(1)[0]
    if count > 1:
        raise user_error(str(file), f"holds {component}.{path} twice, under two names")


class Settings:
    """PEFT's settings of a file, from its header or from adapter_config.json beside it."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.values = values
        self._file = file

    @classmethod
    def of(cls, file: Path) -> Settings:
        """What is written of a file; nothing for most.

        Raises:
            UserError: if it is no JSON object.
        """
        text = read_metadata(file).get(ADAPTER_METADATA)
        if text is not None:
            try:
                return cls(file, dict(json.loads(text)))
            except (ValueError, TypeError, RecursionError):
                what = f"its header's {ADAPTER_METADATA} is no JSON object: {text[:80]}"
                raise user_error(str(file), what) from None
        beside = file.parent / "adapter_config.json"
        has_own = file.name == ADAPTER_NAME and beside.is_file()
        return cls(file, read_json(beside) if has_own else {})

    def of_layer(self, name: str) -> float | None:
        """The alpha with which alpha / rank is the scale; None where nothing is written.

        Raises:
            UserError: if alpha, rank or their patterns are not what PEFT writes.
        """
        component, _, path = bare(name).partition(".")
        prefix = f"{component}." if any(k.startswith(f"{component}.") for k in self.values) else ""
        path = path if prefix else bare(name)
        own = {key.removeprefix(prefix): value for key, value in self.values.items()
               if key.startswith(prefix)}  # fmt: skip
        if "lora_alpha" not in own:
            return None
        try:
            alpha = float(lora.patterned(own.get("alpha_pattern"), path, own["lora_alpha"]))
            rank = int(lora.patterned(own.get("rank_pattern"), path, own["r"]))
            return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, re.error):
            what = f"PEFT's settings of {name} (r, lora_alpha, their patterns) are damaged"
            raise user_error(str(self._file), what) from None
