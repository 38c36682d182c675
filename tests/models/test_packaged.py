"""CLIP's tokenizer, as it comes with the package, makes the published token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from lora_scripts.models.packaged import ZERO, clip_tokenizer

# Ids as published with CLIP and in the tests of other programs (MLImgSynth, Bumblebee), and as the
# SimpleTokenizer of open_clip_torch 3.3.0 gave them (2026-11) for digits, Chinese, emoji, case.
IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "A Photo of a CAT": [320, 1125, 539, 320, 2368],
    "a painting of a cat": [320, 3086, 539, 320, 2368],
    "bozuman": [647, 4091, 786],
    "   a   dog\t\tjumping\r\n": [320, 1929, 11476],
    "an illustration": [550, 6052],
    'a sign saying "Here lies Cesar"': [320, 2292, 4455, 257, 763, 3205, 28603, 257],
    "a sign saying 'Here lies Cesar'": [320, 2292, 4455, 262, 763, 3205, 28603, 262],
    "2025": [273, 271, 273, 276],
    "cyberpunk cityscape with neon lights": [36896, 40808, 593, 13919, 3073],
    "<lora:style_v1>": [283, 2179, 320, 281, 1844, 318, 341, 272, 285],
    "a photo of 猫": [320, 1125, 539, 163, 234, 360],
    "🐉🀄": [2074, 231, 558, 222, 482],
    "ÀÉÎ ŞİŁ": [36149, 3459, 127, 362, 21254, 328, 16384, 129, 480],
    "ＡＢＣ": [171, 121, 223, 171, 121, 224, 171, 121, 481],
    "A'veA'llA's": [320, 1200, 320, 1342, 320, 568],
    "": [],
    "  \t  \n": [],
    "corazón": [851, 854, 13926],
    "cat---dog-—-rabbit": [2368, 11079, 1929, 12, 6718, 268, 10274],
    "まあ、お待ちなさい。": [
        *(4813, 122, 4813, 480, 45262, 4813, 232, 161, 122, 227),
        *(4813, 94, 29104, 4813, 243, 38850, 38000),
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return clip_tokenizer()


@pytest.mark.parametrize("text", IDS)
def test_token_ids(tokenizer: Any, text: str) -> None:
    assert tokenizer(text).input_ids == [49406, *IDS[text], 49407]


def test_tokens_of_bytes_that_no_merge_covers(tokenizer: Any) -> None:
    """Every byte has a token, so nothing is unknown: the text comes back whole."""
    for text in ("赛博朋克城市", "🐉🀄", "\x7f\u0378"):
        ids = tokenizer(text).input_ids
        assert 49407 not in ids[1:-1] and ids[0] == 49406
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text


def test_tokenizer_limits_and_padding(tokenizer: Any) -> None:
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("!", "!</w>", "i", "in")] == [
        0,
        256,
        72,
        512,
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        49406,
        49407,
        49407,
    )
    long = tokenizer("cat " * 100, truncation=True).input_ids
    assert len(long) == 77 and long[-1] == 49407
    short = tokenizer("cat", padding="max_length").input_ids
    assert short == [49406, 2368, *[49407] * 75]


def test_the_tokenizer_of_sd2_and_of_sdxls_second_encoder_pads_with_zero(tmp_path: Path) -> None:
    """As the published tokenizers with pad_token "!": a "!" in a prompt becomes 0, too."""
    tokenizer = clip_tokenizer(ZERO)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (0, 49408)
    ids = tokenizer("cat", padding="max_length").input_ids
    assert ids == [49406, 2368, 49407, *[0] * 74]
    assert tokenizer("hi! a cat").input_ids == [49406, 1883, 0, 320, 2368, 49407]
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("cat", padding="max_length").input_ids == ids
