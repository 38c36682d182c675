"""A module on the meta device gets its weights from a .safetensors file with other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo
from lora_scripts.models.original_names import Source

PIECE = 1 << 27  # bytes of a file that are mapped at once while weights are made of them
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def check(
    path: Path,
    module: nn.Module,
    header: Mapping[str, TensorInfo],
    where: Mapping[str, Source],
    what: str,
) -> None:
    """That a file's tensors are those that a module has at these places, no more and no fewer.

    Args:
        path: The file, to be named.
        module: Of the widths and depths of the file; may be on the meta device.
        header: The file's tensors that belong to this module.
        where: For each of the module's tensors its place in the file.
        what: The module, to be named.

    Raises:
        UserError: naming unknown, missing, wrongly shaped and non-float tensors.
    """
    needed = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    used = {source.name for source in where.values()}
    wrong = [
        f"{source.name} {header[source.name].shape} for {name} {needed[name]}"
        for name, source in where.items()
        if source.name in header and not _fits(source, header[source.name].shape, needed[name])
    ]
    odd = [f"{name} {info.dtype}" for name, info in header.items() if info.dtype not in _FLOATS]
    problems = {
        "unknown": [name for name in header if name not in used],
        "missing": sorted(used - header.keys()),
        "of a wrong shape": wrong,
        "of a type that is no float": odd,
    }
    found = [f"{len(names)} tensors {k}: {some(names)}" for k, names in problems.items() if names]
    if found:
        raise user_error(str(path), f"does not fit {what}: {'; '.join(found)}")


def _fits(source: Source, stored: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Linear layers may be stored as 1×1 convolutions."""
    if source.third is not None:
        needed = (3 * needed[0], *needed[1:])
    if source.transposed:
        needed = needed[::-1]
    extra = stored[len(needed) :]
    return stored[: len(needed)] == needed and all(size == 1 for size in extra)


def fill(module: nn.Module, path: Path, where: Mapping[str, Source], dtype: torch.dtype) -> None:
    """Give a module its weights from a .safetensors file, each copied once, as `dtype`."""
    module.load_state_dict(weights(path, where, module.state_dict(), dtype), assign=True)


def weights(
    path: Path, where: Mapping[str, Source], like: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors out of a .safetensors file, each copied once.

    What was read of a mapped file stays in memory as long as it is open: it is opened anew after
    every `PIECE` bytes.

    Args:
        path: The file.
        where: For each name the tensor's place in the file.
        like: Tensors of the shapes wanted, by name; may be on the meta device.
        dtype: What the tensors become.
    """
    made = {}
    for names in _pieces(where, like):
        with safe_open(path, framework="pt") as file:
            for name in names:
                made[name] = _tensor(file, where[name], torch.empty(like[name].shape, dtype=dtype))
    return made


def _tensor(file: Any, source: Source, copy: torch.Tensor) -> torch.Tensor:
    if source.third is None:
        stored = file.get_tensor(source.name)
    else:
        first = source.third * len(copy)
        stored = file.get_slice(source.name)[first : first + len(copy)]
    return copy.copy_(stored.T if source.transposed else stored.reshape(copy.shape))


def _pieces(where: Mapping[str, Source], like: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names in runs of at most `PIECE` bytes, or of one."""
    names: list[str] = []
    room = PIECE
    for name in where:
        needed = like[name].numel() * torch.float32.itemsize  # the widest that there is, nearly
        if names and needed > room:
            yield names
            names, room = [], PIECE
        names.append(name)
        room -= needed
    if names:
        yield names


def some(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
