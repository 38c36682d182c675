"""The labelled grid: every picture in its cell, labels that fit."""

from __future__ import annotations

from PIL import Image

from lora_scripts import grid


def test_pictures_stand_in_their_cells() -> None:
    colours = [["red", "green"], ["blue", "black"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    sheet = grid.labelled(rows, ["base", "a LoRA with a very long name " * 5], ["one", "两"])
    for label, expected in (("red", 1), ("green", 1), ("blue", 1)):
        colour = Image.new("RGB", (1, 1), label).getpixel((0, 0))
        area = sum(count for count, value in sheet.getcolors(10**6) if value == colour)
        assert area == expected * 192 * 192
    assert sheet.width == 2 * 192 + 3 * grid.MARGIN


def test_a_sheet_holds_pictures_of_any_shape() -> None:
    pictures = [Image.new("RGB", size, "red") for size in ((64, 64), (400, 100), (10, 300))]
    sheet = grid.sheet(pictures, [["one", "两"], ["b"], ["a name that is long " * 9]], columns=2)
    assert sheet.size == (2 * 192 + 3 * grid.MARGIN, 2 * (192 + 2 * 16 + 8) + 8)
    # thrice as large, shrunk to the cell, shrunk to the cell; a line of grey around each
    inner = 190 * 190 + 190 * 46 + 4 * 190
    red = sum(n for n, value in sheet.getcolors(10**6) if value == (255, 0, 0))
    assert red == inner
