"""PEFT directories: LoRAs of language models, written, read, put on a model."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_scripts import tensor_files
from lora_scripts.errors import WorkError, user_error
from lora_scripts.models import foreign
from lora_scripts.models.lora import peft_config
from lora_scripts.models.lora.layers import (
    AdaptedLayer,
    Kind,
    kind_of,
    layers,
    set_strengths,
)

PREFIX = "base_model.model."  # of every name in PEFT's files
MAGNITUDE = "lora_magnitude_vector"
_UNFIT = "this adapter does not fit the base model"


def peft_tensors(adapters: Sequence[AdaptedLayer], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's adapter_model.safetensors, under the names that PEFT looks for."""
    tensors = {}
    for layer in adapters:
        tensors[f"{PREFIX}{layer.path}.lora_A.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{PREFIX}{layer.path}.lora_B.weight"] = layer.up.to(dtype).contiguous()
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{layer.path}.{MAGNITUDE}"] = layer.magnitude.to(dtype).contiguous()
    return tensors


def write_peft_config(folder: Path, module: nn.Module, base_model: str) -> Path:
    """PEFT's adapter_config.json for the adapters of `module`, a language model."""
    adapters = layers(module)
    targets = _shortest(module, [layer.path for layer in adapters])
    return _write_config(folder, adapters, targets, base_model, kind_of(module))


def write_peft(folder: Path, adapters: Sequence[AdaptedLayer], base_model: str) -> None:
    """A PEFT directory of adapters that belong to no module at hand, in float32.

    Ranks and alphas may differ from layer to layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.save(folder / "adapter_model.safetensors", peft_tensors(adapters, torch.float32))
    targets = sorted(layer.path for layer in adapters)
    kind: Kind = "lora" if all(layer.magnitude is None for layer in adapters) else "dora"
    _write_config(folder, adapters, targets, base_model, kind)


def _write_config(
    folder: Path,
    adapters: Sequence[AdaptedLayer],
    targets: Sequence[str],
    base_model: str,
    kind: Kind,
) -> Path:
    from peft import LoraConfig

    ranks = {layer.path: layer.rank for layer in adapters}
    alphas = {layer.path: _written_alpha(layer, kind) for layer in adapters}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(path): own for path, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(path): own for path, own in alphas.items() if own != alpha},
        target_modules=list(targets),
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return folder / "adapter_config.json"


def read_peft(folder: Path, scale: float = 1.0) -> list[AdaptedLayer]:
    """The adapters of a PEFT directory as float32, alpha times `scale`.

    Raises:
        UserError: if it holds what LoRA, rsLoRA and DoRA cannot express.
    """
    peft_config.check(folder)
    config = _read_config(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = []
    for path in _adapted_paths(tensors):
        alpha = float(patterned(config.alpha_pattern, path, config.lora_alpha))
        down, up = (tensors[f"{PREFIX}{path}.lora_{side}.weight"].float() for side in "AB")
        if config.use_rslora:
            alpha *= math.sqrt(down.shape[0])
        magnitude = tensors.get(f"{PREFIX}{path}.{MAGNITUDE}")
        found.append(
            AdaptedLayer(
                path, down, up, alpha * scale, None if magnitude is None else magnitude.float()
            )
        )
    return found


def _read_config(folder: Path) -> Any:
    """PEFT's settings as PEFT reads them."""
    from peft import PeftConfig

    with foreign.reading(folder, peft_config.CONFIG_NAME):
        return PeftConfig.from_pretrained(str(folder))


def patterned(patterns: Mapping[str, Any] | None, path: str, usual: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern says of a layer: the first pattern it ends in."""
    from peft.utils.other import get_pattern_key

    given = patterns or {}
    return given.get(get_pattern_key(given.keys(), path), usual)


def _written_alpha(layer: AdaptedLayer, kind: Kind) -> float:
    """The alpha of the config: readers of an rsLoRA divide by √rank, not by the rank."""
    return layer.alpha / math.sqrt(layer.rank) if kind == "rslora" else layer.alpha


def _adapted_paths(names: Iterable[str]) -> list[str]:
    """The layers that a PEFT file has matrices for, as paths in the bare model."""
    end = ".lora_A.weight"
    return [name.removeprefix(PREFIX).removesuffix(end) for name in names if name.endswith(end)]


def same(first: Sequence[AdaptedLayer], second: Sequence[AdaptedLayer]) -> bool:
    """Whether two lists hold the same adapters, exactly; their order does not count."""
    a, b = ({layer.path: layer for layer in adapters} for adapters in (first, second))
    return a.keys() == b.keys() and all(
        torch.equal(a[path].down, b[path].down)
        and torch.equal(a[path].up, b[path].up)
        and a[path].alpha == b[path].alpha
        and _same_magnitude(a[path].magnitude, b[path].magnitude)
        for path in a
    )


def _same_magnitude(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def name_base(folder: Path, base_model: str) -> None:
    """Write another base model into a PEFT directory's adapter_config.json."""
    config = _read_config(folder)
    config.base_model_name_or_path = base_model
    config.save_pretrained(str(folder))


def merge(adapted: Any) -> Any:
    """The plain model with its active adapters added to its weights.

    Raises:
        WorkError: if a merged weight is not finite.
    """
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise WorkError(str(error)) from None


def _shortest(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """`q_proj` in place of the paths in all blocks, where that means just the same layers."""
    inside = tuple(f"{path}." for path in paths)
    names = {path.rsplit(".", 1)[-1] for path in paths}
    meant = {
        path
        for path, _ in module.named_modules()
        if path.rsplit(".", 1)[-1] in names and not path.startswith(inside)
    }
    return sorted(names) if meant == set(paths) else sorted(paths)


def with_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """A model with finished PEFT adapters on it, each at its strength (1.0: as trained).

    `adapters`: folders with an adapter_config.json. PEFT's own reader loads them.

    Raises:
        UserError: if an adapter does not fit the model.
    """
    from peft import PeftModel

    names = [f"adapter_{number}" for number, _ in enumerate(adapters)]
    adapted: Any = None
    for folder, _ in adapters:
        peft_config.check(folder)
        _check_fit(model, folder)
    for name, (folder, _) in zip(names, adapters, strict=True):
        with foreign.reading(folder, f"{_UNFIT}: it"), warnings.catch_warnings(action="ignore"):
            # of what does not fit: refused below
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                adapted.load_adapter(str(folder), adapter_name=name)
        _check_complete(adapted, name, folder)
    adapted.base_model.set_adapter(names, inference_mode=True)
    set_strengths(adapted, dict(zip(names, (scale for _, scale in adapters), strict=True)))
    return adapted.eval()


def _check_fit(model: nn.Module, folder: Path) -> None:
    """Every pair of matrices in the file must have its layer in the model, of the right width."""
    modules = dict(model.named_modules())
    misfits = []
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        for path in _adapted_paths(stored.keys()):
            inputs = stored.get_slice(f"{PREFIX}{path}.lora_A.weight").get_shape()[1]
            outputs = stored.get_slice(f"{PREFIX}{path}.lora_B.weight").get_shape()[0]
            if path not in modules:
                misfits.append(f"the model has no {path}")
            elif (widths := _widths(modules[path])) not in (None, (inputs, outputs)):
                found = " → ".join(map(str, widths or ()))
                misfits.append(f"{path} is {found} in the model, {inputs} → {outputs} here")
    if misfits:
        more = f", and {len(misfits) - 1} more such layers" if len(misfits) > 1 else ""
        raise user_error(str(folder), f"{_UNFIT}: {misfits[0]}{more}")


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """A linear layer's inputs and outputs; None for other layers."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer

    match module:
        case nn.Linear():
            return module.in_features, module.out_features
        case Conv1D():
            return module.nx, module.nf
        case _:
            return None


def _check_complete(adapted: Any, name: str, folder: Path) -> None:
    """No layer may have got an adapter by the config's names and no matrices from the file."""
    from peft.tuners.lora import LoraLayer

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        given = set(_adapted_paths(stored.keys()))
    modules = adapted.get_base_model().named_modules()
    there = {p for p, m in modules if isinstance(m, LoraLayer) and name in m.lora_A}
    if empty := sorted(there - given):
        more = f" and {len(empty) - 1} more layers" if len(empty) > 1 else ""
        raise user_error(str(folder), f"{_UNFIT}: it has no matrices for {empty[0]}{more}")
