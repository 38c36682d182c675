"""Rows as tokens: which of them are cut at `max_seq_length` is said, with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_scripts.data import conversations, text
from lora_scripts.data.chat import ChatFormat
from lora_scripts.data.rows import Rows
from lora_scripts.schema import TextConfig, TextDataset
from tests import text_toys


def encoded(folder: Path, lengths: list[int], **keys: Any) -> tuple[text.Encoding, str]:
    """Rows whose answers have so many words; the encoding, and what is said of the cut."""
    rows = [{"prompt": "Go on!", "completion": "good " * length} for length in lengths]
    path = text_toys.write_jsonl(folder / "rows.jsonl", rows)
    values = {"task_type": "text-generation", "base_model": "toy", "train_data_dir": path,
              "output_dir": folder / "out", "cache_dir": folder / "cache",
              "max_seq_length": 64}  # fmt: skip
    config = TextConfig.model_validate({**values, **keys})
    format = ChatFormat(text_toys.chatml_tokenizer(), None, "Be kind.")
    dataset = TextDataset(path=path)
    read = Rows([(conversations.read_texts(path, None).records, dataset)])
    found = text.encode(read, format, config, lambda done, total: None)
    (remark,) = [r for r in text.remarks(format, found, read, config) if "cut off" in r] or [""]
    return found, remark


def test_rows_that_are_cut_are_named_with_their_lines(tmp_path: Path) -> None:
    found, remark = encoded(tmp_path, [1, 60, 2, 80])
    lost = {f"rows.jsonl line {row + 1}": tokens for row, tokens in found.cut.tolist()}
    assert list(lost) == ["rows.jsonl line 2", "rows.jsonl line 4"]
    assert found.lengths().max() == 64
    assert lost["rows.jsonl line 4"] - lost["rows.jsonl line 2"] == 80  # four tokens a word
    assert remark == (
        f"2 of 4 rows are longer than max_seq_length 64: {sum(lost.values())} tokens at their ends "
        f"are cut off and not learned, of rows.jsonl line 4 ({lost['rows.jsonl line 4']}), "
        f"rows.jsonl line 2 ({lost['rows.jsonl line 2']}). Raise max_seq_length, or shorten these "
        "rows"
    )


def test_the_longest_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    found, remark = encoded(tmp_path, [60 + number for number in range(13)])
    assert len(found.cut) == 13
    assert remark.count("rows.jsonl line") == 10 and "and 3 more. Raise" in remark
    assert "rows.jsonl line 13 (" in remark and "rows.jsonl line 3 (" not in remark


def test_nothing_is_cut(tmp_path: Path) -> None:
    found, remark = encoded(tmp_path, [1, 2, 60], max_seq_length=512)
    assert len(found.cut) == 0 and remark == ""


def test_an_entry_that_was_written_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = encoded(tmp_path, [1, 60, 80])
    monkeypatch.setattr(text, "_tokenise", None)  # another time would fail
    again, said_again = encoded(tmp_path, [1, 60, 80])
    assert again.cut.tolist() == first.cut.tolist() and said_again == said
