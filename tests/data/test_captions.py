from __future__ import annotations

import pytest

from lora_scripts.data.captions import compose


@pytest.mark.parametrize(
    ("caption", "prefix", "suffix", "trigger", "expected"),
    [
        ("a cat", "", "", None, "a cat"),
        ("a cat", "photo of ", ", 4k", None, "photo of a cat, 4k"),
        ("a cat", "photo of", "4k", None, "photo ofa cat4k"),  # no separator is invented
        ("a cat", "", "", "zwx", "zwx, a cat"),
        ("a cat", "art of ", "", "zwx", "zwx, art of a cat"),
        ("a ZWX cat", "", "", "zwx", "a ZWX cat"),
        ("a cat", "zwx style, ", "", "ZWX", "zwx style, a cat"),
        ("a zwxy cat", "", "", "zwx", "zwx, a zwxy cat"),
        ("a_zwx cat", "", "", "zwx", "zwx, a_zwx cat"),
        ("(zwx:1.2), cat", "", "", "zwx", "(zwx:1.2), cat"),
        ("", "", "", "zwx", "zwx"),
        ("  ", "", "", "zwx", "zwx"),
        ("", "", "", None, ""),
        ("<lora:style_v1> a cat", "", "", None, "<lora:style_v1> a cat"),
        ("<lora:style_v1> a cat", "", "", "style_v1", "<lora:style_v1> a cat"),
        ("a cat", "", "", "<lora:style_v1>", "<lora:style_v1>, a cat"),
        ("a <lora:style_v1>.", "", "", "<lora:style_v1>", "a <lora:style_v1>."),
        ("a c++ cat", "", "", "c++", "a c++ cat"),
        ("straße", "", "", "STRASSE", "straße"),
        # scripts without spaces: a word may stand anywhere
        ("一张赛博朋克城市的照片", "", "", "赛博朋克", "一张赛博朋克城市的照片"),
        ("一张zwx的照片", "", "", "zwx", "一张zwx的照片"),
        ("一张zwxy的照片", "", "", "zwx", "zwx, 一张zwxy的照片"),
        ("城市", "", "", "赛博朋克", "赛博朋克, 城市"),
        ("고양이가 있다", "", "", "고양이", "고양이가 있다"),
        ("赛博朋克cat", "", "", "朋克cat", "赛博朋克cat"),
    ],
)
def test_compose(
    caption: str, prefix: str, suffix: str, trigger: str | None, expected: str
) -> None:
    assert compose(caption, prefix=prefix, suffix=suffix, trigger_word=trigger) == expected


def test_composing_twice_changes_nothing() -> None:
    once = compose("a cat", prefix="", suffix="", trigger_word="zwx")
    assert compose(once, prefix="", suffix="", trigger_word="zwx") == once
