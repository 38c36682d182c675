"""ChatGLM's original layout loads to a model with the reference's logits, and its tokenizers to
fast ones with the originals' ids."""

from __future__ import annotations

import base64
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from lora_scripts.data.chat import ChatFormat
from lora_scripts.errors import UserError
from lora_scripts.models import chatglm
from lora_scripts.models.lora import AdaptedLayer
from tests.models import chatglm_reference as reference
from tests.models.chatglm_reference import REAL, small

MODELING = {
    "positions": "seq_idx = torch.arange(seq_len, dtype=dtype) / self.rope_ratio\n",
    "base": "base = base * self.rope_ratio\n",
}


def write(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], shards: int = 1
) -> Path:
    """A folder in the original layout."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(dict(weights), path / "model.safetensors")
        return path
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    places = {name: names[n % shards] for n, name in enumerate(weights)}
    for file in names:
        save_file({k: w for k, w in weights.items() if places[k] == file}, path / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def given(model: GlmForCausalLM, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
    """Logits. With a mask, lest transformers take a leap in the positions for a new sequence."""
    with torch.no_grad():
        return model(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            position_ids=positions_T[None],
            use_cache=False,
        ).logits


def some_ids(config: Mapping[str, Any], length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config["padded_vocab_size"], (1, length), generator=generator)


# --- the model ------------------------------------------------------------------------------------

CASES = {
    "ChatGLM2": ("chatglm2", {}),
    "ChatGLM2-32K": ("chatglm2", {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm2-6b-32k"}),
    "ChatGLM3": ("chatglm3", {}),
    "ChatGLM3-32K": ("chatglm3", {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"}),
    "GLM-4": ("glm4", {}),
    "GLM-4-1M": ("glm4", {"rope_ratio": 10000, "multi_query_group_num": 4}),
    "one group": ("chatglm3", {"multi_query_group_num": 1}),
    "no qkv bias": ("chatglm2", {"add_qkv_bias": False}),
    "heads by themselves": ("chatglm2", {"multi_query_attention": False}),
    "wide heads": ("glm4", {"kv_channels": 16}),
    "many layers": ("chatglm2", {"num_layers": 11}),  # layers.10 is not layers.1
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    config = small(name, **changes)
    weights = reference.tensors(config)
    model = chatglm.load(write(tmp_path, config, weights, shards=3), torch.float32)
    assert not model.training
    ids_BT, divides = some_ids(config), name == "chatglm2"
    ratio = config.get("rope_ratio", 1)
    for start in (0, 1500, 31000):
        positions_T = start + 3 * torch.arange(12)
        expected = reference.logits(config, weights, ids_BT, positions_T, divides=divides)
        found = given(model, ids_BT, positions_T)
        # The reference's angles are float64; at 31000 float32 is off by up to 1e-3 of a radian.
        tolerance = 1e-3 if start == 31000 else 1e-4
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        if ratio != 1:
            other = reference.logits(config, weights, ids_BT, positions_T, divides=not divides)
            assert (other - expected).abs().max() > 20 * (found - expected).abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_positions_and_order_matter(attention: str, tmp_path: Path) -> None:
    """The toy is no bag of words, or the test above would show little."""
    config = small("glm4")
    model = chatglm.load(write(tmp_path, config, reference.tensors(config)), torch.float32)
    model.set_attn_implementation(attention)
    ids_BT, positions_T = some_ids(config), torch.arange(12)
    straight = given(model, ids_BT, positions_T)[0, -1]
    assert (given(model, ids_BT, 5 * positions_T)[0, -1] - straight).abs().max() > 0.05
    swapped = ids_BT[:, [1, 0, *range(2, 12)]]
    assert (given(model, swapped, positions_T)[0, -1] - straight).abs().max() > 0.05


@pytest.mark.parametrize("grouped", [True, False])
def test_every_tensor_is_in_its_place(grouped: bool, tmp_path: Path) -> None:
    config = small("chatglm3", multi_query_attention=grouped)
    weights = reference.tensors(config)
    model = chatglm.load(write(tmp_path, config, weights), torch.bfloat16)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    for number in range(2):
        old, new = f"transformer.encoder.layers.{number}", f"model.layers.{number}"
        for kind in ("weight", "bias"):
            fused = weights[f"{old}.self_attention.query_key_value.{kind}"].bfloat16()
            heads = fused.unflatten(0, (-1, 8))  # 8 numbers a head
            if grouped:
                parts = heads[:4], heads[4:6], heads[6:]
            else:
                parts = heads[0::3], heads[1::3], heads[2::3]
            for part, expected in zip("qkv", parts, strict=True):
                found = state[f"{new}.self_attn.{part}_proj.{kind}"]
                assert torch.equal(found, expected.flatten(0, 1)), (part, kind)
        gate_up = weights[f"{old}.mlp.dense_h_to_4h.weight"]
        assert torch.equal(state[f"{new}.mlp.gate_up_proj.weight"], gate_up.bfloat16())
    assert len(state) == len(weights) - 1 + 2 * 2 * 2  # no frequencies; three of each fused one


def test_the_real_configs() -> None:
    facts = dict(reference.facts(REAL["chatglm3"]))
    assert len(facts) == 200
    numbers = sum(torch.Size(shape).numel() for shape in facts.values())
    assert 2 * numbers == 12_487_168_064  # total_size in its model.safetensors.index.json, float16
    for name, config in REAL.items():
        assert chatglm.is_original(config)
        with torch.device("meta"):
            model = GlmForCausalLM(chatglm.convert_config(config))
        stored = sum(torch.Size(shape).numel() for _, shape in reference.facts(config)) - 32
        assert sum(p.numel() for p in model.parameters()) == stored, name
        assert model.config.eos_token_id == config["eos_token_id"]
        assert model.config.pad_token_id == config["pad_token_id"]
        base = 5e6 if name == "glm4" else 1e4
        assert model.config.rope_parameters["rope_theta"] == base
    assert not chatglm.is_original({"model_type": "glm"})


def test_no_tokens_are_invented() -> None:
    config = chatglm.convert_config(small("chatglm2", eos_token_id=None, pad_token_id=None))
    assert config.eos_token_id is None
    assert config.pad_token_id is None


def test_nothing_loaded_refers_to_the_file(tmp_path: Path) -> None:
    config = small("chatglm2")
    model = chatglm.load(write(tmp_path, config, reference.tensors(config)), torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["ChatGLM2-32K", "GLM-4", "no qkv bias"])
def test_saved_and_read_again_by_transformers(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    config = small(name, **changes)
    weights = reference.tensors(config)
    model = chatglm.load(write(tmp_path / "original", config, weights), torch.float32)
    model.save_pretrained(tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert type(again) is GlmForCausalLM
    assert again.dtype == torch.float32
    ids_BT, positions_T = some_ids(config), 1500 + torch.arange(12)
    assert torch.equal(given(again, ids_BT, positions_T), given(model, ids_BT, positions_T))
    assert again.config.eos_token_id == config["eos_token_id"]


def test_it_can_be_trained_and_generate(tmp_path: Path) -> None:
    config = small("glm4")
    model = chatglm.load(write(tmp_path, config, reference.tensors(config)), torch.float32)
    ids_BT = some_ids(config)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    found = model.generate(ids_BT, max_new_tokens=3, do_sample=False, eos_token_id=999)
    assert found.shape == (1, 15)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rmsnorm": False}, "found rmsnorm: false, expected true"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post"),
        ({"add_bias_linear": True}, "found add_bias_linear: true, expected false"),
        ({"post_layer_norm": False}, "found post_layer_norm"),
        ({"pre_seq_len": 128}, r"found pre_seq_len: 128, expected null \(prefix tuning"),
        ({"quantization_bit": 4}, r"found quantization_bit: 4, expected 0 \(quantised"),
        ({"hidden_dropout": 0.1}, "found hidden_dropout: 0.1"),
        ({"vision_config": {"depth": 63}}, "GLM-4V"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"multi_query_group_num": 3}, "found multi_query_group_num: 3"),
        ({"kv_channels": 6}, "found kv_channels: 6"),
        ({"rope_ratio": 0}, "found rope_ratio: 0"),
        ({"position_encoding_2d": True}, "the first generation"),
    ],
)
def test_configs_that_glm_cannot_express(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chatglm.convert_config(small("chatglm2", **changes))


def test_all_problems_of_a_config_are_told() -> None:
    with pytest.raises(UserError) as caught:
        chatglm.convert_config(small("chatglm2", rmsnorm=False, seq_length=None, pre_seq_len=9))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("changes", [{"pre_seq_len": 0}, {"quantization_bit": None}])
def test_what_is_absent_may_be_written_in_two_ways(changes: dict[str, Any]) -> None:
    chatglm.convert_config({**small("chatglm2"), **changes})


NAME = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({NAME: None}, "1 tensors missing .*: model.layers.1.mlp.gate_up_proj.weight"),
        ({"transformer.prefix_encoder.x": torch.zeros(1)}, "1 tensors unknown: .*prefix_encoder"),
        ({NAME.replace(".1.", ".2."): torch.zeros(40, 24)}, r"1 tensors unknown: .*layers\.2"),
        ({NAME: torch.zeros(40, 23)}, r"wrong shape: .*\(40, 23\) instead of \(40, 24\)"),
        ({NAME: torch.zeros(40, 24, dtype=torch.int8)}, r"no float: .* \(I8\)"),
    ],
)
def test_files_that_do_not_fit(
    changes: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    config = small("chatglm2")
    weights = {**reference.tensors(config), **changes}
    write(tmp_path, config, {name: w for name, w in weights.items() if w is not None})
    with pytest.raises(UserError, match=said):
        chatglm.load(tmp_path, torch.float32)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    config = small("chatglm2")
    weights = reference.tensors(config)
    write(tmp_path, config, weights)
    save_file({NAME: weights[NAME]}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="there twice"):
        chatglm.load(tmp_path, torch.float32)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    config = small("chatglm2")
    write(tmp_path, config, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model-00001.bin")
    with pytest.raises(UserError, match=r"only pytorch_model-00001\.bin, a Python pickle"):
        chatglm.load(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("file", "said"), [("gone.safetensors", "missing"), ("../a.safetensors", "outside")]
)
def test_an_index_of_other_files(file: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, small("chatglm2"), {})
    index = {"weight_map": {"transformer.output_layer.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        chatglm.load(tmp_path, torch.float32)


# --- which generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["positions", "base"])
def test_the_modeling_file_tells_what_rope_ratio_does(kind: str, tmp_path: Path) -> None:
    config = small("chatglm2", rope_ratio=8, _name_or_path="my/tune")
    weights = reference.tensors(config)
    write(tmp_path, config, weights)
    with pytest.raises(UserError, match="found rope_ratio: 8, which ChatGLM2 divides"):
        chatglm.load(tmp_path, torch.float32)
    (tmp_path / "modeling_chatglm.py").write_text(MODELING[kind], encoding="utf-8")
    model = chatglm.load(tmp_path, torch.float32)
    ids_BT, positions_T = some_ids(config), torch.arange(12)
    expected = reference.logits(config, weights, ids_BT, positions_T, divides=kind == "positions")
    torch.testing.assert_close(given(model, ids_BT, positions_T), expected, atol=2e-4, rtol=0)


def test_without_a_ratio_no_one_need_know() -> None:
    config = chatglm.convert_config(small("chatglm2", _name_or_path=None))
    assert config.rope_parameters["rope_theta"] == 1e4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("THUDM/chatglm2-6b-32k", 2),
        ("/data/chatglm2-tuning/chatglm3-6b", 3),
        ("ZhipuAI/ChatGLM3-6B-base", 3),
        ("THUDM/glm-4-9b-chat", 4),
        ("zai-org/GLM4-9B", 4),
        ("THUDM/codegeex2-6b", 2),
        ("my-model", None),
    ],
)
def test_generation_by_name(name: str, expected: int | None, tmp_path: Path) -> None:
    assert chatglm.generation(tmp_path, {"_name_or_path": name}) == expected
    settings = json.dumps({"name_or_path": name})
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    assert chatglm.generation(tmp_path, {}) == expected


def test_generation_by_files(tmp_path: Path) -> None:
    named = {"_name_or_path": "THUDM/chatglm2-6b"}
    settings, code = tmp_path / "tokenizer_config.json", tmp_path / "tokenization_chatglm.py"
    settings.write_text('{"chat_template": "<|user|>\\n"}', encoding="utf-8")
    assert chatglm.generation(tmp_path, named) == 3
    code.write_text('special_tokens = ["[MASK]", "[gMASK]", "sop"]', encoding="utf-8")
    assert chatglm.generation(tmp_path, named) == 2
    code.write_text('role_special_tokens = ["<|system|>", "<|user|>"]', encoding="utf-8")
    assert chatglm.generation(tmp_path, named) == 3
    code.write_text("import tiktoken", encoding="utf-8")
    assert chatglm.generation(tmp_path, named) == 4
    code.unlink()
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n", encoding="utf-8")
    assert chatglm.generation(tmp_path, named) == 4


# --- LoRA under the original names ----------------------------------------------------------------


def adapter(path: str, shape: Sequence[int], rank: int, alpha: float) -> AdaptedLayer:
    generator = torch.Generator().manual_seed(len(path) + rank)
    down = torch.randn(rank, shape[1], generator=generator) / 5
    return AdaptedLayer(path, down, torch.randn(shape[0], rank, generator=generator) / 5, alpha)


def update(layer: AdaptedLayer) -> Tensor:
    return layer.alpha / layer.down.shape[0] * layer.up @ layer.down


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kinds", [ALL, ("q_proj", "v_proj"), ("k_proj", "down_proj")])
@pytest.mark.parametrize("even", [True, False])
def test_a_lora_under_the_original_names_does_the_same(
    grouped: bool, kinds: tuple[str, ...], even: bool, tmp_path: Path
) -> None:
    config = small("chatglm3", multi_query_attention=grouped)
    weights = reference.tensors(config)
    model = chatglm.load(write(tmp_path, config, weights), torch.float32)
    modules = {n: m for n, m in model.named_modules() if n.endswith(kinds)}
    layers = [
        adapter(path, module.weight.shape, *((4, 8.0) if even else (2 + n % 3, 1.0 + n)))
        for n, (path, module) in enumerate(modules.items())
    ]
    with torch.no_grad():
        for layer in layers:
            modules[layer.path].weight += update(layer)
    renamed = chatglm.original_names(layers, config)
    assert len({layer.path for layer in renamed}) == len(renamed)
    for layer in renamed:
        changed = weights[f"{layer.path}.weight"] + update(layer)
        assert changed.shape == weights[f"{layer.path}.weight"].shape
        weights[f"{layer.path}.weight"] = changed
    ids_BT, positions_T = some_ids(config), torch.arange(12)
    expected = reference.logits(config, weights, ids_BT, positions_T, divides=False)
    torch.testing.assert_close(given(model, ids_BT, positions_T), expected, atol=1e-3, rtol=0)
    if even and grouped and kinds == ALL:
        first = renamed[0]
        assert first.path == "transformer.encoder.layers.0.self_attention.query_key_value"
        assert (first.down.shape, first.up.shape) == ((12, 24), (64, 12))
        assert first.alpha == 24.0
        assert [layer.path.rpartition("layers.0.")[2] for layer in renamed[:4]] == [
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ]


def test_a_layer_without_a_counterpart_is_refused() -> None:
    layer = adapter("lm_head", (384, 24), 4, 4.0)
    with pytest.raises(UserError, match="lm_head"):
        chatglm.original_names([layer], small("chatglm2"))


# --- tokenizers -----------------------------------------------------------------------------------

CORPUS = [
    "The quick brown fox jumps over the lazy dog; a philosophy of isopods and gossip.",
    "def add(a, b):\n    return a + b  # two  spaces,\tone tab",
    "你好，世界！今天北京的天气怎么样？我们一起去图书馆学习语言模型。",
    "问：你好\n\n答：你好👋！我是人工智能助手，很高兴见到你。",
    "[Round 1]\n\n问：什么是语言模型？\n\n答：语言模型是对文字序列的概率建模。",
    "aaaaa aaaaaaa 12345 67890 1,000,000.00 Hello hello HELLO it's we'll",
] * 5
TEXTS = [
    "你好",
    " leading, and  two   three    spaces ",
    "line one\nline two\r\n\r\n\tindented\n\n\n",
    "\n",
    " ",
    "philosophy sop eop isopod",
    "ﬁne Ａ１ é e\u0301 ｶﾞ\u3000全角",
    "𠮷野家 👨‍👩‍👧 🏳️‍🌈 \u200b\ufeff",
    "It's WE'LL don't 1234567890 ...!!!\n\n  ??",
    "aaaaaaaaaaa    bbbb",
    "",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    letters = [*"abehlos 'SE,.!0123\n\t\r", "  ", "你", "好", "世", "界", "\u00e9", "👋", "龘"]
    letters += ["the", "lo", "语言", "模型", "aa", "\n\n"]
    return ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(count)]


def train_sentencepiece(**settings: Any) -> bytes:
    spm = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 520, "byte_fallback": True, **settings},
    )
    return stream.getvalue()


# As ChatGLM's: all white space is kept, letters stay as they are.
KEEPING = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECES: dict[str, dict[str, Any]] = {
    "keeping": KEEPING,
    "squeezing": {"normalization_rule_name": "identity"},
    "symbols": {**KEEPING, "user_defined_symbols": ["<n>", "世界", "<|tab|>"]},
    "unknown": {**KEEPING, "byte_fallback": False, "vocab_size": 260},
    "no prefix": {**KEEPING, "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=SENTENCEPIECES)
def sentencepiece_model(request: pytest.FixtureRequest) -> bytes:
    return train_sentencepiece(**SENTENCEPIECES[request.param])


@pytest.fixture(scope="module")
def keeping() -> bytes:
    return train_sentencepiece(**KEEPING)


def tokenizer_folder(path: Path, name: str, model: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(small(name)), encoding="utf-8")
    (path / "tokenizer.model").write_bytes(model)
    return path


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_ids_are_sentencepieces_own(sentencepiece_model: bytes, tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    original = spm.SentencePieceProcessor(model_proto=sentencepiece_model)
    folder = tokenizer_folder(tmp_path, "chatglm2", sentencepiece_model)
    tokenizer = chatglm.load_tokenizer(folder)
    for text in [*TEXTS, *CORPUS[:6], "a<n>b 世界世界<|tab|>", *random_texts(800)]:
        assert plain(tokenizer, text) == original.encode(text), repr(text)
    assert tokenizer.eos_token_id == original.eos_id()
    assert tokenizer.pad_token_id == original.unk_id()
    assert tokenizer.padding_side == "left"


def test_special_tokens_follow_the_vocabulary(keeping: bytes, tmp_path: Path) -> None:
    """As [MASK] of ChatGLM3-6B is 64789, the number of pieces: gMASK 64790, sop 64792 …"""
    spm = pytest.importorskip("sentencepiece")
    original = spm.SentencePieceProcessor(model_proto=keeping)
    size = original.get_piece_size()
    tokenizer = chatglm.load_tokenizer(tokenizer_folder(tmp_path, "chatglm3", keeping))
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    ids = list(range(size, size + 9))
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert plain(tokenizer, "".join(names)) == ids
    assert len(tokenizer) == size + 9
    opened = [size + 1, size + 3, *original.encode("你好")]
    assert tokenizer("你好")["input_ids"] == opened
    assert tokenizer.decode(opened, skip_special_tokens=True) == "你好"
    with pytest.raises(UserError, match="nothing here tells ChatGLM2 from ChatGLM3"):
        (tmp_path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
        chatglm.load_tokenizer(tmp_path)


def check_offsets(tokenizer: Any, text: str) -> None:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    reached = 0
    for start, end in found["offset_mapping"]:
        assert 0 <= start <= end <= len(text)
        assert start <= reached  # no letter is skipped …
        reached = max(reached, end)
    assert reached == len(text)  # … and none left over


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_offsets_cover_the_text(name: str, keeping: bytes, tmp_path: Path) -> None:
    model = keeping if name == "chatglm3" else rank_file(train_ranks())
    tokenizer = chatglm.load_tokenizer(tokenizer_folder(tmp_path, name, model))
    for text in [*TEXTS, *CORPUS[:6], *random_texts(200)]:
        check_offsets(tokenizer, text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no tokenizer.model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x0a\x7fcut", "no whole sentencepiece model"),
        (b"", "no whole sentencepiece model"),
        (b"<html>", "no whole sentencepiece model"),
    ],
)
def test_damaged_sentencepiece_models(content: bytes | None, said: str, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, "chatglm3", content or b"")
    if content is None:
        (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=said):
        chatglm.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "unigram", "byte_fallback": False, "vocab_size": 120}, "of the type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces characters"),
        ({**KEEPING, "treat_whitespace_as_suffix": True}, "spaces after words"),
    ],
)
def test_other_sentencepiece_models_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = train_sentencepiece(**settings)
    with pytest.raises(UserError, match=said):
        chatglm.load_tokenizer(tokenizer_folder(tmp_path, "chatglm2", model))


# --- GLM-4's ranks --------------------------------------------------------------------------------

CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
GLM4_SPECIAL += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM4_SPECIAL += ["<|begin_of_image|>", "<|end_of_image|>"]
GLM4_SPECIAL += ["<|begin_of_video|>", "<|end_of_video|>"]


def train_ranks(merges: int = 220) -> dict[bytes, int]:
    """A small byte-level BPE: the single bytes in another order than theirs, then merges."""
    ranks = {bytes([(byte + 33) % 256]): byte for byte in range(256)}
    pieces = [piece.encode() for text in CORPUS[:6] for piece in regex.findall(CUTS, text)]
    words = [[bytes([byte]) for byte in piece] for piece in pieces]
    for rank in range(256, 256 + merges):
        pairs = Counter(p for word in words for p in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[b"".join(best)] = rank
        words = [merge_all(word, best) for word in words]
    return ranks


def merge_all(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def rank_file(ranks: Mapping[bytes, int]) -> bytes:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    return "".join(lines).encode()


def reference_bpe(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """tiktoken's rule: cut, then merge the neighbours whose union has the lowest rank."""
    ids = []
    for piece in regex.findall(CUTS, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            unions = [ranks.get(a + b, 1 << 60) for a, b in pairwise(parts)]
            if not unions or min(unions) == 1 << 60:
                break
            at = unions.index(min(unions))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("encode", ["reference", "tiktoken"])
def test_ids_are_tiktokens(encode: str, tmp_path: Path) -> None:
    ranks = train_ranks()
    special = {name: id for id, name in enumerate(GLM4_SPECIAL, start=len(ranks))}
    original: Callable[[str], list[int]]
    if encode == "reference":

        def original(text: str) -> list[int]:
            return reference_bpe(text, ranks)
    else:
        tiktoken = pytest.importorskip("tiktoken")
        encoding = tiktoken.Encoding(
            "glm4", pat_str=CUTS, mergeable_ranks=ranks, special_tokens=special
        )
        original = encoding.encode_ordinary
    tokenizer = chatglm.load_tokenizer(tokenizer_folder(tmp_path, "glm4", rank_file(ranks)))
    for text in [*TEXTS, *CORPUS[:6], *random_texts(800)]:
        assert plain(tokenizer, text) == original(text), repr(text)
        assert tokenizer.decode(plain(tokenizer, text)) == text
    assert tokenizer.convert_tokens_to_ids(GLM4_SPECIAL) == list(special.values())
    assert plain(tokenizer, "".join(GLM4_SPECIAL)) == list(special.values())
    opened = [special["[gMASK]"], special["<sop>"], *original("你好")]
    assert tokenizer("你好")["input_ids"] == opened
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == special["<|endoftext|>"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content + b"oops\n", "line 477 is no token"),
        (lambda content: content + b"IQ* 3\n", "line 477 is no token"),
        (lambda content: content.replace(b" 300\n", b" 3000\n"), "ranks are not 0, 1, 2"),
        (lambda _: b"IQ== 0\nIg== 1\n", "254 of the 256 single bytes"),
    ],
)
def test_damaged_rank_files(change: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, "glm4", change(rank_file(train_ranks())))
    with pytest.raises(UserError, match=said):
        chatglm.load_tokenizer(folder)


# --- conversations --------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气"}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}


@pytest.fixture(scope="module")
def tokenizers(keeping: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tokenizers")
    models = {"chatglm2": keeping, "chatglm3": keeping, "glm4": rank_file(train_ranks())}
    return {
        name: chatglm.load_tokenizer(tokenizer_folder(root / name, name, model))
        for name, model in models.items()
    }


def rendered(tokenizer: Any, messages: Any, **settings: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    return text


def test_the_words_of_the_prompts(tokenizers: dict[str, Any]) -> None:
    asked = {"add_generation_prompt": True}
    glm2, glm3, glm4 = tokenizers.values()
    one = "[gMASK]<sop>[Round 1]\n\n问：你好\n\n答："
    two = one + "你好！\n\n[Round 2]\n\n问：Why?\n\n答："
    assert rendered(glm2, TALK[:1], **asked) == one
    assert rendered(glm2, TALK[:3], **asked) == two
    assert rendered(glm2, TALK) == two + " Because."
    assert rendered(glm3, [SYSTEM, *TALK[:3]], **asked) == (
        "[gMASK]<sop><|system|>\n Be kind.<|user|>\n 你好<|assistant|>\n 你好！<|user|>\n Why?"
        "<|assistant|>"
    )
    assert rendered(glm3, TALK).endswith("<|assistant|>\n Because.")
    assert rendered(glm4, [SYSTEM, *TALK[:3]], **asked) == (
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\n你好<|assistant|>\n你好！<|user|>\nWhy?"
        "<|assistant|>"
    )
    assert rendered(glm4, TALK).endswith("<|assistant|>\nBecause.")


def test_tools_in_the_prompts(tokenizers: dict[str, Any]) -> None:
    _, glm3, glm4 = tokenizers.values()
    used = {"role": "tool", "content": "22"}
    listed = json.dumps([TOOLS[0]["function"]], indent=4, ensure_ascii=False)
    called = {"role": "assistant", "metadata": "weather", "content": "tool_call(city='北京')"}
    assert rendered(glm3, [SYSTEM, TALK[0], called, used], tools=TOOLS) == (
        f"[gMASK]<sop><|system|>\n Be kind.\n{listed}<|user|>\n 你好<|assistant|>weather\n "
        "tool_call(city='北京')<|observation|>\n 22"
    )
    listed = json.dumps(TOOLS[0]["function"], indent=4, ensure_ascii=False)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert rendered(glm4, [SYSTEM, TALK[0], called, used], tools=TOOLS) == (
        f"[gMASK]<sop><|system|>\nBe kind.\n\n## weather\n\n{listed}\n在调用上述函数时，请使用 "
        'Json 格式表示调用的参数。<|user|>\n你好<|assistant|>weather\n{"city": "北京"}'
        "<|observation|>\n22"
    )


@pytest.mark.parametrize(
    ("name", "messages", "settings", "said"),
    [
        ("chatglm2", [SYSTEM, *TALK], {}, "questions"),
        ("chatglm2", [TALK[0], TALK[0]], {}, "in turn"),
        ("chatglm2", TALK[1:], {}, "a question first"),
        ("chatglm2", TALK, {"tools": TOOLS}, "no place for tools"),
        ("chatglm3", TALK, {"tools": TOOLS}, "begin with one"),
        ("chatglm3", [{"role": "assistant", "tool_calls": [CALL]}], {}, "in words"),
        ("glm4", [{"role": "narrator", "content": "!"}], {}, "no role narrator"),
    ],
)
def test_what_a_template_refuses(
    name: str, messages: Any, settings: Any, said: str, tokenizers: dict[str, Any]
) -> None:
    with pytest.raises(Exception, match=said):
        rendered(tokenizers[name], messages, **settings)


def test_prompt_ids_are_the_originals(keeping: bytes, tokenizers: dict[str, Any]) -> None:
    """The originals encode head and content of each message one by one, and join the ids."""
    spm = pytest.importorskip("sentencepiece")
    original = spm.SentencePieceProcessor(model_proto=keeping)
    size, glm2, glm3 = original.get_piece_size(), tokenizers["chatglm2"], tokenizers["chatglm3"]
    opening = [size + 1, size + 3]
    for text in [text for text in [*TEXTS, *random_texts(100)] if "\u2581" not in text]:
        prompt = f"[Round 1]\n\n问：{text}\n\n答："
        answer = {"role": "assistant", "content": text}
        expected = [*opening, *original.encode(prompt), *original.encode(text)]
        talk = [{"role": "user", "content": text}, answer]
        assert plain(glm2, rendered(glm2, talk)) == expected, repr(text)
        expected = [*opening, size + 6, *original.encode("\n"), *original.encode(text), size + 7]
        found = plain(glm3, rendered(glm3, talk[:1], add_generation_prompt=True))
        assert found == expected, repr(text)


@pytest.mark.parametrize(
    ("name", "stop", "spans"),
    [
        ("chatglm2", "</s>", [[" 你好！</s>"], [" Because.</s>"]]),
        ("chatglm3", "<|user|>", [["\n 你好！<|user|>", "\n Because.<|user|>"]]),
        ("glm4", "<|user|>", [["\n你好！<|user|>", "\nBecause.<|user|>"]]),
    ],
)
def test_answers_are_found_and_learned_to_their_end(
    name: str, stop: str, spans: list[list[str]], tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[name]
    chat = ChatFormat(tokenizer)
    assert chat.notes == ()
    texts = chat.render(TALK)
    assert [[t.text[start:end] for start, end in t.spans] for t in texts] == spans
    for text in texts:
        encoded = chat.encode(text)
        assert encoded.ids[:2].tolist() == tokenizer("")["input_ids"]
        learned = encoded.ids[encoded.supervised].tolist()
        assert learned[-1] == tokenizer.convert_tokens_to_ids(stop)
        assert learned.count(learned[-1]) == len(text.spans)
    assert chat.stop_ids[0] == tokenizer.convert_tokens_to_ids(stop)
    assert tokenizer.eos_token_id in chat.stop_ids


def test_tokenizers_saved_and_read_again(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    for name, tokenizer in tokenizers.items():
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        chatglm.convert_config(small(name)).save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
        assert again.is_fast
        for text in [*TEXTS, *CORPUS[:6], *random_texts(100), "[gMASK]<sop><|user|>\n a"]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"], (name, text)
            assert again.decode(plain(again, text)) == tokenizer.decode(plain(again, text))
        assert rendered(again, TALK) == rendered(tokenizer, TALK)
        assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        assert again.padding_side == "left"
        assert again.model_max_length == REAL[name]["seq_length"]
