"""What is written from the schema is in step with it, and every key is explained."""

from __future__ import annotations

from pathlib import Path

from lora_scripts import reference
from lora_scripts.schema import (
    ImageConfig,
    ImageDataset,
    SamplePrompt,
    TextConfig,
    TextDataset,
    TextPrompt,
)

ROOT = Path(__file__).parent.parent


def test_the_key_list_is_in_step() -> None:
    written = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert written == reference.key_list(), "run: python scripts/dev.py schema"


def test_every_key_is_listed_with_its_meaning() -> None:
    text = reference.key_list()
    for section in (ImageConfig, ImageDataset, SamplePrompt, TextConfig, TextDataset, TextPrompt):
        for name, field in section.model_fields.items():
            assert f"| `{name}` |" in text
            assert field.description and f"| {field.description} |" in text
