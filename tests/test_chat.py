"""Talking in the terminal: what is said, remembered and printed, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lora_scripts import adapters, chat
from lora_scripts.adapters import Adapter
from lora_scripts.device import Compute
from lora_scripts.errors import UserError
from lora_scripts.models import causal_lm
from lora_scripts.models.text_signature import read_text_signature
from tests import base_toys, runs, text_toys, toys
from tests.test_convert import add_by_hand

PROMPTS = ("What is number 3?", "And?")
# What comes after "And?" depends on whether something came before it.
ROWS = [
    {"user": "What is number 3?", "assistant": "Yes.", "again": "No, thank you."},
    {"user": "And?", "assistant": "How are you?", "again": "Hello there!"},
]
CPU = Compute(torch.device("cpu"), "no")


def train(folder: Path, base: Path, **changes: Any) -> Path:
    rows = [
        [
            {"role": "user", "content": row["user"]},
            {"role": "assistant", "content": row["assistant"]},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": row["again"]},
        ]
        for row in ROWS
    ]
    data = text_toys.write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows])
    _, output = runs.run_text(base, data, folder, **{"epochs": 40, "batch_size": 2, **changes})
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Bases and finished runs on them, by layout."""
    folder = tmp_path_factory.mktemp("trained")
    bases = {
        "llama": text_toys.save_model(folder / "llama"),
        "gguf": base_toys.save_gguf(folder / "base.gguf"),
        "chatglm3": base_toys.save_chatglm(folder / "chatglm3", "chatglm3"),
        "glm4": base_toys.save_chatglm(folder / "glm4", "glm4"),
    }
    return {name: (base, train(folder / f"run {name}", base)) for name, base in bases.items()}


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which precision is the fastest here is no matter of these tests."""
    monkeypatch.setattr("lora_scripts.device._fastest_on_cpu", lambda: "no")


def ask(
    capsys: pytest.CaptureFixture[str],
    loras: Sequence[Adapter],
    prompts: Sequence[str] = PROMPTS,
    base: Path | None = None,
    **changes: Any,
) -> str:
    """What stands in the terminal in the end."""
    values = {"system_prompt": None, "max_new_tokens": 12, "temperature": 0.0, "seed": 42}
    values |= {"device": "cpu", **changes}
    named = None if base is None else str(base)
    capsys.readouterr()
    chat.run(chat.ChatRequest(base=named, loras=loras, prompts=prompts, **values))
    return capsys.readouterr().out


def answer_by_hand(model: Any, tokenizer: Any, messages: list[dict[str, str]], stops: Any) -> str:
    """transformers' own template and generation."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids(stops),
        pad_token_id=0,
    )
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def talk_by_hand(model: Any, tokenizer: Any, prompts: Sequence[str], stops: Any) -> str:
    messages, shown = [], ""
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        answer = answer_by_hand(model, tokenizer, messages, stops)
        messages.append({"role": "assistant", "content": answer})
        shown += f"> {prompt}\n{answer}\n"
    return shown


STOPS = {
    "llama": ["<|im_end|>"],
    "gguf": ["<|im_end|>"],
    "chatglm3": ["<|user|>", "<|observation|>", "</s>"],
    "glm4": ["<|user|>", "<|observation|>", "<|endoftext|>"],
}


@pytest.mark.parametrize("layout", STOPS)
def test_answers_are_transformers_own_and_the_first_turn_is_remembered(
    layout: str, trained: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = trained[layout]
    loaded = causal_lm.load(read_text_signature(base), CPU)
    model = PeftModel.from_pretrained(loaded.model, str(output)).eval()
    expected = talk_by_hand(model, loaded.tokenizer, PROMPTS, STOPS[layout])
    found = ask(capsys, [Adapter(output, 1.0)])
    assert [line.rstrip() for line in found.splitlines()] == [
        line.rstrip() for line in expected.splitlines()
    ]
    alone = ask(capsys, [Adapter(output, 1.0)], prompts=PROMPTS[1:])
    assert not found.endswith(alone)


def test_the_base_alone_and_the_lora_at_no_strength_say_the_same(
    trained: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = trained["llama"]
    alone = ask(capsys, [], base=base)
    assert ask(capsys, [Adapter(output, 0.0)]) == alone
    assert ask(capsys, [Adapter(output, 1.0)]) != alone


def test_two_loras_act_together_each_at_its_strength(
    trained: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, first = trained["llama"]
    second = train(tmp_path, base, seed=7, lora_rank=2, lora_targets=["q_proj", "down_proj"])
    model = causal_lm.load(read_text_signature(base), CPU).model
    add_by_hand(model, first, 0.8)
    add_by_hand(model, second, 0.5)
    expected = talk_by_hand(model, text_toys.chatml_tokenizer(), PROMPTS, "<|im_end|>")
    assert ask(capsys, [Adapter(first, 0.8), Adapter(second, 0.5)]) == expected


def test_an_input_that_is_no_terminal_is_read_to_its_end(
    trained: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = [Adapter(trained["llama"][1], 1.0)]
    both = ask(capsys, lora)
    first, second = (ask(capsys, lora, prompts=[prompt]) for prompt in PROMPTS)
    for typed, expected in [
        ("What is number 3?\n\n  And?  ", both),
        ("What is number 3?\n/reset\nAnd?\n", f"{first}> /reset\n{second}"),
        ("And?\n/exit\nWhat is number 3?\n", f"{second}> /exit\n"),
        ("", ""),
    ]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert ask(capsys, lora, prompts=()) == expected


def test_a_draw_is_repeated_by_its_seed(
    trained: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    lora = [Adapter(trained["llama"][1], 1.0)]
    drawn = [ask(capsys, lora, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_system_prompt_is_put_first(
    trained: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = trained["llama"]
    loaded = causal_lm.load(read_text_signature(base), CPU)
    model = PeftModel.from_pretrained(loaded.model, str(output)).eval()
    messages = [{"role": "system", "content": "天气"}, {"role": "user", "content": "And?"}]
    expected = answer_by_hand(model, loaded.tokenizer, messages, "<|im_end|>")
    found = ask(capsys, [Adapter(output, 1.0)], ["And?"], system_prompt="天气")
    assert found == f"> And?\n{expected}\n"


def test_the_system_message_of_the_training_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = text_toys.save_model(tmp_path / "base")
    loras = [Adapter(train(tmp_path, base, system_prompt="天气"), 1.0)]
    with caplog.at_level("INFO", logger="lora_scripts"):
        found = ask(capsys, loras, ["And?"])
    assert "System message: 天气" in caplog.text
    assert found == ask(capsys, loras, ["And?"], system_prompt="天气")
    assert found != ask(capsys, loras, ["And?"], system_prompt="")


# --- as it is typed -------------------------------------------------------------------------------


def command(
    folder: Path, *arguments: str, typed: str = "", encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """`lora-scripts …` typed in `folder`, offline."""
    root = str(Path(chat.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "lora_scripts", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": encoding},
        input=typed,
        capture_output=True,
        encoding=encoding,
        timeout=120,
        check=False,
    )


def test_chinese_on_a_chinese_console(trained: dict[str, tuple[Path, Path]]) -> None:
    _, output = trained["glm4"]
    done = command(
        output, "chat", "--lora", f"{output}:0.9", "--max-new-tokens", "5", "--device", "cpu",
        typed="天气怎么样？\n你好\n", encoding="gbk",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"glm4 with {output} at 0.9")
    assert lines[1] == "> 天气怎么样？"
    assert "> 你好" in lines


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    done = command(tmp_path, "chat", "--lora", "nowhere:0.5", "--lora", "没有", "--prompt", "Hi")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "2 problems:",
        "  --lora nowhere: must be the folder of a finished run; there is no such folder here",
        "  --lora 没有: must be the folder of a finished run; there is no such folder here",
    ]


# --- what is refused ------------------------------------------------------------------------------


def refusal(loras: Sequence[Path], base: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        adapters.check([Adapter(path, 1.0) for path in loras])
        adapters.find_base([Adapter(path, 1.0) for path in loras], base)
    return str(caught.value)


def peft_folder(path: Path, config: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(config, encoding="utf-8")
    (path / "adapter_model.safetensors").touch()
    return path


def test_what_is_no_finished_text_lora(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "pytorch_lora_weights.safetensors").touch()
    assert "this is a LoRA for pictures" in refusal([pictures])
    assert "`lora-scripts sample`" in refusal([pictures])
    single = tmp_path / "style.safetensors"
    single.touch()
    assert "LoRAs for pictures: `lora-scripts sample`" in refusal([single])
    text = peft_folder(tmp_path / "text", "{}")
    expected = f"must be the folder of a finished run: {text}"
    assert expected in refusal([text / "adapter_model.safetensors"])
    (text / "adapter_model.safetensors").unlink()
    assert "there is no adapter_model.safetensors in it" in refusal([text])
    assert "cannot be read as JSON" in refusal([peft_folder(tmp_path / "cut", "{")])
    assert "should hold one JSON object" in refusal([peft_folder(tmp_path / "list", "[]")])


def test_an_unfinished_run_points_at_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in ("step-000100", "step-000900", "step-000900.tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    newest = tmp_path / "checkpoints" / "step-000900"
    assert f"this run is not finished; its newest checkpoint is {newest}" in refusal([tmp_path])


def test_a_checkpoint_can_be_talked_to(
    trained: dict[str, tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, output = trained["llama"]
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert ask(capsys, [Adapter(checkpoint, 1.0)]) == ask(capsys, [Adapter(output, 1.0)])
    assert "the base's chat template is used" in caplog.text


def test_which_base_is_not_guessed(tmp_path: Path) -> None:
    assert "name the base model: hub id, folder or .gguf file" in refusal([])
    silent = peft_folder(tmp_path / "silent", '{"base_model_name_or_path": null}')
    assert "silent does not say which base model it is for" in refusal([silent])
    a = peft_folder(tmp_path / "a", '{"base_model_name_or_path": "x/a"}')
    b = peft_folder(tmp_path / "b", '{"base_model_name_or_path": "x/b"}')
    assert f"different base models ({a} on x/a, {b} on x/b); name one" in refusal([a, b])


def test_a_base_that_lies_elsewhere_now(tmp_path: Path) -> None:
    moved = peft_folder(tmp_path / "moved", '{"base_model_name_or_path": "./models/gone"}')
    said = refusal([moved])
    assert "./models/gone: no such file or folder" in said
    assert "adapter_config.json names this base model; if it lies elsewhere, name it" in said
    assert "adapter_config.json" not in refusal([moved], "./models/else")


def test_a_hub_id_offline(tmp_path: Path) -> None:
    said = refusal([], "someone/a-model")
    assert "someone/a-model: no such folder here, and the hub cannot be reached" in said


def test_an_image_model_is_no_partner(tmp_path: Path) -> None:
    sd = toys.save_stable_diffusion(tmp_path / "sd")
    assert "a model for images" in refusal([], str(sd))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a", "a", 1.0),
        ("a:0.8", "a", 0.8),
        ("a:-1", "a", -1.0),
        ("C:\\loras\\mine", "C:\\loras\\mine", 1.0),
        ("C:\\loras\\mine:0.5", "C:\\loras\\mine", 0.5),
        ("a:", "a:", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:inf", "a:inf", 1.0),
        ("0.8", "0.8", 1.0),
        (":0.8", ":0.8", 1.0),
    ],
)
def test_path_and_strength(text: str, path: str, scale: float) -> None:
    assert adapters.parse(text) == Adapter(Path(path), scale)


def test_a_run_that_was_moved_is_still_read(
    trained: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = trained["llama"]
    shutil.copytree(output, tmp_path / "我的 LoRA")
    config = json.loads((tmp_path / "我的 LoRA/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(base)
    moved = ask(capsys, [Adapter(tmp_path / "我的 LoRA", 1.0)])
    assert moved == ask(capsys, [Adapter(output, 1.0)])
