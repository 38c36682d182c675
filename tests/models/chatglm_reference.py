"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B written out in plain torch, to hold the conversion against.

Facts, not code of anybody: the architecture as THUDM's `modeling_chatglm.py` has it (ChatGLM2-6B
and 2-6B-32K; ChatGLM3-6B and 3-6B-32K; GLM-4-9B), read in 2026-11. The names and shapes of the
tensors are those of `model.safetensors.index.json` of ChatGLM3-6B; its 200 weights and the stored
rotary frequencies are counted in the tests. Nothing here uses transformers or the package.

Per layer: x += dense(attention(norm(x))), x += down(silu(gate) * up) of norm(x), with RMSNorm. Of
each head the first half is turned by its position, in pairs of neighbouring numbers; the second
half is left alone. `query_key_value` holds, with `multi_query_attention`, all queries, then the
keys, then the values of the groups; without it, query, key and value of head 1, of head 2, …

Letters of shapes: B batch, T tokens, H heads, D numbers of a head, W width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

# config.json of the real models, without what says nothing of the architecture.
_SHARED = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_SIX_B = {
    "num_layers": 28,
    "layernorm_epsilon": 1e-05,
    "padded_vocab_size": 65024,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
REAL: Mapping[str, dict[str, Any]] = {
    "chatglm2": {
        **_SHARED,
        **_SIX_B,
        "_name_or_path": "THUDM/chatglm2-6b",
        "seq_length": 32768,
    },
    "chatglm3": {
        **_SHARED,
        **_SIX_B,
        "_name_or_path": "THUDM/chatglm3-6b",
        "seq_length": 8192,
    },
    "glm4": {
        **_SHARED,
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "num_layers": 40,
        "layernorm_epsilon": 1.5625e-07,
        "padded_vocab_size": 151552,
        "seq_length": 131072,
        "rope_ratio": 500,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    },
}
# The same models, small enough to be run in a moment.
SMALL = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "padded_vocab_size": 384,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the small model, with changes; None takes a field away."""
    changed = {**REAL[name], **SMALL, **changes}
    return {field: value for field, value in changed.items() if value is not None}


def facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of all tensors of a checkpoint."""
    width, ffn = config["hidden_size"], config["ffn_hidden_size"]
    heads, size = config["num_attention_heads"], config["kv_channels"]
    grouped = config.get("multi_query_attention", False)
    fused = (heads + 2 * (config["multi_query_group_num"] if grouped else heads)) * size
    yield "transformer.embedding.word_embeddings.weight", (config["padded_vocab_size"], width)
    yield "transformer.rotary_pos_emb.inv_freq", (size // 4,)
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.self_attention.query_key_value.weight", (fused, width)
        if config.get("add_qkv_bias", False):
            yield f"{layer}.self_attention.query_key_value.bias", (fused,)
        yield f"{layer}.self_attention.dense.weight", (width, heads * size)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
        yield f"{layer}.mlp.dense_h_to_4h.weight", (2 * ffn, width)
        yield f"{layer}.mlp.dense_4h_to_h.weight", (width, ffn)
    yield "transformer.encoder.final_layernorm.weight", (width,)
    yield "transformer.output_layer.weight", (config["padded_vocab_size"], width)


def tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random float32 numbers; large enough that attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in facts(config)}
    for name, tensor in made.items():
        if name.endswith("norm.weight"):
            tensor.mul_(0.2).add_(1)
        elif tensor.ndim == 2:
            tensor.div_(math.sqrt(tensor.shape[1]) / 2)
    made["transformer.rotary_pos_emb.inv_freq"] = torch.full_like(
        made["transformer.rotary_pos_emb.inv_freq"],
        7.0,  # no one reads it
    )
    return made


def logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    ids_BT: Tensor,
    positions_T: Tensor,
    *,
    divides: bool,
) -> Tensor:
    """Logits (B, T, V) of the model. `divides`: what rope_ratio does, as in ChatGLM2-6B-32K."""
    x_BTW = weights["transformer.embedding.word_embeddings.weight"][ids_BT]
    epsilon = config["layernorm_epsilon"]
    for number in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{number}."
        layer = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        normed = _rms_norm(x_BTW, layer["input_layernorm.weight"], epsilon)
        mixed = _attention(config, layer, normed, positions_T, divides)
        x_BTW = x_BTW + mixed @ layer["self_attention.dense.weight"].T
        normed = _rms_norm(x_BTW, layer["post_attention_layernorm.weight"], epsilon)
        gate, up = (normed @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x_BTW = x_BTW + (gate * gate.sigmoid() * up) @ layer["mlp.dense_4h_to_h.weight"].T
    x_BTW = _rms_norm(x_BTW, weights["transformer.encoder.final_layernorm.weight"], epsilon)
    return x_BTW @ weights["transformer.output_layer.weight"].T


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _attention(
    config: Mapping[str, Any],
    layer: Mapping[str, Tensor],
    x_BTW: Tensor,
    positions_T: Tensor,
    divides: bool,
) -> Tensor:
    """Causal attention, the heads' results side by side: (B, T, H * D)."""
    heads, size = config["num_attention_heads"], config["kv_channels"]
    fused = x_BTW @ layer["self_attention.query_key_value.weight"].T
    if config.get("add_qkv_bias", False):
        fused = fused + layer["self_attention.query_key_value.bias"]
    batch, length, _ = x_BTW.shape
    if config.get("multi_query_attention", False):
        groups = config["multi_query_group_num"]
        all_heads = fused.view(batch, length, heads + 2 * groups, size)
        query = all_heads[:, :, :heads]
        key, value = all_heads[:, :, heads : heads + groups], all_heads[:, :, heads + groups :]
    else:
        groups = heads
        query, key, value = fused.view(batch, length, heads, 3, size).unbind(3)
    query = _turn(config, query, positions_T, divides)
    key = _turn(config, key, positions_T, divides)
    results = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        results.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, :, group])
    return torch.cat(results, dim=-1)


def _turn(config: Mapping[str, Any], x_BTHD: Tensor, positions_T: Tensor, divides: bool) -> Tensor:
    """The first half of each head turned: its pairs of neighbours as complex numbers."""
    turned = config["kv_channels"] // 2
    ratio = float(config.get("rope_ratio", 1))
    base = 10000.0 if divides else 10000.0 * ratio
    places = positions_T.double() / (ratio if divides else 1.0)
    speeds = base ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angles = torch.outer(places, speeds)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    first = torch.view_as_complex(x_BTHD[..., :turned].double().unflatten(-1, (-1, 2)))
    first = torch.view_as_real(first * turns).flatten(-2).to(x_BTHD.dtype)
    return torch.cat([first, x_BTHD[..., turned:]], dim=-1)
