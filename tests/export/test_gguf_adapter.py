"""GGUF adapters of real toy models: names, rows and scale, against llama.cpp's published layout."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig

from lora_scripts.errors import UserError, WorkError
from lora_scripts.export import gguf_adapter
from lora_scripts.models import lora
from lora_scripts.models.lora import AdaptedLayer
from tests import base_toys

gguf = pytest.importorskip("gguf")

RANK, ALPHA = 3, 5.0
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> what differs from COMMON; the architecture in GGUF; rows of q and k reordered?
TOYS: dict[str, tuple[dict[str, object], str, bool]] = {
    "llama": ({}, "llama", True),
    "mistral": ({"head_dim": 16}, "llama", True),
    "mixtral": ({"num_local_experts": 2}, "llama", True),
    "smollm3": ({}, "smollm3", True),
    "granite": ({}, "granite", True),
    "olmo": ({}, "olmo", True),
    "qwen2": ({}, "qwen2", False),
    "qwen3": ({"head_dim": 128}, "qwen3", False),  # transformers' GGUF reader knows no other
    "qwen3_moe": ({"num_experts": 2, "moe_intermediate_size": 32}, "qwen3moe", False),
    "gemma": ({"head_dim": 16}, "gemma", False),
    "gemma2": ({"head_dim": 16}, "gemma2", False),
    "gemma3_text": ({"head_dim": 16}, "gemma3", False),
    "glm": ({"head_dim": 16}, "chatglm", False),
    "glm4": ({"head_dim": 16}, "glm4", False),
    "phi": ({"num_key_value_heads": 8}, "phi2", False),
    "phi3": ({}, "phi3", False),
    "cohere2": ({}, "cohere2", False),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "lfm2", False),
}
# The published names of llama.cpp's tensors (gguf-py's constants), by what transformers calls them.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.out_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def toy(model_type: str) -> nn.Module:
    """A random model of the real class."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **TOYS[model_type][0]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def adapted(model: nn.Module, targets: Sequence[str] = ()) -> list[AdaptedLayer]:
    """Put random adapters on `targets`, or on every linear layer that is not the head."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    lora.attach(model, list(targets) or linear, rank=RANK, alpha=ALPHA, dropout=0, seed=1)
    for parameter in lora.trainable(model).values():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    return lora.layers(model)


def gguf_name(path: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `blk.3.ffn_up.weight`."""
    if path == "lm_head":
        return "output.weight"
    _, _, number, kind = path.split(".", 3)
    return f"blk.{number}.{NAMES[kind]}.weight"


def to_gguf(path: str, weight: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """llama.cpp's rule for the base, row by row: pairs of a head's two halves, side by side."""
    kind = path.rpartition(".")[2]
    if not TOYS[config.model_type][2] or kind not in ("q_proj", "k_proj"):
        return weight
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    half = weight.shape[0] // heads // 2
    rows = []
    for head in range(heads):
        for number in range(half):
            first = head * 2 * half + number
            rows += [weight[first], weight[first + half]]
    return torch.stack(rows)


def delta(stored: gguf_adapter.StoredAdapter, tensor: str) -> torch.Tensor:
    """What llama.cpp adds to a tensor: alpha over the tensor's own rank, times B A."""
    down, up = stored.tensors[f"{tensor}.lora_a"], stored.tensors[f"{tensor}.lora_b"]
    return stored.alpha / up.shape[1] * up.float() @ down.float()


@pytest.mark.parametrize("model_type", TOYS)
def test_the_file_adds_to_the_gguf_base_what_was_trained(tmp_path: Path, model_type: str) -> None:
    """to_gguf(W) + the file's update == to_gguf(W + (alpha / rank) up @ down), tensor by tensor."""
    model = toy(model_type)
    weights = {name: p.data.clone() for name, p in model.named_parameters()}
    layers, path = adapted(model), tmp_path / "x.gguf"
    gguf_adapter.write(path, layers, model.config, dtype=torch.float32, name="toy")
    stored = gguf_adapter.read_back(path)
    assert (stored.architecture, stored.name, stored.alpha) == (TOYS[model_type][1], "toy", ALPHA)
    assert len(stored.tensors) == 2 * len(layers) > 0
    for layer in layers:
        weight = weights[f"{layer.path}.weight"]
        trained = weight + ALPHA / RANK * layer.up @ layer.down
        expected = to_gguf(layer.path, trained, model.config)
        found = to_gguf(layer.path, weight, model.config) + delta(stored, gguf_name(layer.path))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_header_is_what_llama_cpp_checks(tmp_path: Path) -> None:
    model, path = toy("llama"), tmp_path / "x.gguf"
    layers = adapted(model, ["q_proj", "lm_head"])
    gguf_adapter.write(path, layers, model.config, dtype=torch.float16, name="toy")
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == ALPHA
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}  # innermost first
    assert shapes == {
        f"{name}.lora_{side}": [inner, outer]
        for name, rows in [
            ("blk.0.attn_q.weight", 64), ("blk.1.attn_q.weight", 64), ("output.weight", 96)
        ]
        for side, inner, outer in [("a", 64, RANK), ("b", RANK, rows)]
    }  # fmt: skip
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}


def test_every_architecture_named_is_one_of_ggufs() -> None:
    assert {family.architecture for family in gguf_adapter.FAMILIES.values()} <= set(
        gguf.MODEL_ARCH_NAMES.values()
    )


def write_base(path: Path, model: nn.Module, config: PretrainedConfig) -> None:
    """The base in llama.cpp's layout, with the keys that transformers' reader needs."""
    architecture = TOYS[config.model_type][1]
    writer = gguf.GGUFWriter(path, architecture)
    base_toys.add_facts(writer, model)
    norms = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    for key, parameter in model.named_parameters():
        stem, _, suffix = key.rpartition(".")
        name = norms.get(key)
        if name is None:
            _, _, number, kind = stem.split(".", 3)
            name = f"blk.{number}.{ {**NAMES, **inner}[kind] }.{suffix}"
        writer.add_tensor(name, to_gguf(stem, parameter.data, config).numpy())
    base_toys.finish(writer)


def merge(base: Path, adapter: gguf_adapter.StoredAdapter, target: Path) -> None:
    """A copy of a GGUF base with the adapter's updates added to its tensors, as llama.cpp does."""
    target.write_bytes(base.read_bytes())
    reader = gguf.GGUFReader(target, "r+")
    merged = 0
    for tensor in reader.tensors:
        if f"{tensor.name}.lora_a" in adapter.tensors:
            tensor.data[:] += delta(adapter, tensor.name).numpy()
            merged += 2
    assert merged == len(adapter.tensors)
    reader.data.flush()


def load(path: Path) -> nn.Module:
    """transformers' own reader of GGUF, which puts llama's rows back in its order."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_merged_base_as_it_was_trained(
    tmp_path: Path, model_type: str
) -> None:
    """Names, rows and scale at once: equal logits with the GGUF read by a reader not ours."""
    model = toy(model_type)
    write_base(tmp_path / "base.gguf", model, model.config)
    tokens_BS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        untrained = model(tokens_BS).logits
        torch.testing.assert_close(load(tmp_path / "base.gguf")(tokens_BS).logits, untrained)
        layers = adapted(model)
        trained = model(tokens_BS).logits
    path = tmp_path / "adapter.gguf"
    gguf_adapter.write(path, layers, model.config, dtype=torch.float32, name="toy")
    merge(tmp_path / "base.gguf", gguf_adapter.read_back(path), tmp_path / "merged.gguf")
    with torch.no_grad():
        found = load(tmp_path / "merged.gguf")(tokens_BS).logits
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)


def test_all_that_llama_cpp_cannot_express_is_said_at_once(tmp_path: Path) -> None:
    config = toy("gemma3_text").config  # its head is tied
    layers = [
        AdaptedLayer("model.layers.0.self_attn.q_proj", torch.ones(2, 64), torch.ones(128, 2), 2),
        AdaptedLayer("model.layers.0.self_attn.k_proj", torch.ones(2, 64), torch.ones(32, 2), 4),
        AdaptedLayer("model.layers.0.mlp.up_proj", torch.ones(1, 2, 64), torch.ones(1, 80, 2), 2),
        AdaptedLayer("model.layers.7.self_attn.q_proj", torch.ones(2, 64), torch.ones(128, 2), 2),
        AdaptedLayer("model.embed_tokens", torch.ones(2, 96), torch.ones(64, 2), 2),
        AdaptedLayer("lm_head", torch.ones(2, 64), torch.ones(96, 2), 2),
    ]
    with pytest.raises(UserError) as caught:
        gguf_adapter.write(
            tmp_path / "x.gguf", layers, config, dtype=torch.float32, name="toy"
        )  # fmt: skip
    assert [problem.where for problem in caught.value.problems] == [
        "GGUF adapter",
        "model.layers.0.mlp.up_proj",
        "model.layers.7.self_attn.q_proj",
        "model.embed_tokens",
        "lm_head",
    ]
    for reason in ("one alpha", "no matrix", "no tensor", "embeddings", "tied"):
        assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_stacked_experts_and_linear_attention_are_refused(tmp_path: Path) -> None:
    experts = AdaptedLayer(
        "model.layers.0.mlp.experts.down_proj", torch.ones(2, 32), torch.ones(64, 2), 2
    )
    with pytest.raises(UserError, match="all experts in one tensor"):
        gguf_adapter.write(
            tmp_path / "x.gguf", [experts], toy("qwen3_moe").config, dtype=torch.float32, name="toy"
        )
    recurrent = AdaptedLayer(
        "model.layers.0.linear_attn.in_proj_qkv", torch.ones(2, 64), torch.ones(96, 2), 2
    )
    with pytest.raises(UserError, match=r"linear_attn.in_proj_qkv.*reorders the heads"):
        gguf_adapter.write(
            tmp_path / "x.gguf",
            [recurrent],
            AutoConfig.for_model("qwen3_5_text", **COMMON),
            dtype=torch.float32,
            name="toy",
        )


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([], "no layers"),
        ([AdaptedLayer("model.layers.0.mlp.up_proj", torch.ones(1, 64), torch.ones(80, 1), 0)],
         "alpha of 0"),
        ([AdaptedLayer(f"{start}.layers.0.mlp.up_proj", torch.ones(1, 64), torch.ones(80, 1), 1)
          for start in ("model", "model.language_model")], "shares blk.0.ffn_up.weight"),
    ],
)  # fmt: skip
def test_an_adapter_without_a_meaning_is_refused(
    tmp_path: Path, layers: list[AdaptedLayer], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        gguf_adapter.write(
            tmp_path / "x.gguf", layers, toy("llama").config, dtype=torch.float32, name="toy"
        )


def test_an_unknown_model_type_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_neox")
    with pytest.raises(UserError, match=r"'gpt_neox'.*merge the adapter.*qwen3_moe"):
        gguf_adapter.write(tmp_path / "x.gguf", [], config, dtype=torch.float32, name="toy")


def test_ranks_may_differ_because_llama_cpp_scales_by_each_tensors_own(tmp_path: Path) -> None:
    config, path = toy("qwen2").config, tmp_path / "x.gguf"
    layers = [
        AdaptedLayer(
            f"model.layers.{n}.mlp.up_proj", torch.randn(rank, 64), torch.randn(80, rank), 6.0
        )
        for n, rank in enumerate((2, 5))
    ]
    gguf_adapter.write(path, layers, config, dtype=torch.float32, name="toy")
    stored = gguf_adapter.read_back(path)
    for layer, rank in zip(layers, (2, 5), strict=True):
        expected = 6.0 / rank * layer.up @ layer.down
        torch.testing.assert_close(delta(stored, gguf_name(layer.path)), expected)


def test_half_precision_rounds_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    config, path = toy("qwen2").config, tmp_path / "x.gguf"
    up = torch.randn(80, 2)
    layer = AdaptedLayer("model.layers.0.mlp.up_proj", torch.randn(2, 64), up, 1.3)
    gguf_adapter.write(path, [layer], config, dtype=torch.float16, name="toy")
    assert torch.equal(
        gguf_adapter.read_back(path).tensors["blk.0.ffn_up.weight.lora_b"], up.half()
    )
    too_large = AdaptedLayer(layer.path, layer.down * 1e9, up, 1.3)
    with pytest.raises(WorkError, match="not finite"):
        gguf_adapter.write(
            tmp_path / "y.gguf", [too_large], config, dtype=torch.float16, name="toy"
        )  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_that_differs_from_what_was_trained_is_refused(tmp_path: Path) -> None:
    model, path = toy("llama"), tmp_path / "x.gguf"
    layers = adapted(model, ["q_proj"])
    gguf_adapter.write(path, layers, model.config, dtype=torch.float32, name="toy")
    first, second = layers
    swapped = [
        AdaptedLayer(first.path, first.down, second.up, ALPHA),
        AdaptedLayer(second.path, second.down, first.up, ALPHA),
    ]
    for changed, dtype, message in [
        (swapped, torch.float32, "blk.0.attn_q.weight.lora_b differs"),
        (layers, torch.float16, "lora_a differs"),
        (layers[:1], torch.float32, "blk.1.attn_q.weight.lora_a is not expected"),
    ]:
        with pytest.raises(WorkError, match=message):
            gguf_adapter.verify(path, changed, model.config, dtype=dtype)
    doubled = [AdaptedLayer(one.path, one.down, one.up, 2 * ALPHA) for one in layers]
    with pytest.raises(WorkError, match=r"alpha is 5.0, not 10.0"):
        gguf_adapter.verify(path, doubled, model.config, dtype=torch.float32)
    with pytest.raises(WorkError, match="architecture is llama, not qwen2"):
        gguf_adapter.verify(path, layers, toy("qwen2").config, dtype=torch.float32)
    unordered = gguf_adapter.read_back(path).tensors["blk.0.attn_q.weight.lora_b"]
    assert not torch.equal(unordered, first.up)


def test_a_model_file_is_no_adapter(tmp_path: Path) -> None:
    model = toy("llama")
    write_base(tmp_path / "base.gguf", model, model.config)
    with pytest.raises(WorkError, match=r"no LoRA adapter: general.type is None"):
        gguf_adapter.read_back(tmp_path / "base.gguf")
    for content in (b"GG", b"not a GGUF file, but long enough to be one"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(WorkError, match="is no GGUF file"):
            gguf_adapter.read_back(tmp_path / "other")


def test_without_gguf_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_gguf(name: str, *rest: object) -> object:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return real(name, *rest)  # type: ignore[arg-type]

    config = toy("llama").config
    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(UserError, match=r"pip install gguf"):
        gguf_adapter.write(tmp_path / "x.gguf", [], config, dtype=torch.float32, name="toy")
