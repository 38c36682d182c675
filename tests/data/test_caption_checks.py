"""What the text encoder makes of captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from lora_scripts.data.caption_checks import Reading, check, script_of
from lora_scripts.data.records import Record
from lora_scripts.errors import Problem
from lora_scripts.models import caption_parts
from lora_scripts.schema import ImageConfig, ImageDataset


@cache
def tokenizer() -> CLIPTokenizer:
    return caption_parts.tokenizer_of(None, "sd1")


def config(**keys: object) -> ImageConfig:
    needed = {"base_model": "a/b", "train_data_dir": "data", "output_dir": "out"}
    return ImageConfig.model_validate({**needed, **keys})


def found(captions: list[str], role: str = "train", **keys: object) -> list[Problem]:
    rows = [
        (Record(f"{n}.png", text, f"metadata.csv line {n}"),
         ImageDataset(path=Path("data"), role=role))
        for n, text in enumerate(captions, start=1)
    ]  # fmt: skip
    settings = config(**keys)

    def read(prompts: Iterable[str]) -> Iterator[Reading]:
        texts = caption_parts.readings(tokenizer(), prompts, settings.max_caption_tokens)
        return (Reading(*each) for each in texts)

    return check(rows, settings, read)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a cat, naïve façade, Größe, Łódź", None),
        ("α particle, π", None),  # a letter or two are no text
        ("一只猫", "Chinese"),
        ("a photo of 猫", "Chinese"),
        ("猫がいる", "Japanese"),
        ("고양이", "Korean"),
        ("кот", "Cyrillic"),
        ("قطة", "Arabic"),
        ("חתול", "Hebrew"),
        ("แมว", "Thai"),
        ("γάτα", "Greek"),
        ("a city 🌃, 5 €", None),
        ("", None),
    ],
)
def test_script(text: str, script: str | None) -> None:
    assert script_of(text) == script


def test_what_is_cut_is_told_in_words() -> None:
    trees = [f"tree number {number}" for number in range(40)]
    (problem,) = found([" ".join(trees[:20]), " ".join(trees)])
    assert (problem.where, problem.kind) == ("metadata.csv line 2", "caption-cut")
    # a word a token, and a digit one: ten trees of 3 and eleven of 4, then "tree" is the 75th
    assert problem.what.startswith(
        "the caption has 150 tokens; 75 are read (max_caption_tokens), which leaves out "
        '"number 21 tree number 22 tree number'
    )


def test_just_as_many_tokens_as_are_read_are_not_cut() -> None:
    assert found(["a " * 75]) == []
    (problem,) = found(["a " * 75 + "tail"])
    assert "the caption has 76 tokens; 75 are read" in problem.what
    assert 'which leaves out "tail". Shorten it or raise max_caption_tokens' in problem.what
    assert found(["a " * 75 + "tail"], max_caption_tokens=150) == []
    (problem,) = found(["a " * 230], max_caption_tokens=225)
    assert problem.what.endswith('leaves out "a a a a a". Shorten it')


def test_prefix_and_trigger_word_take_their_room() -> None:
    (problem,) = found(["a " * 74 + "tail"], caption_prefix="two words ")
    assert "has 77 tokens" in problem.what and 'leaves out "a tail"' in problem.what


def test_shuffled_tags_lose_others_each_time() -> None:
    (problem,) = found(["tag, " * 60], shuffle_tags=True)
    assert "as the tags are shuffled, other ones each time" in problem.what


def test_a_trigger_word_in_some() -> None:
    captions = ["zwx house", "a boat", "zwx tree", "a zwxx cloud"]
    problems = found(captions, trigger_word="zwx")
    assert [problem.where for problem in problems] == [
        "metadata.csv line 2", "metadata.csv line 4",
    ]  # fmt: skip
    assert '"zwx" (trigger_word) is missing here, and stands in 2 of 4 captions' in str(problems[0])
    assert found(["a house", "a boat"], trigger_word="zwx") == []  # put in front of all
    assert found(captions, trigger_word="zwx", caption_prefix="by zwx: ") == []
    assert found(captions, "regularisation", trigger_word="zwx") == []


def test_one_caption_for_most() -> None:
    (problem,) = found(["a photo", "a photo", "a photo ", "a boat"])
    assert problem.what.startswith('3 of 4 captions are "a photo": what the pictures differ in')
    assert found(["a photo", "a photo", "a boat", "a house"]) == []
    assert found(["a photo"] * 3) == []  # too few to say
    assert found(["a photo"] * 9, "regularisation") == []  # of a class it is usual
    assert found([""] * 9) == []
