"""LoRA on a module: attach, list, read out. The only file that imports peft.

The update of a linear layer with weight W is W + (alpha / rank) * up @ down (Hu et al. 2021,
arXiv 2106.09685), with `down` of shape (rank, in) and `up` of shape (out, rank).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_scripts.errors import WorkError, user_error

ADAPTER = "default"
PREFIX = "base_model.model."  # of every name in PEFT's files
# what a PEFT adapter may use beyond one scale and two matrices a layer
_SPECIAL = ("use_rslora", "use_dora", "modules_to_save", "target_parameters",
            "trainable_token_indices", "layer_replication")  # fmt: skip

_UNFIT = "this adapter does not fit the base model"


@dataclass(frozen=True)
class AdaptedLayer:
    """The adapter of one layer. `down`: (rank, in, ...), `up`: (out, rank, ...), both float32."""

    path: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def attach(
    module: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, dropout: float, seed: int
) -> None:
    """Freeze `module` and put float32 LoRA layers on every sub-module named in `targets`.

    `targets` are full paths or ends of paths (`to_q`). `down` is drawn from `seed`, `up` is zero,
    so that the module's output is unchanged. The global generator is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their path in `module`."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def layers(module: nn.Module) -> list[AdaptedLayer]:
    """The adapters of `module` as float32 copies on the CPU, paths as in the bare module."""
    from peft.tuners.lora import LoraLayer

    return [
        AdaptedLayer(
            path=path,
            down=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            up=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            alpha=float(layer.lora_alpha[ADAPTER]),
        )
        for path, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    ]


def peft_tensors(adapters: Sequence[AdaptedLayer], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's adapter_model.safetensors, under the names that PEFT looks for."""
    tensors = {}
    for layer in adapters:
        tensors[f"{PREFIX}{layer.path}.lora_A.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{PREFIX}{layer.path}.lora_B.weight"] = layer.up.to(dtype).contiguous()
    return tensors


def write_peft_config(folder: Path, module: nn.Module, base_model: str) -> Path:
    """PEFT's adapter_config.json for the adapters of `module`, a language model."""
    adapters = layers(module)
    targets = _shortest(module, [layer.path for layer in adapters])
    return _write_config(folder, adapters, targets, base_model)


def write_peft(folder: Path, adapters: Sequence[AdaptedLayer], base_model: str) -> None:
    """A PEFT directory of adapters that belong to no module at hand, in float32.

    Ranks and alphas may differ from layer to layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(adapters, torch.float32), folder / "adapter_model.safetensors")
    targets = sorted(layer.path for layer in adapters)
    _write_config(folder, adapters, targets, base_model)


def _write_config(
    folder: Path, adapters: Sequence[AdaptedLayer], targets: Sequence[str], base_model: str
) -> Path:
    from peft import LoraConfig

    ranks = {layer.path: layer.down.shape[0] for layer in adapters}
    alphas = {layer.path: layer.alpha for layer in adapters}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(path): own for path, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(path): own for path, own in alphas.items() if own != alpha},
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    return folder / "adapter_config.json"


def read_peft(folder: Path, scale: float = 1.0) -> list[AdaptedLayer]:
    """The adapters of a PEFT directory as float32, alpha times `scale`.

    Raises:
        UserError: if it holds what plain LoRA cannot express.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    config = PeftConfig.from_pretrained(str(folder))
    special = [name for name in _SPECIAL if getattr(config, name, None)]
    if special:
        raise user_error(str(folder), f"uses {', '.join(special)}, which plain LoRA cannot express")
    tensors = load_file(folder / "adapter_model.safetensors")
    found = []
    for path in _adapted_paths(tensors):
        key = get_pattern_key(config.alpha_pattern, path)
        alpha = float(config.alpha_pattern.get(key, config.lora_alpha))
        down, up = (tensors[f"{PREFIX}{path}.lora_{side}.weight"].float() for side in "AB")
        found.append(AdaptedLayer(path, down, up, alpha * scale))
    return found


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
        for path in a
    )


def name_base(folder: Path, base_model: str) -> None:
    """Write another base model into a PEFT directory's adapter_config.json."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
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
        _check_fit(model, folder)
    for name, (folder, _) in zip(names, adapters, strict=True):
        try:
            with warnings.catch_warnings(action="ignore"):  # of what does not fit: refused below
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                else:
                    adapted.load_adapter(str(folder), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise user_error(str(folder), f"{_UNFIT}: {reason}") from None
        _check_complete(adapted, name, folder)
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


def set_strengths(adapted: Any, strengths: Mapping[str, float]) -> None:
    """Let the adapters of these names act together, each at its strength."""
    from peft.tuners.lora import LoraLayer

    adapted.base_model.set_adapter(list(strengths), inference_mode=True)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name, scale in strengths.items():
                module.set_scale(name, scale)


def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the adapters to `dtype` and hold them in float32 again, as a reader of a file would."""
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to(dtype).float()


def describe(module: nn.Module) -> str:
    """What is adapted, in words: `128 layers (32 each of to_k, to_out.0, to_q, to_v)`."""
    kinds = Counter(_kind(layer.path) for layer in layers(module))
    by_count: dict[int, list[str]] = {}
    for kind, count in sorted(kinds.items()):
        by_count.setdefault(count, []).append(kind)
    groups = [f"{count} each of {', '.join(names)}" for count, names in by_count.items()]
    return f"{kinds.total()} layers ({'; '.join(groups)})"


def share(modules: Mapping[str, nn.Module]) -> str:
    """Trainable parameters and their share of the base: `797,184 of 860,318,148 (0.093%)`."""
    trained = sum(p.numel() for module in modules.values() for p in trainable(module).values())
    total = sum(p.numel() for module in modules.values() for p in module.parameters())
    base = total - trained
    return f"{trained:,} parameters, {100 * trained / base:.3f}% of the base's {base:,}"


def _kind(path: str) -> str:
    """The part of a path that says what a layer does: `to_q`, or `to_out.0`."""
    *_, before, last = path.split(".")
    return f"{before}.{last}" if last.isdigit() else last
