"""The text task: what is learned, what a batch holds, and that no shortcut changes the loss."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from lora_scripts.data import text
from lora_scripts.data.chat import Encoded
from lora_scripts.data.samples import SampleSet
from lora_scripts.errors import UserError
from lora_scripts.models import causal_lm, packing
from lora_scripts.tasks.language import LanguageTask
from lora_scripts.tasks.task import Key
from tests import runs, text_toys

TRAIN = Key(42, "train", 0)
PACKABLE = [name for name in text_toys.ARCHITECTURES if name != "lfm2"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return text_toys.write_jsonl(tmp_path / "rows.jsonl")


def loss_of(task: LanguageTask) -> tuple[float, int]:
    """Sum and count over an epoch."""
    total, count = 0.0, 0
    with torch.no_grad():
        for indices in task.plan(TRAIN):
            loss = task.loss(task.load(indices, TRAIN), TRAIN)
            total, count = total + loss.total.item(), count + int(loss.count)
    return total, count


def plain_loss(task: LanguageTask) -> tuple[float, int]:
    """The same by transformers' own loss: one row at a time, all logits, labels of -100."""
    total, count = 0.0, 0
    with torch.no_grad(), packing.attention(task.base.model, task.own_attention):
        for index in range(len(task.data.encoding)):
            ids, learned = task.data.encoding.read(index)
            labels = torch.where(learned, ids, -100)
            mean = task.base.model(input_ids=ids[None], labels=labels[None], use_cache=False).loss
            number = int((labels[1:] != -100).sum())
            total, count = total + mean.item() * number, count + number
    return total, count


@pytest.mark.parametrize("architecture", PACKABLE)
def test_packed_padded_and_plain_losses_are_the_same(
    tmp_path: Path, rows: Path, architecture: str
) -> None:
    base = text_toys.save_model(tmp_path / "base", architecture)
    packed, _, _ = runs.text_task(base, rows, tmp_path)
    padded, _, _ = runs.text_task(base, rows, tmp_path, packing=False)
    assert packed.packed and not padded.packed
    expected, count = plain_loss(packed)
    assert count > 100
    for task in (packed, padded):
        found, found_count = loss_of(task)
        assert found_count == count
        assert found == pytest.approx(expected, rel=2e-5)


def test_hybrids_are_not_packed_but_grouped_by_length(
    tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = text_toys.save_model(tmp_path / "base", "lfm2")
    with caplog.at_level("WARNING", logger="lora_scripts"):
        task, _, _ = runs.text_task(base, rows, tmp_path)
    assert not task.packed
    assert "packing is off: its conv layers would carry a state from row to row" in caplog.text
    lengths = task.data.encoding.lengths()
    waste = [sum(max(lengths[list(b)]) - lengths[i] for i in b) for b in task.plan(TRAIN)]
    assert sum(waste) < 0.15 * lengths.sum()
    assert loss_of(task)[0] == pytest.approx(plain_loss(task)[0], rel=2e-5)


def test_the_trap_that_packing_avoids(tmp_path: Path, rows: Path, llama: Path) -> None:
    """Rows end to end without our attention do see each other: the test above can fail."""
    task, _, _ = runs.text_task(llama, rows, tmp_path)
    batch = task.load(task.plan(TRAIN)[0], TRAIN)
    with torch.no_grad(), packing.attention(task.base.model, "sdpa"):
        joined = task.base.model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    wrong = functional.cross_entropy(joined[batch["columns"]], batch["targets"], reduction="sum")
    right = task.loss(batch, TRAIN).total
    assert abs(wrong - right) > 1e-3 * right


def test_only_answers_and_their_ends_are_learned(tmp_path: Path, rows: Path, llama: Path) -> None:
    task, _, _ = runs.text_task(llama, rows, tmp_path)
    tokenizer = task.base.tokenizer
    said = []
    for indices in task.plan(TRAIN):
        said.append(tokenizer.decode(task.load(indices, TRAIN)["targets"]))
    text_said = "".join(said)
    answers = [
        message["content"]
        for row in text_toys.conversations()
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert len(text_said) == sum(len(answer) + len("<|im_end|>") for answer in answers)
    assert all(f"{answer}<|im_end|>" in text_said for answer in answers)


def test_accumulation_does_the_same_as_one_big_batch(
    tmp_path: Path, rows: Path, llama: Path
) -> None:
    common: dict[str, Any] = {"epochs": 1, "max_grad_norm": 0, "save_dtype": "fp32"}
    _, big = runs.run_text(llama, rows, tmp_path / "big", batch_size=12, **common)
    _, small = runs.run_text(
        llama, rows, tmp_path / "small", batch_size=5, gradient_accumulation_steps=3, **common
    )
    (a,), (b,) = ([row for row in runs.metrics(o) if "loss" in row] for o in (big, small))
    assert a["tokens"] == b["tokens"] > 300
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_checkpointed_gradients_are_the_same(tmp_path: Path, rows: Path, llama: Path) -> None:
    _, plain = runs.run_text(llama, rows, tmp_path / "plain")
    _, saved = runs.run_text(llama, rows, tmp_path / "saved", gradient_checkpointing=True)
    assert runs.metrics(plain) == [pytest.approx(row, rel=1e-4) for row in runs.metrics(saved)]


# --- rows to samples ------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_windows_throw_nothing_away_and_learn_every_token_once(stride: int) -> None:
    whole = Encoded(np.arange(100, dtype=np.int32), np.arange(100) > 0)
    parts = list(text.windows(whole, 16, stride))
    learned = np.concatenate([part.ids[part.supervised] for part in parts])
    assert learned.tolist() == list(range(1, 100))
    assert all(len(part.ids) == 16 for part in parts[:-1])
    assert not any(part.supervised[0] for part in parts)
    overlap = max(1, stride)
    assert all(a.ids[-overlap:].tolist() == b.ids[:overlap].tolist() for a, b in pairwise(parts))


def test_a_book_is_learned_whole(tmp_path: Path, llama: Path) -> None:
    book = tmp_path / "book"
    book.mkdir()
    (book / "one.md").write_text("It is sunny today. " * 60, encoding="utf-8")
    (book / "two.txt").write_text("天气怎么样？今天是晴天。" * 20, encoding="utf-8")
    task, _, _ = runs.text_task(llama, book, tmp_path, max_seq_length=64, stride=8)
    lengths = task.data.encoding.lengths()
    assert lengths.max() == 64
    learned = sum(len(task.load((i,), TRAIN)["targets"]) for i in range(len(lengths)))
    tokenizer = task.base.tokenizer
    whole = [
        len(tokenizer(path.read_text(encoding="utf-8"))["input_ids"]) for path in book.iterdir()
    ]
    assert learned == sum(whole)  # with the end-of-text of each, without its first token


def test_what_is_cut_is_said(tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    question = {"role": "user", "content": "Hello?"}
    long = {"messages": [question, {"role": "assistant", "content": "good " * 200}]}
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl", [*text_toys.conversations(3), long])
    with caplog.at_level("WARNING", logger="lora_scripts"):
        runs.text_task(llama, data, tmp_path, max_seq_length=128)
    assert "1 of 4 rows are longer than max_seq_length 128" in caplog.text


def test_a_row_of_which_nothing_is_left_is_named(tmp_path: Path, llama: Path) -> None:
    question = {"role": "user", "content": "good " * 200}
    long = {"messages": [question, {"role": "assistant", "content": "Yes."}]}
    rows = [*text_toys.conversations(3), long, long]
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as error:
        runs.text_task(llama, data, tmp_path, max_seq_length=128)
    assert [problem.where for problem in error.value.problems] == [
        "rows.jsonl line 4", "rows.jsonl line 5"
    ]  # fmt: skip
    assert "nothing is left to learn of it within max_seq_length 128" in str(error.value)


def test_copies_of_a_row_stay_on_one_side_of_the_split(tmp_path: Path, llama: Path) -> None:
    rows = text_toys.conversations(10) * 3
    data = text_toys.write_jsonl(tmp_path / "rows.jsonl", rows)
    task, _, _ = runs.text_task(llama, data, tmp_path, validation_split=0.3)
    assert task.held_out
    encoding = task.data.encoding
    sides = [
        {tuple(encoding.read(i)[0].tolist()) for i in part.samples}
        for part in (task.data.train, task.data.validation)
    ]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [7, 3]


def test_weights_deal_out_evenly() -> None:
    samples = SampleSet(np.arange(40), np.repeat([0.25, 2.5], 20))
    epochs = [samples.views(42, "train", epoch=epoch) for epoch in range(4)]
    counts = np.bincount(np.concatenate(epochs), minlength=40)
    assert (counts[:20] == 1).all()
    assert (counts[20:] == 10).all()
    assert [sorted(epoch) for epoch in epochs[:1]] != [sorted(epoch) for epoch in epochs[1:2]]
    again = samples.views(42, "train", epoch=2)
    assert (again == epochs[2]).all()


def test_a_second_run_finds_the_tokens(tmp_path: Path, rows: Path, llama: Path) -> None:
    first, _, _ = runs.text_task(llama, rows, tmp_path)
    path = Path(first.data.encoding.path)
    before = path.stat().st_mtime_ns
    second, _, _ = runs.text_task(llama, rows, tmp_path, lora_rank=8)
    assert second.data.encoding.path == str(path)
    assert path.stat().st_mtime_ns == before
    other, _, _ = runs.text_task(llama, rows, tmp_path, train_on="all")
    assert other.data.encoding.path != str(path)
    assert other.data.encoding.learned.sum() > first.data.encoding.learned.sum()


# --- what is adapted ------------------------------------------------------------------------------


def test_targets_can_be_named(tmp_path: Path, rows: Path, llama: Path) -> None:
    task, _, _ = runs.text_task(llama, rows, tmp_path, lora_targets=["q_proj", "mlp.up_proj"])
    kinds = {path.rsplit(".", 1)[-1] for path in task.targets.adapted}
    assert kinds == {"q_proj", "up_proj"}
    with pytest.raises(UserError, match=r"found qproj; this model's layers are down_proj, gate"):
        runs.text_task(llama, rows, tmp_path, lora_targets=["qproj"])


def test_no_vision_tower_and_no_router_is_adapted() -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    common = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**common, "num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": 1,
                     "vocab_size": 64},
        vision_config={**common, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    found = causal_lm.targets(AutoModelForCausalLM.from_config(config), "linear")
    assert len(found.adapted) == 2 * 7
    assert not any("vision" in path for path in found.adapted)
    moe = causal_lm.targets(text_toys.model("qwen3_moe"), "linear")
    assert {path.rsplit(".", 1)[-1] for path in moe.adapted} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert any("experts" in skipped for skipped in moe.skipped)


def test_the_models_own_code_is_not_run_unasked(tmp_path: Path, rows: Path, llama: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    own = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (base / "config.json").write_text(json.dumps({**config, **own}), encoding="utf-8")
    (base / "modeling_own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(UserError, match="trust_remote_code: true"):
        runs.text_task(base, rows, tmp_path)


def test_quantisation_is_refused_with_the_reason(tmp_path: Path, rows: Path, llama: Path) -> None:
    with pytest.raises(UserError, match="quantization: found nf4, but this run is on a cpu"):
        runs.text_task(llama, rows, tmp_path, quantization="nf4", device="cpu")
