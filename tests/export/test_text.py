"""Text LoRAs: every architecture from load to files that PEFT reads to the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scripts import convert, pipeline
from lora_scripts.adapters import Adapter
from lora_scripts.convert import ConvertRequest
from lora_scripts.errors import UserError, WorkError
from lora_scripts.export import gguf_adapter
from lora_scripts.models import causal_lm
from tests import runs, text_toys

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "glm", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "mistral", "lfm2", "gpt2",
]  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    return causal_lm.probe(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_train_export_reload(tmp_path: Path, architecture: str) -> None:
    base = text_toys.save_model(tmp_path / "base", architecture)
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    code, output = runs.run_text(base, data, tmp_path, epochs=4, save_dtype="fp32")
    assert code == pipeline.EXIT_DONE
    rows = [row for row in runs.metrics(output) if "loss" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    adapted = PeftModel.from_pretrained(plain, str(output))
    after = logits(adapted)
    assert (after - before).abs().max() > 0.1
    state = load_file(output / "checkpoints" / "step-000012" / "training.safetensors")
    trained = {name: t for name, t in state.items() if name.startswith("adapter.")}
    loaded = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert len(trained) == len(loaded)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] <= 1e-5 * after.abs().max()
    # the file at hand, adapters applied by hand: W + alpha / rank * up @ down
    assert torch.allclose(after, logits(by_hand(base, output)), atol=2e-4 * after.abs().max())


def by_hand(base: Path, output: Path) -> torch.nn.Module:
    """The base with the update added to its weights, computed from the file alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(output / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, down in tensors.items():
            if ".lora_A." not in name:
                continue
            up = tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = config["lora_alpha"] / config["r"] * up @ down
            weight = modules[path].weight
            weight += update if type(modules[path]) is torch.nn.Linear else update.T
    return model.eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a finished run on it."""
    folder = tmp_path_factory.mktemp("finished")
    base = text_toys.save_model(folder / "base")
    data = text_toys.write_jsonl(folder / "rows.jsonl")
    _, output = runs.run_text(
        base, data, folder, epochs=4, validation_split=0.2,
        sample_prompts=["What is number 3?", {"prompt": "And?", "max_new_tokens": 4}],
    )  # fmt: skip
    return base, output


def test_what_a_finished_run_holds(finished: tuple[Path, Path]) -> None:
    base, output = finished
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert sorted(config["target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == text_toys.chatml_tokenizer().chat_template
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f'AutoModelForCausalLM.from_pretrained("{base}")' in card
    assert f'PeftModel.from_pretrained(model, "{output.as_posix()}")' in card
    assert "\nWhat is number 3?\n" in card
    rows = [row for row in runs.metrics(output) if "loss" in row]
    assert rows[-1]["tokens"] > 1000


def test_a_checkpoint_is_a_peft_directory(finished: tuple[Path, Path]) -> None:
    base, output = finished
    checkpoint = sorted((output / "checkpoints").iterdir())[-1]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(checkpoint))


def test_the_lines_of_the_card_work(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, output = finished
    card = (output / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)


def test_a_file_that_does_not_give_the_model_back_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_scripts.export import text as export

    original = export.TextExport._reload

    def spoilt(self: export.TextExport, folder: Path | None) -> torch.Tensor:
        path = self.config.output_dir / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({name: 1.05 * tensor for name, tensor in tensors.items()}, path)
        return original(self, folder)

    monkeypatch.setattr(export.TextExport, "_reload", spoilt)
    base = text_toys.save_model(tmp_path / "base")
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(WorkError, match="does not give the trained model"):
        runs.run_text(base, data, tmp_path, epochs=3)
    assert not (tmp_path / "output/toy/run.json").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_reads_back_exactly(tmp_path: Path, precision: str) -> None:
    base = text_toys.save_model(tmp_path / "base")
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    _, output = runs.run_text(base, data, tmp_path, mixed_precision=precision)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-3
    dtypes = {t.dtype for t in load_file(output / "adapter_model.safetensors").values()}
    assert dtypes == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "architecture"), [("dora", "llama"), ("rslora", "llama"), ("dora", "gpt2")]
)
def test_other_kinds_train_read_back_and_are_merged(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    """In bf16 and with fp16 files, magnitudes included; a rank with no whole root."""
    base = text_toys.save_model(tmp_path / "base", architecture)
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    changes = {"lora_type": kind, "lora_rank": 8, "epochs": 4, "mixed_precision": "bf16"}
    _, output = runs.run_text(base, data, tmp_path, **changes)
    rows = [row for row in runs.metrics(output) if "loss" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["largest_difference_after_reload"] < 1e-3
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["use_dora"], config["use_rslora"]) == (kind == "dora", kind == "rslora")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(output)
    )
    merged = convert.run(ConvertRequest("merged", [Adapter(output, 1.0)], None, None, "cpu"))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-4)


def test_llama_cpp_gets_an_rslora_and_no_dora(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    outputs = {
        kind: runs.run_text(base, data, tmp_path / kind, lora_type=kind, epochs=1)[1]
        for kind in ("rslora", "dora")
    }

    def written(kind: str) -> Path:
        return convert.run(ConvertRequest("gguf", [Adapter(outputs[kind], 1.0)], None, None, "cpu"))

    assert gguf_adapter.read_back(written("rslora")).alpha == 8 * 4**0.5
    with pytest.raises(UserError, match="does not know DoRA; use --merge"):
        written("dora")


def test_an_output_folder_with_somebody_elses_adapter_is_refused(tmp_path: Path) -> None:
    base = text_toys.save_model(tmp_path / "base")
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    output = tmp_path / "output" / "toy"
    output.mkdir(parents=True)
    (output / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"which holds adapter_config\.json but no run"):
        runs.run_text(base, data, tmp_path)
