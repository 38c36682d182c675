"""Language models read from each layout: weights, facts and hash; what is refused; answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import causal_lm, chatglm
from lora_scripts.models.text_signature import TextSignature, read_text_signature
from tests import base_toys, text_toys
from tests.data import chat_toys

CPU = Compute(torch.device("cpu"), "no")


def load(path: Path, **options: Any) -> causal_lm.CausalLM:
    return causal_lm.load(read_text_signature(path), CPU, **options)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    model = text_toys.model("qwen3").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    text_toys.chatml_tokenizer().save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    loaded = load(tmp_path)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(causal_lm.probe(loaded.model), causal_lm.probe(plain))
    assert load(tmp_path, own_dtype=True).model.dtype == dtype
    assert loaded.facts == {"base_layout": "transformers", "base_model_type": "qwen3"}
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert loaded.weights_id == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert loaded.tokenizer.chat_template == text_toys.chatml_tokenizer().chat_template


@pytest.mark.parametrize(
    ("file_type", "name", "own_dtype", "rounding"),
    [
        ("ALL_F32", "F32", torch.float32, 0.0),
        ("MOSTLY_F16", "F16", torch.float16, 5e-3),
        ("MOSTLY_Q8_0", "Q8_0", torch.bfloat16, 0.2),
    ],
)
def test_a_gguf_file(
    file_type: str, name: str, own_dtype: torch.dtype, rounding: float, tmp_path: Path
) -> None:
    path = base_toys.save_gguf(tmp_path / "模型 base.gguf", file_type)
    loaded = load(path)
    assert loaded.model.dtype == torch.float32
    expected = causal_lm.probe(text_toys.model("llama", intermediate_size=64))
    difference = (causal_lm.probe(loaded.model) - expected).abs().max()
    assert difference <= rounding and (difference > 0) == (rounding > 0)
    assert load(path, own_dtype=True).model.dtype == own_dtype
    assert loaded.facts == {
        "base_layout": "gguf", "base_model_type": "llama", "base_quantization": name
    }  # fmt: skip
    original = text_toys.chatml_tokenizer()
    talk = [{"role": "user", "content": "天气 is it good?\n\n Yes."}]
    assert loaded.tokenizer.apply_chat_template(talk, return_dict=False) == (
        original.apply_chat_template(talk, return_dict=False)
    )
    assert loaded.tokenizer.eos_token == original.eos_token


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_chatglms_own_layout(name: str, tmp_path: Path) -> None:
    folder = base_toys.save_chatglm(tmp_path / name, name)
    loaded = load(folder)
    assert type(loaded.model).__name__ == "GlmForCausalLM"
    assert loaded.facts == {"base_layout": "chatglm", "base_model_type": "chatglm"}
    causal_lm.save(loaded.model, loaded.tokenizer, tmp_path / "converted")
    again = load(tmp_path / "converted")
    assert torch.equal(causal_lm.probe(again.model), causal_lm.probe(loaded.model))
    assert again.tokenizer("天气 it")["input_ids"] == loaded.tokenizer("天气 it")["input_ids"]
    assert causal_lm.load_config(read_text_signature(folder)).model_type == "glm"


def test_the_hash_tells_weights_apart(tmp_path: Path) -> None:
    a, b, c = (
        load(text_toys.save_model(tmp_path / name, seed=seed)).weights_id
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert a == b != c


# --- what is refused ------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> TextSignature:
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(config), encoding="utf-8")
    return read_text_signature(folder)


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    found = change_config(text_toys.save_model(tmp_path / "x"), model_type="mamba9")
    for read in (lambda: causal_lm.load(found, CPU), lambda: causal_lm.load_config(found)):
        with pytest.raises(UserError, match=r"no language model of the type 'mamba9'"):
            read()


def test_code_of_its_own_is_not_run_unasked(tmp_path: Path) -> None:
    folder = text_toys.save_model(tmp_path / "x")
    (folder / "modeling_mine.py").write_text("raise SystemExit('it was run')", encoding="utf-8")
    named = {"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "modeling_mine.Config"}
    found = change_config(folder, model_type="mine", auto_map=named)
    with pytest.raises(UserError, match=r"Python code of its own, .* trust_remote_code: true"):
        causal_lm.load(found, CPU)
    with pytest.raises(UserError, match="Python code of its own"):
        causal_lm.load_config(found)


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama9")
    writer.add_token_list(["a"])
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_text_signature(path)
    with pytest.raises(UserError, match=r"x\.gguf: this .gguf file cannot be read"):
        causal_lm.load(found, CPU)
    with pytest.raises(UserError, match="llama9"):
        causal_lm.load_config(found)


def test_four_bits_need_an_nvidia_card(tmp_path: Path) -> None:
    folder = text_toys.save_model(tmp_path / "x")
    with pytest.raises(UserError, match=r"found nf4, but this run is on a cpu"):
        load(folder, quantization="nf4")


def test_four_bits_are_not_for_a_base_that_is_read_in_full(tmp_path: Path) -> None:
    folder = base_toys.save_chatglm(tmp_path / "glm4", "glm4")
    with pytest.raises(UserError, match="found nf4, but this base is in the layout chatglm"):
        load(folder, quantization="nf4")


# --- answers --------------------------------------------------------------------------------------

TOKENIZERS = {
    "bytes": chat_toys.qwen3_tokenizer,
    "spaces before every text": lambda: chat_toys.mistral_tokenizer(prepend="always"),
    "spaces before the first": chat_toys.mistral_tokenizer,
    "no spaces added": chat_toys.gemma_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_streamed_is_the_answer(kind: str) -> None:
    """Whatever tokens come: half characters, spaces at the head, line breaks."""
    tokenizer = TOKENIZERS[kind]()
    model = text_toys.model("llama", vocab_size=len(tokenizer))
    seen = set()
    for seed in range(6):
        parts: list[str] = []
        answer = causal_lm.generate(
            model, tokenizer, [5, 6], stop_ids=[tokenizer.eos_token_id], max_new_tokens=40,
            temperature=3.0, seed=seed, stream=parts.append,
        )  # fmt: skip
        assert "".join(parts) == answer
        assert len(parts) > 5
        seen.add(answer)
    assert len(seen) == 6


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_an_indented_text_is_streamed_with_its_spaces(kind: str, tmp_path: Path) -> None:
    tokenizer: Any = chat_toys.qwen3_tokenizer()
    if kind == "sentencepiece":
        tokenizer = chatglm.load_tokenizer(base_toys.save_chatglm(tmp_path / "glm", "chatglm3"))
    text = "Yes:\n  天气 is good\n\n    today 👋."
    parts: list[str] = []
    streamer = causal_lm._Streamer(tokenizer, parts.append)
    streamer.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(parts) == text
    assert "👋" in parts and not any("\ufffd" in part for part in parts)


def test_an_answer_leaves_the_generator_alone_and_ends_at_its_stop() -> None:
    tokenizer, model = text_toys.chatml_tokenizer(), text_toys.model("llama")
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "seed": 1}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    whole = causal_lm.generate(model, tokenizer, [5, 6], stop_ids=[458], **settings)
    assert torch.equal(torch.rand(1), expected)
    plain = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False, eos_token_id=458
    )[0, 2:]
    assert whole == tokenizer.decode(plain, skip_special_tokens=True)
    third = int(plain[2])
    first = plain.tolist().index(third)
    cut = causal_lm.generate(model, tokenizer, [5, 6], stop_ids=[458, third], **settings)
    assert cut == tokenizer.decode(plain[: first + 1], skip_special_tokens=True)


def test_a_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    model = text_toys.model("gemma3_text")
    causal_lm.save(model, text_toys.chatml_tokenizer(), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(causal_lm.probe(again), causal_lm.probe(model))
