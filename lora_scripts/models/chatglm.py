"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in their original layout, as transformers' GlmForCausalLM.

These folders name Python code of their own (`modeling_chatglm.py`), which no longer runs on
today's transformers and is never run here. The layer is the same in all three: RMSNorm, attention
with grouped keys and values, rotary positions on the first half of each head with neighbouring
numbers as pairs, SwiGLU. That is what transformers calls GLM (`models/glm`); names differ, and
query, key and value are one weight.

What `rope_ratio` means differs by generation and is not told by config.json: the code of
ChatGLM2-6B-32K divides the positions by it (positional interpolation, arXiv 2306.15595), that of
ChatGLM3-6B-32K and of GLM-4 multiplies the base 10000 (see ztxz16/fastllm issue 374). How the two
are told apart: `rope_rule`. Angles are computed in float32 here, as in ChatGLM3 and GLM-4; the code
of ChatGLM2 computes them in the weights' float16, which holds no odd position above 2048.

Letters of shapes: O, the rows of the fused weight; I, the width of the model.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.models import chatglm_tokenizer, foreign
from lora_scripts.models.chatglm_tokenizer import Generation
from lora_scripts.models.header import read_header
from lora_scripts.models.json_file import MOST_LAYERS, read_json
from lora_scripts.models.lora import AdaptedLayer

if TYPE_CHECKING:
    from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

Rope = Literal["base", "positions"]  # what rope_ratio acts on: it multiplies, or it divides

_BASE = 10000.0
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMES = re.compile(r"chatglm[-_]?([23])|(codegeex2)|(glm-?4)", re.IGNORECASE)
_NEEDED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "seq_length",
    "layernorm_epsilon",
)
# Fields for which GLM in transformers knows one value only, which is also their published default.
_ONE_VALUE: Mapping[str, tuple[Any, str]] = {
    "rmsnorm": (True, "LayerNorm instead of RMSNorm"),
    "post_layer_norm": (True, "no norm before the output layer"),
    "apply_residual_connection_post_layernorm": (False, "residuals taken after the norm"),
    "add_bias_linear": (False, "biases in every linear layer"),
    "fp32_residual_connection": (False, "residuals in another precision"),
    "interleaved_qkv": (False, "another order of the fused weight"),
    "rotary_percent": (0.5, "rotary positions on another part of the head"),
    "hidden_dropout": (0.0, "dropout of the hidden states"),
    "pre_seq_len": (None, "prefix tuning (P-Tuning v2)"),
    "quantization_bit": (0, "quantised weights; take the unquantised model"),
    "vision_config": (None, "an image encoder (GLM-4V)"),
}

_TOP = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_COMPUTED = "transformer.rotary_pos_emb.inv_freq"  # stored, but no weight: computed from the config
_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",  # both have the gate's half first
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_FUSED = re.compile(r"self_attention\.query_key_value\.(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")
_MODULES = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_ADAPTED = re.compile(r"model\.layers\.(\d+)\.(.+)")


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is one of the original layout, of any generation."""
    return config.get("model_type") == "chatglm"


def generation(path: Path, config: Mapping[str, Any]) -> Generation | None:
    """Which of the three a folder holds; None if nothing in it tells.

    GLM-4's `tokenizer.model` is a list of ranks, that of the others a sentencepiece model. Between
    these decides, in this order: `tokenization_chatglm.py`, read as text (ChatGLM3's names the
    roles, ChatGLM2's does not); role tokens in `tokenizer_config.json`; the model's name in
    `_name_or_path` of config.json or `name_or_path` of tokenizer_config.json.
    """
    if chatglm_tokenizer.is_rank_file(path / "tokenizer.model"):
        return 4
    code = _text(path / "tokenization_chatglm.py")
    if code:
        return 4 if "tiktoken" in code else 3 if "<|user|>" in code else 2
    settings = _text(path / "tokenizer_config.json")
    if "<|user|>" in settings:
        return 4 if "<|endoftext|>" in settings else 3
    name = re.search(r'"name_or_path"\s*:\s*"([^"]*)"', settings)
    return _by_name(config) or _by_name({"_name_or_path": name[1] if name else ""})


def rope_rule(path: Path, config: Mapping[str, Any]) -> Rope | None:
    """What `rope_ratio` acts on; None if nothing in the folder tells.

    The folder's `modeling_chatglm.py` decides, read as text; without it, the generation does.
    """
    code = re.sub(r"\s+", "", _text(path / "modeling_chatglm.py"))
    multiplies, divides = "base*self.rope_ratio" in code, "/self.rope_ratio" in code
    if multiplies != divides:
        return "base" if multiplies else "positions"
    return _rope_of(generation(path, config))


def convert_config(
    config: Mapping[str, Any], rope: Rope | None = None, where: str = "config.json"
) -> GlmConfig:
    """The same model in the terms of transformers' GLM.

    Args:
        config: config.json of the original layout.
        rope: What `rope_ratio` acts on. None: told from the name in config.json, if it matters.
        where: The place that problems name.

    Raises:
        UserError: Fields are missing, or ask for what GLM in transformers cannot do; all of them.
    """
    from transformers import GlmConfig

    rope = rope or _rope_of(_by_name(config))
    if problems := [Problem(where, what) for what in _config_problems(config, rope)]:
        raise UserError(problems)
    with foreign.reading(Path(where), "the model's config"):
        converted = GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=_groups(config),
            head_dim=_head_dim(config),
            hidden_act="silu",
            attention_dropout=config.get("attention_dropout") or 0.0,
            attention_bias=bool(config.get("add_qkv_bias", False)),
            max_position_embeddings=config["seq_length"],
            rms_norm_eps=config["layernorm_epsilon"],
            rope_parameters=_rope_parameters(config, rope),
            tie_word_embeddings=False,
            pad_token_id=config.get("pad_token_id"),
            eos_token_id=config.get("eos_token_id"),
            architectures=["GlmForCausalLM"],
        )
    # Where the original names no token, GlmConfig would put GLM-4's.
    converted.eos_token_id = config.get("eos_token_id")
    return converted


def load(path: Path, dtype: torch.dtype) -> GlmForCausalLM:
    """The model of a folder in the original layout, from its .safetensors files.

    Every tensor of the files is used (but for the stored rotary frequencies, which are computed),
    and every weight comes from them. One tensor of the file is held at a time beside the model.

    Returns:
        The model on the CPU, in evaluation mode, its weights as `dtype`.

    Raises:
        UserError: There are no .safetensors files; the config asks for what cannot be done; tensors
            are missing, unknown, or of a wrong shape or type.
    """
    from safetensors import safe_open
    from transformers import GlmForCausalLM
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

    config = read_json(path / "config.json")
    files = _files(path)
    settings = convert_config(config, rope_rule(path, config), str(path / "config.json"))
    settings.dtype = dtype
    with torch.device("meta"):
        model = GlmForCausalLM(settings)
    _check_tensors(path, files, config, model.state_dict())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name != _COMPUTED:
                    _fill(model, _convert(name, tensors.get_tensor(name), config), dtype)
    # Computed, not stored: left on the meta device above.
    model.model.rotary_emb = GlmRotaryEmbedding(settings)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, left
    model.eval()
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder in the original layout, as a fast one, with our chat template.

    See `chatglm_tokenizer`.

    Raises:
        UserError: There is no whole `tokenizer.model`, it is of a kind that cannot be expressed, or
            nothing tells ChatGLM2 from ChatGLM3.
    """
    config = read_json(path / "config.json")
    found = generation(path, config)
    if found is None:
        raise user_error(
            str(path),
            "nothing here tells ChatGLM2 from ChatGLM3, which are asked in different words. Put "
            "the model's tokenization_chatglm.py beside the weights (it is read, not run), or "
            'write its name into config.json: "_name_or_path": "THUDM/chatglm3-6b"',
        )
    return chatglm_tokenizer.load(path, found, length=config.get("seq_length"))


def original_names(layers: Sequence[AdaptedLayer], config: Mapping[str, Any]) -> list[AdaptedLayer]:
    """The adapters of a `GlmForCausalLM` under the module names of the original code.

    The adapters of q, k and v become one of `query_key_value`: the downs stacked, the ups in the
    rows of the fused weight that are theirs, zeros elsewhere. Its rank is the sum of theirs, its
    alpha grows alike, so that the update (alpha / rank) * up @ down is the same matrix.

    Args:
        layers: As `lora.layers` gives them.
        config: config.json of the original layout.

    Raises:
        UserError: A layer has no counterpart.
    """
    fused: dict[str, dict[str, AdaptedLayer]] = defaultdict(dict)
    renamed: dict[str, AdaptedLayer | None] = {}  # in order of the layers; None: to be fused
    if any(layer.magnitude is not None for layer in layers):
        raise user_error("DoRA", "has no form under the fused names of ChatGLM; use --merge")
    for layer in layers:
        match = _ADAPTED.fullmatch(layer.path)
        module, part = match[2] if match else "", layer.path.rpartition(".")[2]
        prefix = f"transformer.encoder.layers.{match[1]}" if match else ""
        if module == f"self_attn.{part}" and part in _PARTS:
            path = f"{prefix}.self_attention.query_key_value"
            fused[path][part] = layer
            renamed[path] = None
        elif module in _MODULES:
            path = f"{prefix}.{_MODULES[module]}"
            renamed[path] = AdaptedLayer(path, layer.down, layer.up, layer.alpha)
        else:
            raise user_error(layer.path, "the original ChatGLM layout has no such layer")
    rows = _rows(config)
    return [layer or _fuse(path, fused[path], rows) for path, layer in renamed.items()]


def _fuse(path: str, parts: Mapping[str, AdaptedLayer], rows: Mapping[str, Tensor]) -> AdaptedLayer:
    """One adapter of the fused weight from those of q, k and v that there are."""
    present = [(rows[part], parts[part]) for part in _PARTS if part in parts]
    rank = sum(layer.down.shape[0] for _, layer in present)
    scale = present[0][1].alpha / present[0][1].down.shape[0]
    up = torch.zeros(sum(len(index) for index in rows.values()), rank)
    start = 0
    for index, layer in present:
        own = layer.down.shape[0]
        up[index, start : start + own] = layer.up * (layer.alpha / own / scale)
        start += own
    return AdaptedLayer(path, torch.cat([layer.down for _, layer in present]), up, scale * rank)


def _rows(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which rows of the fused weight are the query's, the key's and the value's, in their order.

    With `multi_query_attention` all queries come first, then the keys, then the values; without
    it, each head has its own query, key and value side by side.
    """
    heads, size, groups = config["num_attention_heads"], _head_dim(config), _groups(config)
    if config.get("multi_query_attention", False):
        counts = [heads * size, groups * size, groups * size]
        parts = torch.split(torch.arange(sum(counts)), counts)
    else:
        rows_HPD = torch.arange(heads * 3 * size).view(heads, 3, size)  # heads, parts, numbers
        parts = tuple(rows_HPD[:, part].flatten() for part in range(3))
    return dict(zip(_PARTS, parts, strict=True))


def _convert(name: str, tensor: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A tensor of the original layout, under transformers' names; the fused ones as three."""
    return {
        new: tensor if rows is None else tensor[rows] for new, rows in _places(name, config).items()
    }


def _places(name: str, config: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Where a tensor goes: names, each with the rows that go there (None: all). {}: unknown."""
    if name in _TOP:
        return {_TOP[name]: None}
    match = _LAYER.fullmatch(name)
    if match is None:
        return {}
    prefix = f"model.layers.{int(match[1])}"
    if match[2] in _IN_LAYER:
        return {f"{prefix}.{_IN_LAYER[match[2]]}": None}
    if fused := _FUSED.fullmatch(match[2]):
        rows = _rows(config)
        return {f"{prefix}.self_attn.{part}.{fused[1]}": rows[part] for part in _PARTS}
    return {}


def _check_tensors(
    path: Path, files: Sequence[Path], config: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> None:
    """The headers of the files against the weights that the model has, before anything is read."""
    fused_rows = sum(len(rows) for rows in _rows(config).values())
    given: set[str] = set()
    problems: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name, info in read_header(file).items():
            places = _places(name, config)
            if name == _COMPUTED:
                continue
            if not places or not places.keys() <= expected.keys():
                problems["unknown"].append(name)
                continue
            if info.dtype not in _FLOATS:
                problems["of a type that is no float"].append(f"{name} ({info.dtype})")
            if places.keys() & given:
                problems["there twice"].append(name)
            given |= places.keys()
            shape = tuple(expected[next(iter(places))].shape)
            shape = shape if len(places) == 1 else (fused_rows, *shape[1:])
            if info.shape != shape:
                problems["of a wrong shape"].append(f"{name} {info.shape} instead of {shape}")
    problems["missing (transformers' names)"] = [name for name in expected if name not in given]
    found = [
        f"{len(names)} tensors {what}: {_some(names)}" for what, names in problems.items() if names
    ]
    if found:
        raise user_error(str(path), f"does not fit its config.json: {'; '.join(found)}")


def _fill(model: GlmForCausalLM, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give the model on the meta device some of its weights, copied, as `dtype`."""
    copies = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}
    unknown = model.load_state_dict(copies, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown


def _files(path: Path) -> list[Path]:
    """The .safetensors files that hold the weights."""
    index = path / _INDEX
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if outside := [name for name in names if Path(name).name != name]:
        raise user_error(str(index), f"names files outside the folder: {_some(outside)}")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise user_error(str(path), f"{_some(missing)} missing; fetch the folder whole")
    if names:
        return [path / name for name in names]
    what = "there are no .safetensors weights; fetch the folder whole"
    if pickled := sorted(file.name for file in path.glob("*.bin")):
        what = (
            f"there is only {pickled[0]}, a Python pickle, which can run any code and is never "
            "opened here. GLM-4-9B and newer revisions of ChatGLM3-6B have .safetensors; else, in "
            "a program you trust, load the tensors and save them by safetensors.torch.save_file"
        )
    raise user_error(str(path), what)


def _config_problems(config: Mapping[str, Any], rope: Rope | None) -> Iterator[str]:
    if "position_encoding_2d" in config or "inner_hidden_size" in config:
        yield (
            "this is ChatGLM-6B, the first generation, another architecture; ChatGLM2-6B, "
            "ChatGLM3-6B and GLM-4-9B are taken"
        )
        return
    missing = [name for name in _NEEDED if config.get(name) is None]
    yield from (f"{name} is missing" for name in missing)
    for name, (only, meaning) in _ONE_VALUE.items():
        found = config.get(name, only)
        if found != only and (found or only):  # an absent thing may be null, 0 or false
            yield f"found {name}: {json.dumps(found)}, expected {json.dumps(only)} ({meaning})"
    numbers = [*_NEEDED[:-1], "multi_query_group_num", "kv_channels"]  # all but the epsilon
    odd = [name for name in numbers if not _is_count(config.get(name, 1))]
    yield from (f"found {name}: {json.dumps(config[name])}, expected a count" for name in odd)
    if missing or odd:
        return
    if config["num_layers"] > MOST_LAYERS:
        yield f"found num_layers: {config['num_layers']}; no model has so many"
    heads, groups, size = config["num_attention_heads"], _groups(config), _head_dim(config)
    if heads % groups:
        yield f"found multi_query_group_num: {groups}, expected a divisor of {heads} heads"
    if size % 4:
        yield f"found kv_channels: {size}, expected a multiple of 4 (half of it turns in pairs)"
    ratio = config.get("rope_ratio", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio <= 0:
        yield f"found rope_ratio: {json.dumps(ratio)}, expected a number above 0"
    elif ratio != 1 and rope is None:
        yield (
            f"found rope_ratio: {ratio}, which ChatGLM2 divides positions by and ChatGLM3 and "
            "GLM-4 multiply the rotary base by, and nothing tells which this is. Put the model's "
            "modeling_chatglm.py beside the weights (it is read, not run), or write its name into "
            'config.json: "_name_or_path": "THUDM/chatglm3-6b-32k"'
        )


def _is_count(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _rope_parameters(config: Mapping[str, Any], rope: Rope | None) -> dict[str, Any]:
    """`rope_ratio` in transformers' terms: another base, or "linear" scaling of the positions."""
    ratio = float(config.get("rope_ratio", 1))
    half = {"partial_rotary_factor": 0.5}
    if rope == "positions" and ratio != 1:
        return {"rope_type": "linear", "factor": ratio, "rope_theta": _BASE, **half}
    return {"rope_type": "default", "rope_theta": _BASE * ratio, **half}


def _groups(config: Mapping[str, Any]) -> int:
    """How many keys and values there are: one per group, or one per head."""
    if config.get("multi_query_attention", False):
        return int(config.get("multi_query_group_num") or 1)
    return int(config["num_attention_heads"])


def _head_dim(config: Mapping[str, Any]) -> int:
    size = config.get("kv_channels")
    return int(size or config["hidden_size"] // config["num_attention_heads"])


def _by_name(config: Mapping[str, Any]) -> Generation | None:
    """The generation that the model's name tells; the last part of a path that tells one counts."""
    found = list(_NAMES.finditer(str(config.get("_name_or_path", ""))))
    if not found:
        return None
    version, _, glm4 = found[-1].groups()
    return 4 if glm4 else 3 if version == "3" else 2  # CodeGeeX2 is a ChatGLM2


def _rope_of(known: Generation | None) -> Rope | None:
    return None if known is None else "positions" if known == 2 else "base"


def _text(path: Path) -> str:
    """A text file's content, "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
