"""The adapter as one GGUF file, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) read.

llama.cpp adds alpha / rank * B @ A to the tensor whose name stands before `.lora_a` / `.lora_b`;
the rank is that tensor's own, alpha stands once in the file. So every layer must be one tensor of
the base as its converter writes it, rows in the order its converter writes them.

Sources (github.com/ggml-org/llama.cpp, libllama 0.5.0): `conversion/*.py` for each architecture's
name and changes to the weights, `convert_lora_to_gguf.py` for the file, `src/llama-adapter.cpp` for
what the reader checks: type, architecture, pairs, names and shapes. The names are gguf-py's map.
For every model type in `FAMILIES`, the file was equal to that converter's, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_scripts.errors import Problem, UserError, WorkError, user_error
from lora_scripts.files import replace, sync
from lora_scripts.models.lora import AdaptedLayer

if TYPE_CHECKING:
    from gguf import TensorNameMap
    from transformers import PretrainedConfig

INSTALL = "pip install gguf"
DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Family:
    """How llama.cpp's converter treats the linear layers of one transformers model type.

    `interleaved`: it reorders the rows of q_proj and k_proj, from transformers' order of rotary
    pairs (all first halves, then all second halves) to pairs side by side.
    """

    architecture: str
    interleaved: bool = False


FAMILIES: Mapping[str, Family] = {
    "apertus": Family("apertus"),
    "arcee": Family("arcee", interleaved=True),
    "cohere": Family("command-r"),
    "cohere2": Family("cohere2"),
    "ernie4_5": Family("ernie4_5"),
    "exaone4": Family("exaone4"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3": Family("gemma3"),
    "gemma3_text": Family("gemma3"),
    "glm": Family("chatglm"),
    "glm4": Family("glm4"),
    "granite": Family("granite", interleaved=True),
    "hunyuan_v1_dense": Family("hunyuan-dense"),
    "lfm2": Family("lfm2"),
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "mixtral": Family("llama", interleaved=True),
    "nemotron": Family("nemotron"),
    "olmo": Family("olmo", interleaved=True),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2"),
    "phi": Family("phi2"),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3": Family("qwen3"),
    "qwen3_5": Family("qwen35"),
    "qwen3_5_text": Family("qwen35"),
    "qwen3_moe": Family("qwen3moe"),
    "seed_oss": Family("seed_oss"),
    "smollm3": Family("smollm3", interleaved=True),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
}


@dataclass(frozen=True)
class StoredAdapter:
    """What a GGUF adapter file holds. Tensors by name, float32 or float16, on the CPU.

    `NAME.lora_a`: (rank, in), `NAME.lora_b`: (out, rank), rows as in the GGUF base.
    """

    architecture: str
    name: str
    alpha: float
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Placed:
    """A layer, the base's tensor it belongs to, and where its rows stand in that tensor.

    Row i of the tensor is row `rows_O[i]` of the trained layer. O: outputs.
    """

    layer: AdaptedLayer
    tensor: str
    rows_O: torch.Tensor


def write(
    path: Path,
    layers: Sequence[AdaptedLayer],
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Write the adapter atomically, then read it back and compare every tensor.

    `layers` as trained on the transformers model of `config`; `dtype` is torch.float32 or
    torch.float16, `name` is shown by llama.cpp.

    Raises:
        UserError: if gguf is not installed or llama.cpp cannot express the adapter, with everything
            that stands in the way; nothing is written then.
        WorkError: if a value does not fit `dtype` or the file does not hold what was written.
    """
    placed = _place(layers, config)
    tensors = _tensors(placed, dtype)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"{path}: {key} holds values that are not finite in {dtype}")
    temporary = path.with_name(f"{path.name}.tmp")
    _write_file(temporary, _family(config).architecture, name, placed[0].layer.alpha, tensors)
    sync(temporary)
    replace(temporary, path)
    verify(path, layers, config, dtype=dtype)


def verify(
    path: Path, layers: Sequence[AdaptedLayer], config: PretrainedConfig, *, dtype: torch.dtype
) -> None:
    """Compare a file with the trained layers: architecture, alpha, names, shapes and values.

    The rows are put back in transformers' order first, so the values compared are the trained ones.

    Raises:
        UserError: as `write` does.
        WorkError: naming the first differences.
    """
    placed, stored = _place(layers, config), read_back(path)
    architecture, alpha = _family(config).architecture, float(np.float32(placed[0].layer.alpha))
    differences = []
    if stored.architecture != architecture:
        differences.append(f"the architecture is {stored.architecture}, not {architecture}")
    if stored.alpha != alpha:
        differences.append(f"alpha is {stored.alpha}, not {alpha}")
    sides = {f"{one.tensor}.lora_{side}" for one in placed for side in "ab"}
    differences += [f"{key} is missing" for key in sorted(sides - set(stored.tensors))]
    differences += [f"{key} is not expected" for key in sorted(set(stored.tensors) - sides)]
    for one in placed:
        differences += _differences(one, stored.tensors, dtype)
    if differences:
        raise WorkError(f"{path} is not what was written: {'; '.join(differences[:5])}")


def read_back(path: Path) -> StoredAdapter:
    """Read a GGUF LoRA adapter.

    Raises:
        UserError: if gguf is not installed.
        WorkError: if the file is no LoRA adapter of llama.cpp.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # no magic number; cut short
        raise WorkError(f"{path} is no GGUF file: {error}") from error
    wanted = {
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.General.ARCHITECTURE: None,
        gguf.Keys.General.NAME: None,
        gguf.Keys.Adapter.LORA_ALPHA: None,
    }
    found = {key: reader.fields[key].contents() for key in wanted if key in reader.fields}
    for key, value in wanted.items():
        if key not in found or value not in (None, found[key]):
            raise WorkError(f"{path} is no LoRA adapter: {key} is {found.get(key)!r}")
    return StoredAdapter(
        architecture=found[gguf.Keys.General.ARCHITECTURE],
        name=found[gguf.Keys.General.NAME],
        alpha=float(found[gguf.Keys.Adapter.LORA_ALPHA]),
        tensors={one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors},
    )


def _gguf() -> Any:
    """The gguf package, which is optional."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise user_error("GGUF adapter", f"the package gguf is missing: {INSTALL}") from error
    return gguf


def _family(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise user_error(
            f"model type {config.model_type!r}",
            "no GGUF adapter can be written for it; merge the adapter into the model and convert "
            f"that with llama.cpp instead. Model types known here: {', '.join(FAMILIES)}",
        )
    return FAMILIES[config.model_type]


def _place(layers: Sequence[AdaptedLayer], config: PretrainedConfig) -> list[_Placed]:
    """Find every layer's tensor, or raise one UserError with all that cannot be expressed."""
    family, names = _family(config), _name_map(config)
    problems = _alpha_problems(layers)
    if any(layer.magnitude is not None for layer in layers):
        what = "llama.cpp does not know DoRA; use --merge and convert the merged model"
        problems.append(Problem("GGUF adapter", what))
    placed: list[_Placed] = []
    for layer in layers:
        tensor = names.get_name(layer.path.replace("model.language_model.", "model.", 1))
        trouble = _trouble(layer, tensor, config)
        if trouble is not None or tensor is None:
            problems.append(Problem(layer.path, f"llama.cpp cannot load its adapter: {trouble}"))
        else:
            placed.append(_Placed(layer, f"{tensor}.weight", _rows(layer, family, config)))
    taken: dict[str, str] = {}
    for one in placed:
        other = taken.setdefault(one.tensor, one.layer.path)
        if other != one.layer.path:
            problems.append(Problem(one.layer.path, f"shares {one.tensor} with {other}"))
    if problems:
        raise UserError(problems)
    return placed


def _name_map(config: PretrainedConfig) -> TensorNameMap:
    """gguf-py's map from the layers' paths to tensor names, for this architecture and depth."""
    gguf, wanted = _gguf(), _family(config).architecture
    known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
    if wanted not in known:
        raise user_error(
            f"model type {config.model_type!r}", f"this gguf is too old to know {wanted}: {INSTALL}"
        )
    blocks: int = config.get_text_config().num_hidden_layers
    return gguf.get_tensor_name_map(known[wanted], blocks)  # type: ignore[no-any-return]


def _alpha_problems(layers: Sequence[AdaptedLayer]) -> list[Problem]:
    """The file has one alpha, and llama.cpp takes an alpha of zero for "do not scale"."""
    alphas = sorted({layer.alpha for layer in layers})
    if not alphas:
        return [Problem("GGUF adapter", "there are no layers to write")]
    if len(alphas) > 1:
        found = ", ".join(f"{alpha:g}" for alpha in alphas)
        return [Problem("GGUF adapter", f"llama.cpp knows one alpha for all layers, got {found}")]
    if alphas[0] == 0:
        return [Problem("GGUF adapter", "llama.cpp does not scale by an alpha of 0; merge instead")]
    return []


def _trouble(layer: AdaptedLayer, tensor: str | None, config: PretrainedConfig) -> str | None:
    """Why llama.cpp cannot load the adapter of one layer, or None."""
    if tensor is None:
        return f"{config.model_type} has no tensor for this layer in GGUF"
    if layer.down.ndim != 2 or layer.up.ndim != 2:
        return f"{tensor} is no matrix (convolutions and stacked experts have no LoRA there)"
    if tensor.endswith("_exps"):
        return f"{tensor} holds all experts in one tensor"
    if tensor == "token_embd":
        return "embeddings are not written"
    if tensor == "output" and config.tie_word_embeddings:
        return "the head is tied to the embeddings, so GGUF stores no tensor for it"
    if ".linear_attn." in layer.path:
        return "the converter reorders the heads of linear attention"
    return None


def _rows(layer: AdaptedLayer, family: Family, config: PretrainedConfig) -> torch.Tensor:
    """The order of a layer's rows in the GGUF base, as indices of trained rows. Shape (out,).

    In transformers rotary pair i of a head is rows i and i + half of that head; where llama.cpp
    computes on pairs side by side (its NORM rope), they are rows 2i and 2i + 1.
    """
    rows_O = torch.arange(layer.up.shape[0])
    text = config.get_text_config()
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    kind = layer.path.rpartition(".")[2]
    if not family.interleaved or kind not in heads:
        return rows_O
    return rows_O.view(heads[kind], 2, -1).transpose(1, 2).reshape(-1)


def _tensors(placed: Sequence[_Placed], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The file's tensors: `NAME.lora_a` (rank, in) and `NAME.lora_b` (out, rank) for each layer."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {DTYPES}")
    tensors: dict[str, torch.Tensor] = {}
    for one in placed:
        tensors[f"{one.tensor}.lora_a"] = one.layer.down.to(dtype).contiguous()
        tensors[f"{one.tensor}.lora_b"] = one.layer.up[one.rows_O].to(dtype).contiguous()
    return tensors


def _write_file(
    path: Path, architecture: str, name: str, alpha: float, tensors: Mapping[str, torch.Tensor]
) -> None:
    gguf = _gguf()
    half = any(tensor.dtype == torch.float16 for tensor in tensors.values())
    kind = gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _differences(one: _Placed, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[str]:
    """Which of a layer's two tensors, rows in the trained order again, are not the trained ones."""
    found: list[str] = []
    for key, trained in {
        f"{one.tensor}.lora_a": one.layer.down,
        f"{one.tensor}.lora_b": one.layer.up,
    }.items():
        if key not in stored:
            continue
        tensor = stored[key]
        if key.endswith(".lora_b") and tensor.shape[0] == len(one.rows_O):
            tensor = tensor[torch.argsort(one.rows_O)]
        if tensor.dtype != dtype or not torch.equal(tensor, trained.to(dtype)):
            found.append(f"{key} differs from {one.layer.path}")
    return found
