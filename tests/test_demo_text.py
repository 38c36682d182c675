"""The text demo: its data are what they should be, and its config trains on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_scripts import pipeline
from lora_scripts.config import load
from lora_scripts.data.conversations import TextRecord, read_texts
from lora_scripts.data.duplicates import near_duplicates
from lora_scripts.schema import TextConfig
from tests import runs, text_toys

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "assets" / "demo"
OPENING = "Thank you for writing to Tollenby Lanterns."
CLOSING = "Keep the light on, your Tollenby team."


def records(name: str) -> list[TextRecord]:
    found = read_texts(DEMO / name, None)
    assert found.problems == []
    return list(found.records)


def exchanges(rows: list[TextRecord]) -> list[tuple[str, str]]:
    return [
        (str(question["content"]), str(answer["content"]))
        for row in rows
        for question, answer in zip(row.messages[::2], row.messages[1::2], strict=True)
    ]


def test_the_letters_are_answered_in_one_manner() -> None:
    training, held_out = records("support_dialogues.jsonl"), records("support_heldout.jsonl")
    assert len(training) >= 200 and len(held_out) == 40
    for _, answer in exchanges([*training, *held_out]):
        assert answer.startswith(OPENING) and answer.endswith(CLOSING)
        assert answer.count(OPENING) == answer.count(CLOSING) == 1
    assert sum(len(row.messages) > 2 for row in training) >= 60


def test_no_letter_is_in_both() -> None:
    def shown(rows: list[TextRecord]) -> list[str]:
        return [
            f"{question}\n{answer.removeprefix(OPENING).removesuffix(CLOSING)}"
            for question, answer in exchanges(rows)
        ]

    training, held_out = (
        shown(records(f"support_{name}.jsonl")) for name in ("dialogues", "heldout")
    )
    assert near_duplicates(training, held_out) == []
    assert near_duplicates(training) == []
    questions = [
        [question for question, _ in exchanges(records(f"support_{name}.jsonl"))]
        for name in ("dialogues", "heldout")
    ]
    assert near_duplicates(*questions) == []


def test_the_general_questions_do_not_speak_of_the_shop() -> None:
    general = exchanges(records("general_prompts.jsonl"))
    assert len(general) == 50
    assert not any("Tollenby" in text or "lantern" in text.lower() for e in general for text in e)


def test_the_demo_config_trains_on_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(Path("configs/demo_text.yaml"))
    assert isinstance(config, TextConfig)
    base = text_toys.save_model(tmp_path / "base", max_position_embeddings=2048)
    overrides = {
        "base_model": base, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    typed = [f"{key}={json.dumps(str(value))}" for key, value in overrides.items()]
    typed += ["max_train_steps=3", "mixed_precision=no", "max_seq_length=1024"]
    assert pipeline.run(Path("configs/demo_text.yaml"), typed) == pipeline.EXIT_DONE
    prompts = len(config.sample_prompts)
    assert len(list((tmp_path / "out" / "samples").glob("*.txt"))) == 2 * prompts
    rows = [row for row in runs.metrics(tmp_path / "out") if "eval_loss" in row]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
