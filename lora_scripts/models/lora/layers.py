"""LoRA layers on a module: attach to train, put a finished one on, read out, merge.

The update of a layer with weight W is W + (alpha / rank) * up @ down (Hu et al. 2021, arXiv
2106.09685), with `down` of shape (rank, in, …) and `up` of shape (out, rank, …). rsLoRA scales by
alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732). DoRA multiplies each output's row of the sum
by magnitude / its norm (Liu et al. 2024, arXiv 2402.09353).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lora_scripts.errors import WorkError

ADAPTER = "default"
Kind = Literal["lora", "dora", "rslora"]


@dataclass(frozen=True)
class AdaptedLayer:
    """The adapter of one layer, all tensors float32.

    Attributes:
        path: The layer's path in the bare module.
        down: Shape (rank, in) or (rank, in, height, width).
        up: Shape (out, rank) or (out, rank, 1, 1).
        alpha: The scale is alpha / rank. For rsLoRA this is the configured alpha times √rank.
        magnitude: DoRA's, shape (out,); None for others.
    """

    path: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.down.shape[0]


def attach(
    module: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    kind: Kind = "lora",
) -> None:
    """Freeze `module` and put float32 LoRA layers on every sub-module named in `targets`.

    `targets` are full paths or ends of paths (`to_q`). `down` is drawn from `seed`, `up` is zero,
    so that the module's output is unchanged. The global generator is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from lora_scripts.models.lora import linear

    module.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()
    for _, layer in _layers(module, ADAPTER):
        linear.in_one_step(layer)
        if kind == "dora":
            _measure(layer)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their path in `module`."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@contextmanager
def resting(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules as they are without what was attached; what is trained is left as it is."""
    attached = [layer for module in modules for _, layer in _layers(module, ADAPTER)]
    for layer in attached:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in attached:
            layer.enable_adapters(True)


def layers(module: nn.Module, adapter: str = ADAPTER) -> list[AdaptedLayer]:
    """The adapters of `module` as float32 copies on the CPU, paths as in the bare module."""
    return [
        AdaptedLayer(
            path=path,
            down=_plain(layer.lora_A[adapter].weight),
            up=_plain(layer.lora_B[adapter].weight),
            alpha=_alpha(layer, adapter),
            magnitude=(
                _plain(layer.lora_magnitude_vector[adapter].weight).flatten()
                if adapter in layer.lora_magnitude_vector
                else None
            ),
        )
        for path, layer in _layers(module, adapter)
    ]


def kind_of(module: nn.Module) -> Kind:
    """What kind of LoRA was attached."""
    for _, layer in _layers(module, ADAPTER):
        if ADAPTER in layer.lora_magnitude_vector:
            return "dora"
        return "rslora" if layer.use_rslora.get(ADAPTER, False) else "lora"
    return "lora"


def put(module: nn.Module, name: str, adapters: Sequence[AdaptedLayer]) -> None:
    """Put a finished LoRA beside what is on `module` already, as an adapter called `name`.

    It is frozen, and acts once `set_strengths` says so. Ranks and alphas may differ by layer.

    Raises:
        ValueError: naming a layer that is not there, or that the matrices do not fit.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not adapters:
        return
    _check_fit(module, adapters)
    for group in _by_kind(adapters):
        trained = trainable(module)
        with_magnitude = group[0].magnitude is not None
        config = LoraConfig(
            r=1, target_modules=[layer.path for layer in group], use_dora=with_magnitude
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, module, adapter_name=name)
        for parameter in trainable(module).values():
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
    there = dict(_layers(module, name))
    for adapter in adapters:
        _fill(there[adapter.path], name, adapter)


def set_strengths(module: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let the adapters of these names act together, each at its strength, and no others.

    A strength scales the matrices, as PEFT and diffusers do; DoRA's magnitudes act in full at any
    strength but 0, which is the module without that adapter.
    """
    for _, layer in _layers(module, None):
        names = [name for name, strength in strengths.items() if strength and name in layer.lora_A]
        layer.set_adapter(names, inference_mode=True)
        for name in names:
            layer.set_scale(name, strengths[name])


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter off; layers without any other are as they were before PEFT."""
    for path, layer in _layers(module, name):
        layer.delete_adapter(name)
        if not layer.lora_A:
            module.set_submodule(path, layer.get_base_layer())


def names_on(module: nn.Module) -> list[str]:
    """The adapters that were put on a module, whether they act or not."""
    return sorted({name for _, layer in _layers(module, None) for name in layer.lora_A})


def merge_into(module: nn.Module) -> None:
    """Add the adapters that act, at their strengths, to the weights; no PEFT layer is left.

    Raises:
        WorkError: if a merged weight is not finite.
    """
    try:
        for path, layer in _layers(module, None):
            layer.merge(safe_merge=True)
            module.set_submodule(path, layer.get_base_layer())
    except ValueError as error:
        raise WorkError(str(error)) from None


def initialise(module: nn.Module, adapters: Sequence[AdaptedLayer]) -> list[str]:
    """Start the LoRA that was attached from a finished one of the same rank.

    Where the two alphas differ `up` is scaled, so that the update is the same.

    Returns:
        The paths of attached layers that the finished LoRA does not have; they start afresh.

    Raises:
        ValueError: naming a layer that has no LoRA attached, or one of another rank or kind.
    """
    attached = dict(_layers(module, ADAPTER))
    if missing := [adapter.path for adapter in adapters if adapter.path not in attached]:
        raise ValueError(f"{missing[0]} and {len(missing) - 1} more layers carry no LoRA here")
    for adapter in adapters:
        layer = attached[adapter.path]
        if (rank := layer.r[ADAPTER]) != adapter.rank:
            raise ValueError(f"{adapter.path} has the rank {adapter.rank}, not {rank}")
        if (adapter.magnitude is None) == (ADAPTER in layer.lora_magnitude_vector):
            raise ValueError(f"{adapter.path}: one of the two is DoRA, the other is not")
        ratio = adapter.alpha / _alpha(layer, ADAPTER)
        _set(layer.lora_A[ADAPTER], adapter.down)
        _set(layer.lora_B[ADAPTER], adapter.up * ratio)
        if adapter.magnitude is not None:
            _set(layer.lora_magnitude_vector[ADAPTER], adapter.magnitude)
    given = {adapter.path for adapter in adapters}
    return [path for path in attached if path not in given]


def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the adapters to `dtype` and hold them in float32 again, as a reader of a file would."""
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to(dtype).float()


def scale_as_written(module: nn.Module) -> None:
    """Scale the attached LoRA as a reader of its file does: by alpha in float32 / rank."""
    for _, layer in _layers(module, ADAPTER):
        alpha = torch.tensor(_alpha(layer, ADAPTER), dtype=torch.float32)
        layer.scaling[ADAPTER] = float(alpha) / layer.r[ADAPTER]


def describe(module: nn.Module) -> str:
    """What is adapted, in words: `128 layers (32 each of to_k, to_out.0, to_q, to_v)`."""
    kinds = Counter(_kind_of(layer.path) for layer in layers(module))
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


# --- private --------------------------------------------------------------------------------------


def _layers(module: nn.Module, adapter: str | None) -> list[tuple[str, Any]]:
    """PEFT's layers, those with this adapter, or all."""
    from peft.tuners.lora import LoraLayer

    return [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, LoraLayer) and (adapter is None or adapter in layer.lora_A)
    ]


def _alpha(layer: Any, adapter: str) -> float:
    """The alpha with which alpha / rank is the layer's own scale."""
    alpha, rank = float(layer.lora_alpha[adapter]), layer.r[adapter]
    return alpha * math.sqrt(rank) if layer.use_rslora.get(adapter, False) else alpha


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().cpu().clone()


def _measure(layer: Any) -> None:
    """The magnitudes that leave the layer as it is: PEFT rounds them to the base's dtype."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, weight (in, out)

    base = layer.get_base_layer()
    if not base.weight.is_floating_point():  # quantised: PEFT's are as good as can be had
        return
    rows = base.weight.T if isinstance(base, Conv1D) else base.weight
    _set(layer.lora_magnitude_vector[ADAPTER], rows.detach().float().flatten(1).norm(dim=1))


def _by_kind(adapters: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Those with a magnitude and those without, empty ones left out."""
    plain = [adapter for adapter in adapters if adapter.magnitude is None]
    dora = [adapter for adapter in adapters if adapter.magnitude is not None]
    return [group for group in (plain, dora) if group]


def _check_fit(module: nn.Module, adapters: Sequence[AdaptedLayer]) -> None:
    there = dict(module.named_modules())
    for adapter in adapters:
        if adapter.path not in there:
            raise ValueError(f"there is no layer {adapter.path}")
        layer: Any = there[adapter.path]
        weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
        # a 1x1 convolution's kernel in `up`, the layer's own kernel in `down`
        update = (adapter.up.shape[0], *adapter.down.shape[1:])
        if tuple(weight.shape) != update:
            found, needed = list(update), list(weight.shape)
            raise ValueError(f"{adapter.path} is {needed} here, the LoRA is for {found}")


def _fill(layer: Any, name: str, adapter: AdaptedLayer) -> None:
    """Give a PEFT layer's adapter the matrices, rank and scale of a finished one."""
    for part, matrix in ((layer.lora_A[name], adapter.down), (layer.lora_B[name], adapter.up)):
        device = part.weight.device
        part.weight = nn.Parameter(matrix.to(device, copy=True), requires_grad=False)
    layer.r[name] = adapter.rank
    layer.lora_alpha[name] = adapter.alpha
    layer.scaling[name] = adapter.alpha / adapter.rank
    if adapter.magnitude is not None:
        _set(layer.lora_magnitude_vector[name], adapter.magnitude)


def _set(part: Any, values: torch.Tensor) -> None:
    """New float32 values for the weight of a part, in the shape that it has."""
    weight = part.weight
    weight.data = values.reshape(weight.shape).to(weight.device, torch.float32, copy=True)


def _kind_of(path: str) -> str:
    """The part of a path that says what a layer does: `to_q`, or `to_out.0`."""
    before, _, last = path.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() else last
