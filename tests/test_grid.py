"""The labelled grid: every picture in its cell, labels that fit."""

from __future__ import annotations

from PIL import Image

from lora_scripts import grid
from lora_scripts.sample import Lora, parse_lora


def test_pictures_stand_in_their_cells() -> None:
    colours = [["red", "green"], ["blue", "black"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    sheet = grid.labelled(rows, ["base", "a LoRA with a very long name " * 5], ["one", "两"])
    for label, expected in (("red", 1), ("green", 1), ("blue", 1)):
        colour = Image.new("RGB", (1, 1), label).getpixel((0, 0))
        area = sum(count for count, value in sheet.getcolors(10**6) if value == colour)
        assert area == expected * 192 * 192
    assert sheet.width == 2 * 192 + 3 * grid.MARGIN


def test_a_path_with_a_scale() -> None:
    assert parse_lora("output/x:0.8") == Lora(parse_lora("output/x").path, 0.8)
    assert parse_lora("x.safetensors").scale == 1.0
    assert parse_lora("C:\\loras\\x.safetensors").scale == 1.0
    assert str(parse_lora("C:\\loras\\x.safetensors:-0.5").path) == "C:\\loras\\x.safetensors"
