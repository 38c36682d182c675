"""Attention of rows laid end to end, against the same with a block mask written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_scripts.models import packing
from tests import text_toys

LENGTHS = {"short": [5, 1, 9, 17], "long": [300, 3, 270], "one": [40]}


def block_mask(lengths: list[int], window: int | None) -> torch.Tensor:
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    steps = torch.arange(len(rows))
    back = steps[:, None] - steps[None, :]
    return (rows[:, None] == rows[None, :]) & (back >= 0) & (back < (window or len(rows)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_each_row_sees_itself_alone(name: str, window: int | None, softcap: float | None) -> None:
    lengths = LENGTHS[name]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    found, _ = packing.segment_attention(
        nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap,
        cu_seq_lens_q=packing.layout(lengths)["cu_seq_lens_q"], dropout=0.0,
    )  # fmt: skip
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~block_mask(lengths, window), float("-inf"))
    expected = (scores.softmax(-1) @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert torch.allclose(found, expected, atol=2e-5)
    weights = torch.randn(expected.shape, generator=generator)
    for tensor in (query, key, value):
        (a,) = torch.autograd.grad((found * weights).sum(), tensor, retain_graph=True)
        (b,) = torch.autograd.grad((expected * weights).sum(), tensor, retain_graph=True)
        assert torch.allclose(a, b, atol=1e-4)


def test_the_layout_of_rows() -> None:
    found = packing.layout([3, 1, 2])
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert found["cu_seq_lens_q"] == (0, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [a for a in text_toys.ARCHITECTURES if a != "lfm2"])
def test_attention_models_may_be_packed(architecture: str, dtype: torch.dtype) -> None:
    model = text_toys.model(architecture).to(dtype)
    before = model.config._attn_implementation
    assert packing.why_not(model) is None
    assert model.config._attn_implementation == before


def test_what_carries_a_state_may_not() -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig, MambaConfig, Qwen3NextConfig

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    reasons = {
        "mamba": MambaConfig(**common),
        "next": Qwen3NextConfig(**common, layer_types=["linear_attention", "full_attention"]),
        "sinks": GptOssConfig(**common, num_local_experts=2, num_experts_per_tok=1, head_dim=8),
    }
    found = {
        name: packing.why_not(AutoModelForCausalLM.from_config(config))
        for name, config in reasons.items()
    }
    assert all(found.values())
    assert "linear_attention" in str(found["next"]) and "sinks" in str(found["sinks"])


def test_a_leak_is_seen_when_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the config told nothing, the trial would: LFM2's convolutions reach over the border."""
    model = text_toys.model("lfm2")
    monkeypatch.setattr(packing, "_ATTENDING", {*packing._ATTENDING, "conv"})
    assert packing.why_not(model) == "a row was seen to change the one after it"
