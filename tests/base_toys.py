"""Toy language models in the layouts that transformers does not write: GGUF, and ChatGLM's own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from torch import nn

from tests import text_toys
from tests.models import chatglm_reference as reference
from tests.models import test_chatglm as chatglm_toys

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(path: Path, file_type: str = "ALL_F32") -> Path:
    """A LLaMA with its tokenizer and chat template as one .gguf file, of this llama.cpp type."""
    model = text_toys.model("llama", intermediate_size=64)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    add_facts(writer, model)
    _add_tokenizer(writer, text_toys.chatml_tokenizer())
    kind = gguf.GGMLQuantizationType[file_type.removeprefix("MOSTLY_").removeprefix("ALL_")]
    for name, parameter in model.named_parameters():
        weight = _in_ggufs_order(name, parameter.data, model)
        kept = gguf.GGMLQuantizationType.F32 if parameter.ndim == 1 else kind
        writer.add_tensor(_gguf_name(name), quantize(weight.numpy(), kept), raw_dtype=kept)
    finish(writer)
    return path


def add_facts(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    """The keys of a dense decoder that readers of GGUF need."""
    config: Any = model.config
    layers: Any = model.get_submodule("model.layers")
    head_dim = layers[0].self_attn.head_dim
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in described["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in described["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{suffix}"
    _, _, number, kind = stem.split(".", 3)
    return f"blk.{number}.{GGUF_NAMES[kind]}.{suffix}"


def _in_ggufs_order(name: str, weight: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """llama.cpp has the two rows of a rotary pair side by side, transformers half a head apart."""
    config: Any = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    return weight.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


@functools.cache
def _sentencepiece() -> bytes:
    return chatglm_toys.train_sentencepiece(**chatglm_toys.KEEPING)


def save_chatglm(folder: Path, name: str = "chatglm3") -> Path:
    """ChatGLM2, ChatGLM3 or GLM-4 (`chatglm2`, `chatglm3`, `glm4`) in the original layout."""
    is_glm4 = name == "glm4"
    content = chatglm_toys.rank_file(chatglm_toys.train_ranks()) if is_glm4 else _sentencepiece()
    changes: dict[str, Any] = {"padded_vocab_size": 544, "torch_dtype": "float32"}
    if is_glm4:
        changes |= {"eos_token_id": [476, 482, 484], "pad_token_id": 476}
    config = reference.small(name, **changes)
    chatglm_toys.write(folder, config, reference.tensors(config), shards=2)
    (folder / "tokenizer.model").write_bytes(content)
    return folder
