"""Files that promise more than they hold, and pictures that unpack to more than fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from lora_scripts.data import (
    looking,
)
from lora_scripts.models import causal_lm
from lora_scripts.models.header import read_header
from lora_scripts.models.text_signature import read_text_signature
from tests import text_toys
from tests.safety.attempts import refused


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8, 0])
def test_a_header_that_promises_too_much_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 100)
    assert "no safetensors file, or a damaged one" in refused(lambda: read_header(path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    ],
)
def test_a_header_that_does_not_describe_its_file(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert "damaged" in refused(lambda: read_header(path))


def test_bombs_of_pixels_and_of_text_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    found = looking.look(path)
    assert found.error is not None and found.error[0] == "too-large"
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 80_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    assert path.stat().st_size < 200_000
    found = looking.look(path)
    assert found.error is not None and "Decompressed data too large" in found.error[1]


def test_a_config_of_endless_layers_is_refused(tmp_path: Path) -> None:
    folder = evil_folder(tmp_path / "m", "config.json", num_hidden_layers=2_000_000)
    assert "no model has so many" in refused(lambda: read_text_signature(folder))


def evil_folder(folder: Path, file: str, **changes: Any) -> Path:
    """A toy model with other values in one of its JSON files."""
    text_toys.save_model(folder)
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**values, **changes}), encoding="utf-8")
    return folder


def test_a_token_with_a_huge_number_is_refused(tmp_path: Path) -> None:
    """What counts up to it would take gigabytes; found by fuzzing."""
    folder = text_toys.save_model(tmp_path / "m")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(values), encoding="utf-8")
    assert "the number 2,147,483,648" in refused(lambda: causal_lm.read_tokenizer(folder))
