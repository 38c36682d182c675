"""Toy-sized language models of the real classes, and small data sets of real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.data import chat_toys

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# transformers' model_type -> what differs from the above
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "glm": {},
    "glm4": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "mistral": {"sliding_window": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "smollm3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


def chatml_tokenizer() -> Any:
    """A byte-level tokenizer with a ChatML template that adds a system text of its own."""
    tokenizer = chat_toys.chatml_tokenizer()
    tokenizer.chat_template = chat_toys.CHATML
    return tokenizer


def model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, large enough that its layers matter to the output."""
    tokenizer = chatml_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    values = {**_COMMON, **tokens, **ARCHITECTURES[model_type], **changes}
    torch.manual_seed(seed)
    toy = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in toy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    return toy.eval()


def save_model(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A transformers folder of a toy model and its tokenizer."""
    model(model_type, **changes).save_pretrained(folder)
    chatml_tokenizer().save_pretrained(folder)
    return folder


def conversations(count: int = 12) -> list[dict[str, Any]]:
    """Short conversations of unequal lengths."""
    rows = []
    for number in range(count):
        turns = [
            {"role": "user", "content": f"What is number {number}?" + " Please." * (number % 4)},
            {"role": "assistant", "content": "It is " + "good " * (1 + number % 5) + "today."},
        ]
        if number % 3 == 0:
            turns += [
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": f"No, {number} is fine, thank you."},
            ]
        rows.append({"messages": turns})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A JSONL file of these rows, or of `conversations`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = conversations() if rows is None else rows
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
