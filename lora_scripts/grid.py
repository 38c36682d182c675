"""A grid of pictures with labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
# Fonts with Chinese, Japanese and Korean letters, where systems keep them; else Pillow's own.
FONTS = (
    "C:/Windows/Fonts/msyh.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
)


def labelled(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    *,
    cell: int | None = None,
) -> Image.Image:
    """Pictures of one size in rows; labels above the columns and above each row.

    Small pictures are enlarged to at least 192 pixels, or to `cell`, with their pixels kept square.
    """
    width, height = rows[0][0].size
    factor = max(1, round((cell or 192) / max(width, height)))
    width, height = width * factor, height * factor
    size = max(13, min(20, width // 14))
    line = size + MARGIN
    columns = len(column_labels)
    sheet = Image.new(
        "RGB",
        (columns * (width + MARGIN) + MARGIN, line + len(rows) * (height + line) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        at = (MARGIN + column * (width + MARGIN), MARGIN // 2)
        draw.text(at, _fitted(label, width, size), fill="black", font=_font(size))
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = line + number * (height + line)
        total = columns * (width + MARGIN) - MARGIN
        draw.text((MARGIN, top), _fitted(label, total, size), fill="#555555", font=_font(size))
        for column, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + column * (width + MARGIN), top + line - MARGIN // 2))
    return sheet


def sheet(
    pictures: Sequence[Image.Image],
    labels: Sequence[Sequence[str]],
    *,
    columns: int = 6,
    cell: int = 192,
) -> Image.Image:
    """Pictures of any size in rows, each fitted into a square cell, lines of text below it.

    Small ones are enlarged by a whole factor, with their pixels kept square.
    """
    size = 13
    height = cell + max(len(lines) for lines in labels) * (size + 3) + MARGIN
    rows = -(-len(pictures) // columns)
    across = min(columns, len(pictures))
    whole = across * (cell + MARGIN) + MARGIN, rows * height + MARGIN
    paper = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(paper)
    for number, (picture, lines) in enumerate(zip(pictures, labels, strict=True)):
        left = MARGIN + number % columns * (cell + MARGIN)
        top = MARGIN + number // columns * height
        factor = max(1, cell // max(picture.size))
        small = picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
        small.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        at = left + (cell - small.width) // 2, top + (cell - small.height) // 2
        paper.paste(small, at)
        draw.rectangle((at[0], at[1], at[0] + small.width - 1, at[1] + small.height - 1),
                       outline="#cccccc")  # fmt: skip
        for row, line in enumerate(lines):
            under = left, top + cell + 2 + row * (size + 3)
            fill = "black" if row == 0 else "#555555"
            draw.text(under, _fitted(line, cell, size), fill=fill, font=_font(size))
    return paper


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for path in FONTS:
        if Path(path).is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def _fitted(label: str, width: int, size: int) -> str:
    """The label, cut with an ellipsis if it is wider than `width` pixels."""
    font = _font(size)
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(f"{label}…") > width:
        label = label[:-1]
    return f"{label}…"
