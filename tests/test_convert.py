"""A finished text LoRA in other forms: each is read again and gives what was trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scripts import adapters, convert, pipeline
from lora_scripts.adapters import Adapter
from lora_scripts.convert import ConvertRequest, Form
from lora_scripts.device import Compute
from lora_scripts.errors import UserError, WorkError
from lora_scripts.export import gguf_adapter
from lora_scripts.models import causal_lm, chatglm, lora
from lora_scripts.models.text_signature import read_text_signature
from tests import base_toys, runs, text_toys
from tests.models import chatglm_reference as reference
from tests.models import test_chatglm as chatglm_toys

CPU = Compute(torch.device("cpu"), "no")
BASES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: text_toys.save_model(folder / "llama"),
    "gguf": lambda folder: base_toys.save_gguf(folder / "base.gguf", "MOSTLY_Q8_0"),
    "chatglm2": lambda folder: base_toys.save_chatglm(folder / "chatglm2", "chatglm2"),
    "chatglm3": lambda folder: base_toys.save_chatglm(folder / "chatglm3", "chatglm3"),
    "glm4": lambda folder: base_toys.save_chatglm(folder / "glm4", "glm4"),
}


def train(folder: Path, base: Path, **changes: Any) -> Path:
    data = text_toys.write_jsonl(folder / "rows.jsonl")
    code, output = runs.run_text(base, data, folder, **{"epochs": 4, **changes})
    assert code == pipeline.EXIT_DONE
    return output


def write(
    form: Form, *loras: Path | Adapter, base: Path | None = None, output: Path | None = None
) -> Path:
    adapters = [each if isinstance(each, Adapter) else Adapter(each, 1.0) for each in loras]
    named = None if base is None else str(base)
    return convert.run(ConvertRequest(form, adapters, named, output, "cpu"))


def refusal(form: Form, *loras: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        write(form, *loras, **changes)
    return str(caught.value)


def add_by_hand(model: nn.Module, folder: Path, scale: float = 1.0) -> None:
    """W + scale * alpha / rank * up @ down, from the file alone."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in [name for name in tensors if ".lora_A." in name]:
            down, up = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            modules[path].weight += scale * config["lora_alpha"] / config["r"] * up @ down


def load(base: Path) -> Any:
    return causal_lm.load(read_text_signature(base), CPU, own_dtype=True)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- a base that transformers does not read -------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf", "chatglm2", "chatglm3", "glm4"])
def test_from_a_foreign_base_to_the_lines_of_the_card(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = BASES[kind](tmp_path)
    output = train(tmp_path, base)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-5
    before = load(base).model
    expected = causal_lm.probe(PeftModel.from_pretrained(before, str(output)))

    with caplog.at_level("INFO", logger="lora_scripts"):
        written = write("base", output)
    assert written == output / "base"
    assert "names it as its base model now" in caplog.text
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(written)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"lora-scripts export --lora {output.as_posix()} --base" in card
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert torch.equal(causal_lm.probe(names["model"].eval()), expected)
    again = AutoTokenizer.from_pretrained(written)
    assert again.chat_template == AutoTokenizer.from_pretrained(output).chat_template
    assert "is there already" in refusal("base", output)
    assert not list(output.glob("*.tmp"))


def test_the_metadata_says_what_the_gguf_was(tmp_path: Path) -> None:
    base = BASES["gguf"](tmp_path)
    output = train(tmp_path, base, epochs=1)
    with safe_open(output / "adapter_model.safetensors", framework="pt") as stored:
        metadata = stored.metadata()
    assert metadata["lora_scripts.base_layout"] == "gguf"
    assert metadata["lora_scripts.base_model_type"] == "llama"
    assert metadata["lora_scripts.base_quantization"] == "Q8_0"
    assert metadata["lora_scripts.base_model_hash"] == hashlib.sha256(base.read_bytes()).hexdigest()


def test_a_transformers_folder_needs_no_conversion(llama: tuple[Path, Path]) -> None:
    base, output = llama
    assert f"{base}: is a transformers folder already" in refusal("base", output)
    assert not (output / "base").exists()


# --- merged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a finished run on it."""
    folder = tmp_path_factory.mktemp("llama")
    base = text_toys.save_model(folder / "base")
    return base, train(folder, base)


def test_merged_it_is_a_plain_model_with_the_same_logits(
    llama: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, output = llama
    with caplog.at_level("INFO", logger="lora_scripts"):
        folder = write("merged", output, output=tmp_path / "合并 merged")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float32
    assert not any("lora" in name for name, _ in merged.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = causal_lm.probe(plain)
    expected = causal_lm.probe(PeftModel.from_pretrained(plain, str(output)))
    torch.testing.assert_close(causal_lm.probe(merged), expected, atol=2e-5, rtol=0)
    assert (expected - untrained).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == text_toys.chatml_tokenizer().chat_template
    assert (
        tokenizer("天气 is good")["input_ids"]
        == text_toys.chatml_tokenizer()("天气 is good")["input_ids"]
    )
    assert "largest difference" in caplog.text and "rounded to float32" in caplog.text
    assert entries(tmp_path) == {folder.name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_the_precision_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tmp_path / "base"
    text_toys.model("qwen3").to(dtype).save_pretrained(base)
    text_toys.chatml_tokenizer().save_pretrained(base)
    output = train(tmp_path, base)
    merged = AutoModelForCausalLM.from_pretrained(write("merged", output))
    assert merged.dtype == dtype
    adapted = lora.with_adapters(load(base).model, [(output, 1.0)])
    expected = causal_lm.probe(adapted)
    difference = (causal_lm.probe(merged) - expected).abs().max()
    assert 0 < difference < 5 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("kind", ["gguf", "chatglm3", "glm4"])
def test_merged_from_a_foreign_base(kind: str, tmp_path: Path) -> None:
    base = BASES[kind](tmp_path)
    output = train(tmp_path, base, epochs=2)
    merged = AutoModelForCausalLM.from_pretrained(write("merged", output))
    assert merged.dtype == (torch.bfloat16 if kind == "gguf" else torch.float32)
    expected = causal_lm.probe(lora.with_adapters(load(base).model, [(output, 1.0)]))
    tolerance = (0.05 if kind == "gguf" else 1e-5) * expected.abs().max()
    torch.testing.assert_close(causal_lm.probe(merged), expected, atol=tolerance, rtol=0)


def test_several_loras_are_added_each_at_its_strength(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, first = llama
    second = train(tmp_path, base, seed=7, lora_rank=2, lora_targets=["q_proj", "down_proj"])
    folder = write("merged", Adapter(first, 0.8), Adapter(second, -0.5))
    assert folder == first / "merged"
    expected = AutoModelForCausalLM.from_pretrained(base)
    add_by_hand(expected, first, 0.8)
    add_by_hand(expected, second, -0.5)
    merged = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(merged[name], weight, msg=name)


def test_nothing_is_overwritten(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = llama
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "is there already" in refusal("merged", output, output=tmp_path / "there")
    assert "is there already" in refusal("chatglm", output, output=tmp_path / "there" / "mine.txt")
    assert (tmp_path / "there" / "mine.txt").read_text(encoding="utf-8") == "mine"
    (tmp_path / "empty").mkdir()
    assert write("merged", output, output=tmp_path / "empty") == tmp_path / "empty"
    assert "config.json" in entries(tmp_path / "empty")


def test_a_lora_of_another_base_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    _, output = llama
    others = {
        "wide": text_toys.save_model(tmp_path / "wide", hidden_size=64),
        "short": text_toys.save_model(tmp_path / "short", num_hidden_layers=1),
        "gpt2": text_toys.save_model(tmp_path / "gpt2", "gpt2"),
    }
    target = tmp_path / "merged"
    said = {
        name: refusal("merged", output, base=base, output=target) for name, base in others.items()
    }
    unfit = f"{output}: this adapter does not fit the base model: "
    assert unfit in said["wide"] and "is 48 → 64 in the model, 48 → 32 here" in said["wide"]
    assert unfit + "the model has no model.layers.1." in said["short"]
    assert unfit + "the model has no model.layers.0." in said["gpt2"]
    assert not target.exists()


def test_a_merged_model_that_differs_is_not_kept(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lora.merge

    def spoilt(adapted: Any) -> Any:
        merged = real(adapted)
        merged.lm_head.weight.data *= 1.01
        return merged

    monkeypatch.setattr(lora, "merge", spoilt)
    with pytest.raises(WorkError, match="it is not kept"):
        write("merged", llama[1], output=tmp_path / "merged")
    assert entries(tmp_path) == set()


# --- GGUF -----------------------------------------------------------------------------------------


def test_a_gguf_adapter_and_a_modelfile(
    llama: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, output = llama
    with caplog.at_level("INFO", logger="lora_scripts"):
        path = write("gguf", Adapter(output, 0.5), output=tmp_path / "mine.gguf")
    layers = lora.read_peft(output, 0.5)
    gguf_adapter.verify(path, layers, load(base).model.config, dtype=torch.float16)
    assert gguf_adapter.read_back(path).alpha == 4.0
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert f"FROM {base}" in lines
    assert "ADAPTER ./mine.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "ollama create mine -f" in caplog.text
    assert entries(tmp_path) == {"mine.gguf", "Modelfile"}
    assert len(refusal("gguf", output, output=tmp_path / "mine.gguf").splitlines()) == 2
    assert "Modelfile: is there" in refusal("gguf", output, output=tmp_path / "other.gguf")
    assert "must be the name of a .gguf file" in refusal("gguf", output, output=tmp_path / "x/y")


def test_the_system_message_of_the_training_goes_with_the_lora(tmp_path: Path) -> None:
    base = BASES["llama"](tmp_path)
    output = train(tmp_path, base, epochs=1, system_prompt='You answer "letters".')
    assert adapters.system_prompt([Adapter(output, 1.0)]) == 'You answer "letters".'
    write("gguf", output, output=tmp_path / "mine.gguf")
    modelfile = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert 'SYSTEM """You answer "letters"."""' in modelfile
    card = (output / "README.md").read_text(encoding="utf-8")
    assert 'Trained with the system message: `You answer "letters".`' in card


def test_a_gguf_base_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = BASES["gguf"](tmp_path)
    monkeypatch.chdir(tmp_path)
    output = train(tmp_path, Path("base.gguf"), epochs=1)
    with caplog.at_level("INFO", logger="lora_scripts"):
        path = write("gguf", output)
    assert path == output / "gguf" / "toy.gguf"
    assert f"FROM {base.resolve()}\n" in (output / "gguf/Modelfile").read_text(encoding="utf-8")
    assert "llama-cli -m base.gguf --lora" in caplog.text


def test_a_model_that_llama_cpp_would_not_know_is_refused_by_name(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base", "gpt2")
    output = train(tmp_path, base, epochs=1)
    assert "'gpt2'" in refusal("gguf", output)
    assert not list((output / "gguf").glob("*"))


def test_a_template_that_ollama_cannot_express_leaves_the_gguf(
    llama: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, _ = llama
    template = tmp_path / "turns.jinja"
    template.write_text(
        "{% for turn in messages %}<|im_start|>{{ turn.role }} {{ loop.index }}\n"
        "{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n"
        "{% endif %}",
        encoding="utf-8",
    )
    output = train(tmp_path, base, epochs=1, chat_template=str(template))
    path = write("gguf", output)
    assert path.is_file()
    assert "No Modelfile for Ollama: Ollama Modelfile: the chat template" in caplog.text
    assert entries(path.parent) == {"toy.gguf"}


# --- ChatGLM's own names --------------------------------------------------------------------------


class Empty(nn.Module):
    """A module that holds others, as ChatGLM's own code does."""


def skeleton(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The linear layers of the original code under their names."""
    root = Empty()
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim != 2:
            continue
        *parents, last = name.removesuffix(".weight").split(".")
        place = root
        for part in parents:
            if part not in dict(place.named_children()):
                place.add_module(part, Empty())
            place = place.get_submodule(part)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        place.add_module(last, layer)
    return root


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_under_chatglms_own_names_it_does_the_same(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path)
    output = train(tmp_path, base)
    folder = write("chatglm", output)
    assert folder == output / "chatglm"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    weights = reference.tensors(config)
    for layer in lora.read_peft(folder):
        weights[f"{layer.path}.weight"] += chatglm_toys.update(layer)
    model = chatglm.load(base, torch.float32)
    ids_BT, positions_T = chatglm_toys.some_ids(config), torch.arange(12)
    untrained = chatglm_toys.given(model, ids_BT, positions_T)
    trained = PeftModel.from_pretrained(model, str(output))
    found = chatglm_toys.given(trained, ids_BT, positions_T)
    expected = reference.logits(config, weights, ids_BT, positions_T, divides=name == "chatglm2")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found - untrained).abs().max() > 0.1

    # and PEFT's own reader puts it on layers of those names: same ranks, same scale
    bare = skeleton(config, reference.tensors(config))
    peft_config = LoraConfig.from_pretrained(str(folder))
    inject_adapter_in_model(peft_config, bare)
    stored = load_file(folder / "adapter_model.safetensors")
    named = {key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}
    result = set_peft_model_state_dict(bare, named)
    assert not result.unexpected_keys
    adapted = {path: m for path, m in bare.named_modules() if isinstance(m, LoraLayer)}
    assert len(adapted) == 8 == len(stored) // 2
    for path, module in adapted.items():
        update = weights[f"{path}.weight"] - reference.tensors(config)[f"{path}.weight"]
        torch.testing.assert_close(module.get_delta_weight("default"), update, atol=1e-5, rtol=0)


def test_only_chatglm_has_other_names(llama: tuple[Path, Path]) -> None:
    assert "is not in ChatGLM's original layout" in refusal("chatglm", llama[1])


# --- as it is typed -------------------------------------------------------------------------------


def test_what_is_typed_wrong(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_scripts.cli import app

    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "pytorch_lora_weights.safetensors").touch()
    pictures = str(tmp_path / "pictures")
    for arguments, said in [
        (["--lora", pictures], "give one of --merge, --single-file"),
        (["--lora", pictures, "--merge", "--base"], "give one of"),
        (["--lora", pictures, "--format", "onnx"], "--format onnx: must be"),
        (["--lora", pictures, "--merge"], "the file is empty"),
        (["--lora", pictures, "--base"], "is for images"),
    ]:
        result = CliRunner().invoke(app, ["export", *arguments])
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)


def test_only_merging_takes_several(llama: tuple[Path, Path]) -> None:
    _, output = llama
    assert "only --merge takes several" in refusal("gguf", output, output)
