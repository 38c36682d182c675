"""What a LoRA file is: family, layers, ranks, scales, header, and which programs read it.

Headers and the few scalars (alpha) are read; no matrix is, and no model is loaded.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import user_error
from lora_scripts.export import readers
from lora_scripts.logs import quiet_libraries
from lora_scripts.models import lora_layouts
from lora_scripts.models.header import TensorInfo, read_header, read_metadata
from lora_scripts.models.json_file import read_json
from lora_scripts.run_files import ADAPTER_NAME

if TYPE_CHECKING:
    from lora_scripts.models.lora_layouts import Module, Sorted

logger = logging.getLogger(__name__)

TAGS_SHOWN, VALUE_SHOWN = 12, 100


@dataclass(frozen=True)
class Report:
    """What was found; `alphas` and `ranks`: value -> number of layers."""

    path: str
    bytes: int
    family: str | None
    layout: str
    kind: str
    dtypes: dict[str, int]
    layers: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    not_read: dict[str, int]
    unknown: list[str]
    programs: dict[str, str]
    metadata: dict[str, str]


def run(path: Path, *, as_json: bool) -> Report:
    """Say what a LoRA file is, on standard output.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    quiet_libraries()
    report = inspect(path)
    if as_json:
        print(json.dumps(asdict(report), indent=2, ensure_ascii=False))  # noqa: T201
    else:
        print("\n".join(_lines(report)))  # noqa: T201
    return report


def inspect(path: Path) -> Report:
    """What a LoRA file is.

    Raises:
        UserError: if there is no such file, it is damaged, or holds no LoRA.
    """
    from lora_scripts.models import lora_families

    file = lora_layouts.locate(path)
    header, metadata = read_header(file), read_metadata(file)
    found = lora_layouts.sort(header)
    if not found.modules and not found.others:
        names = ", ".join(list(header)[:3])
        raise user_error(str(file), f"holds no LoRA that is known here, but {names} …")
    modules = found.modules
    lora_layouts.check_shapes(file, modules, header)
    known = lora_families.family_of(header, metadata)
    return Report(
        path=str(file),
        bytes=file.stat().st_size,
        family=lora_families.recognise(header, metadata),
        layout=" and ".join(sorted({module.layout for module in modules.values()})) or "unknown",
        kind=_kind(found, file),
        dtypes=dict(Counter(info.dtype for name, info in header.items()
                            if not name.endswith(".alpha"))),
        layers=dict(sorted(Counter(map(_component, modules)).items())),
        ranks=_counted(header[m.tensors["down"]].shape[0] for m in modules.values()
                       if "down" in m.tensors),
        alphas=_counted(_alphas(file, modules, header)),
        not_read=found.others,
        unknown=found.unknown,
        programs={} if known is None
        else readers.programs(readers.Facts(known, found, header, metadata)),
        metadata=metadata,
    )  # fmt: skip


def _kind(found: Sorted, file: Path) -> str:
    from lora_scripts.models import lora_file

    if any("magnitude" in module.tensors for module in found.modules.values()):
        return "DoRA"
    if found.others:
        return ", ".join(found.others)
    settings = lora_file.Settings.of(file).values
    by_settings = any(key.endswith("use_rslora") and value for key, value in settings.items())
    by_header = '"rslora"' in read_metadata(file).get("ss_network_args", "")
    return "rsLoRA" if by_settings or by_header else "LoRA"


def _alphas(
    file: Path, modules: Mapping[str, Module], header: Mapping[str, TensorInfo]
) -> list[float]:
    """The alpha of each layer with which alpha / rank is its scale."""
    from safetensors import safe_open

    from lora_scripts.models import lora_file

    settings = lora_file.Settings.of(file)
    alphas = []
    with safe_open(file, framework="pt") as stored:
        for name, module in modules.items():
            if "alpha" in module.tensors:
                alphas.append(float(stored.get_tensor(module.tensors["alpha"])))
                continue
            told = settings.of_layer(name)
            rank = header[module.tensors["down"]].shape[0] if "down" in module.tensors else 1
            alphas.append(float(rank) if told is None else told)
    return alphas


def _counted(values: Any) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def _component(name: str) -> str:
    """The part of the model that a module's name says."""
    bare = lora_layouts.bare(name)
    for start, component in (
        ("lora_te2_", "second text encoder"), ("text_encoder_2.", "second text encoder"),
        ("lora_te1_", "text encoder"), ("lora_te_", "text encoder"),
        ("text_encoder.", "text encoder"), ("lora_transformer_", "transformer"),
        ("transformer.transformer_blocks", "transformer"),
        ("transformer.single_transformer_blocks", "transformer"),
        ("lora_", "UNet"), ("lycoris_", "UNet"), ("unet.", "UNet"), ("diffusion_model.", "UNet"),
        ("down_blocks.", "UNet"), ("mid_block.", "UNet"), ("up_blocks.", "UNet"),
    ):  # fmt: skip
        if bare.startswith(start):
            return component
    return "language model"


def _lines(report: Report) -> list[str]:
    """The report for a person."""
    lines = [
        report.path,
        f"  for       {report.family or 'a model that is not known here'}",
        f"  kind      {report.kind}, in the layout of {report.layout}",
        f"  size      {report.bytes / 1e6:.1f} MB, {', '.join(report.dtypes)}",
        *(f"  layers    {count} in the {component}" for component, count in report.layers.items()),
        f"  ranks     {_values(report.ranks)}",
        f"  alphas    {_values(report.alphas)}",
    ]
    lines += [f"  not read  {kind}: {count} tensors" for kind, count in report.not_read.items()]
    if report.unknown:
        lines.append(f"  unknown   {len(report.unknown)} tensors: {', '.join(report.unknown[:3])}")
    lines += [f"  {program}: {how}" for program, how in report.programs.items()]
    shown = {k: v for k, v in report.metadata.items() if k != "ss_tag_frequency"}
    lines += [f"  {key} = {_short(value)}" for key, value in sorted(shown.items())]
    if tags := _tags(report.metadata):
        lines.append(f"  most frequent tags: {', '.join(f'{t} ({n})' for t, n in tags)}")
    config = Path(report.path).parent / "adapter_config.json"
    if Path(report.path).name == ADAPTER_NAME and config.is_file():
        lines.append(f"  base model: {read_json(config).get('base_model_name_or_path')}")
    return lines


def _values(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items())


def _short(value: str) -> str:
    return value if len(value) <= VALUE_SHOWN else f"{value[:VALUE_SHOWN]}…"


def _tags(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """The tags that the pictures were captioned with, the most frequent first."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        total: Counter[str] = Counter()
        for tags in folders.values():
            total.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []  # somebody else's file, written otherwise
    return total.most_common(TAGS_SHOWN)
