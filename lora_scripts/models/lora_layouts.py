"""The tensors of a LoRA file told apart: which module each belongs to and what it is there.

Layouts that are read, all of them by their names alone:

    kohya      NAME.lora_down.weight, .lora_up.weight, .alpha, .dora_scale   (sd-scripts, LyCORIS
               LoCon, OneTrainer, ai-toolkit)
    PEFT       PATH.lora_A.weight, .lora_B.weight, .lora_magnitude_vector   (SimpleTuner)
    diffusers  PATH.lora.down.weight, .lora.up.weight; .lora_linear_layer.down.weight, .up.weight
    older      PATH.processor.to_q_lora.down.weight, .up.weight   (diffusers before 0.26)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo
from lora_scripts.run_files import ADAPTER_NAME, DIFFUSERS_NAME

Part = Literal["down", "up", "alpha", "magnitude"]
Layout = Literal["kohya", "peft", "diffusers", "old diffusers"]

_ENDS: tuple[tuple[str, Part, Layout], ...] = (
    (".lora_down.weight", "down", "kohya"),
    (".lora_up.weight", "up", "kohya"),
    (".alpha", "alpha", "kohya"),
    (".dora_scale", "magnitude", "kohya"),
    (".lora_A.weight", "down", "peft"),
    (".lora_B.weight", "up", "peft"),
    (".lora_A.default.weight", "down", "peft"),
    (".lora_B.default.weight", "up", "peft"),
    (".lora_magnitude_vector", "magnitude", "peft"),
    (".lora_magnitude_vector.weight", "magnitude", "peft"),
    (".lora_magnitude_vector.default.weight", "magnitude", "peft"),
    (".lora.down.weight", "down", "diffusers"),
    (".lora.up.weight", "up", "diffusers"),
    (".lora_linear_layer.down.weight", "down", "diffusers"),
    (".lora_linear_layer.up.weight", "up", "diffusers"),
)
_OLD = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
# What is no LoRA of two matrices: the mark in a name, and what it is.
OTHER_KINDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.hada_w"), "LoHa (LyCORIS)"),
    (re.compile(r"\.lokr_[wt]"), "LoKr (LyCORIS)"),
    (re.compile(r"\.b?oft_"), "OFT"),
    (re.compile(r"\.on_input$"), "(IA)³ (LyCORIS)"),
    (re.compile(r"\.lora_mid\."), "LoCon with a third matrix (LyCORIS's Tucker decomposition)"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA (LyCORIS)"),
    (re.compile(r"\.vera_"), "VeRA"),
    (re.compile(r"\.diff(?:_b)?$"), "full weights (LyCORIS)"),
    (re.compile(r"\.(?:w_norm|b_norm)$"), "trained norms (LyCORIS)"),
    (re.compile(r"\.lora_[AB]\.bias$"), "LoRA with biases"),
    (re.compile(r"^bundle_emb\."), "bundled embeddings (textual inversion)"),
)


@dataclass
class Module:
    """What a file holds for one module: the names of its tensors by part."""

    name: str  # of the module, as the file writes it
    layout: Layout
    tensors: dict[Part, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sorted:
    """All tensors of a file.

    Attributes:
        modules: By the name of the module, as the file writes it.
        others: Kinds that are no LoRA of two matrices -> how many tensors.
        unknown: Names that belong to no layout.
    """

    modules: dict[str, Module]
    others: dict[str, int]
    unknown: list[str]


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


def bare(name: str) -> str:
    """A module's name without what PEFT puts in front of every name."""
    return name.removeprefix("base_model.model.")


def sort(names: Iterable[str]) -> Sorted:
    """The tensors of a file by module. Pure: looks at names alone."""
    modules: dict[str, Module] = {}
    others: dict[str, int] = {}
    unknown: list[str] = []
    for name in names:
        found = _split(name)
        other = next((kind for mark, kind in OTHER_KINDS if mark.search(name)), None)
        if other is not None:
            others[other] = others.get(other, 0) + 1
        elif found is None:
            unknown.append(name)
        else:
            path, part, layout = found
            module = modules.setdefault(path, Module(path, layout))
            module.tensors[part] = name
            if part == "down":  # several layouts share the names of the other parts
                module.layout = layout
    return Sorted(modules, others, unknown)


def check_shapes(
    file: Path, modules: Mapping[str, Module], header: Mapping[str, TensorInfo]
) -> None:
    """Matrices must be matrices, and an alpha one number.

    Raises:
        UserError: naming the first tensor that is not.
    """
    for module in modules.values():
        for part, name in module.tensors.items():
            shape = header[name].shape
            fits = (
                math.prod(shape) == 1 if part == "alpha" else part == "magnitude" or len(shape) > 1
            )
            if not fits or 0 in shape:
                what = f"is damaged: {name} has the shape {list(shape)}"
                raise user_error(str(file), what)


def _split(name: str) -> tuple[str, Part, Layout] | None:
    """The module, the part and the layout that a tensor's name says."""
    if (old := _OLD.fullmatch(name)) is not None:
        layer = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{layer}", "down" if old[3] == "down" else "up", "old diffusers"
    for end, part, layout in _ENDS:
        if name.endswith(end):
            return name.removesuffix(end), part, layout
    return None
