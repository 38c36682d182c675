"""Encodings are told by name, also of a few words."""

from __future__ import annotations

import pytest

from lora_scripts.data.encodings import likely

TEXTS = [
    ("gb18030", "GBK", "img01.jpg,x\nimg02.png,赛博朋克城市"),
    ("gb18030", "GBK", "赛博朋克"),
    ("gb18030", "GBK", '1.png,一只猫坐在窗台上\n2.png,"霓虹灯下的街道，夜晚"\n'),
    ("big5", "Big5", "1.png,一隻貓坐在窗台上\n2.png,霓虹燈下的街道與夜晚\n"),
    ("big5", "Big5", "賽博龐克城市"),
    ("shift_jis", "Shift-JIS", "1.png,窓辺に座っている猫\n2.png,夜のネオン街の風景\n"),
    ("shift_jis", "Shift-JIS", "かわいい猫"),
    ("euc_kr", "EUC-KR", "1.png,창가에 앉아 있는 고양이\n"),
    ("cp1252", "Windows-1252", "img01.jpg,un café à Paris\n"),
    ("cp1252", "Windows-1252", "1.png,“a cat”\n2.png,the cat’s hat – red\n"),
    ("cp1252", "Windows-1252", "a 5° angle"),
    ("cp1251", "Windows-1251", "1.png,кот сидит на окне\n"),
]


@pytest.mark.parametrize(("codec", "name", "text"), TEXTS)
def test_likely(codec: str, name: str, text: str) -> None:
    data = text.encode(codec)
    with pytest.raises(UnicodeDecodeError):
        data.decode("utf-8")
    assert likely(data).startswith(name)


def test_nothing_that_makes_sense() -> None:
    assert likely(b"\x81") == "an 8-bit encoding"
