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
