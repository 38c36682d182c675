from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_scripts.data.duplicates import THRESHOLD, Pair, near_duplicates

# A few words changed, put in or left out: (one, other, similarity)
NEAR = [
    (
        "The cat sat quietly on the old wooden table and watched the birds outside.",
        "The cat sat quietly on the old wooden desk and watched the birds outside.",
        0.79,
    ),
    (
        "Please summarise the following article in three short sentences and name its author.",
        "Please summarize the following article in three short sentences, and name its author.",
        0.80,
    ),
    (
        "How do I reset my password if I no longer have access to my email account?",
        "How can I reset my password if I no longer have access to my old email account?",
        0.74,
    ),
    (
        "To make green tea, heat the water to eighty degrees, pour it over the leaves and wait for "
        "two minutes before serving.",
        "To make green tea, heat the water to about eighty degrees, pour it on the leaves and wait "
        "for three minutes before serving.",
        0.73,
    ),
    (
        "Photosynthesis is the process by which plants turn sunlight, water and carbon dioxide "
        "into sugar and oxygen.",
        "Photosynthesis is the process by which green plants convert sunlight, water and carbon "
        "dioxide into sugar and oxygen.",
        0.76,
    ),
    (
        "我的订单已经三天没有更新物流信息了，请问什么时候可以送到？",
        "我的订单已经五天没有更新物流信息了，请问什么时候能送到？",
        0.74,
    ),
    (
        "光合作用是植物利用阳光、水和二氧化碳制造糖和氧气的过程。",
        "光合作用是绿色植物利用阳光、水和二氧化碳合成糖和氧气的过程。",
        0.71,
    ),
    (
        "请把下面这段话翻译成英文，并且保持原来的语气。",
        "请把下面这段文字翻译成英文，并保持原来的语气。",
        0.66,
    ),
    (
        "如果您忘记了密码，可以在登录页面点击“找回密码”，然后按照提示操作。",
        "如果你忘记了密码，可以在登录页面点击“忘记密码”，然后按提示操作。",
        0.61,
    ),
    (
        "泡绿茶时，先把水加热到八十度，倒在茶叶上，等两分钟后再饮用。",
        "泡绿茶时，先将水加热到约八十度，倒在茶叶上，等三分钟后再饮用。",
        0.62,
    ),
]
# One topic, or one pattern, but not one text
APART = [
    ("How do I reset my password?", "How do I change my email address?", 0.13),
    (
        "What is the capital of France? The capital of France is Paris.",
        "What is the capital of Japan? The capital of Japan is Tokyo.",
        0.33,
    ),
    (
        "Write a short poem about the sea in autumn.",
        "Write a short poem about the moon in winter.",
        0.44,
    ),
    (
        "Photosynthesis is the process by which plants turn sunlight into sugar.",
        "Plants need sunlight, water and carbon dioxide to grow; without, photosynthesis stops.",
        0.17,
    ),
    (
        "To make green tea, heat the water to eighty degrees and pour it over the leaves.",
        "Black tea is best made with boiling water; let the leaves steep for four minutes.",
        0.09,
    ),
    (
        "Translate into German: The weather is nice today.",
        "Translate into German: I would like a cup of coffee.",
        0.26,
    ),
    ("我的订单什么时候发货？", "我的订单怎么取消？", 0.29),
    (
        "光合作用是植物利用阳光制造糖的过程。",
        "植物的生长离不开阳光、水和二氧化碳，光合作用在白天进行。",
        0.14,
    ),
    ("请写一首关于春天的诗。", "请写一篇关于秋天的短文。", 0.25),
    (
        "法国的首都是哪里？法国的首都是巴黎。",
        "日本的首都是哪里？日本的首都是东京。",
        0.33,
    ),
    (
        "泡绿茶时，先把水加热到八十度，再倒在茶叶上。",
        "红茶适合用沸水冲泡，茶叶要闷四分钟。",
        0.05,
    ),
    (
        "请把下面的句子翻译成英文：今天天气很好。",
        "请把下面的句子翻译成英文：我想喝一杯咖啡。",
        0.48,
    ),
]


@pytest.mark.parametrize(("one", "other", "similarity"), NEAR)
def test_a_few_words_changed(one: str, other: str, similarity: float) -> None:
    (pair,) = near_duplicates([one, other])
    assert (pair.first, pair.second) == (0, 1)
    assert pair.similarity == pytest.approx(similarity, abs=0.005) and pair.similarity > THRESHOLD
    (across,) = near_duplicates([one], [other])
    assert across == Pair(0, 0, pair.similarity)


@pytest.mark.parametrize(("one", "other", "similarity"), APART)
def test_one_topic_or_one_pattern(one: str, other: str, similarity: float) -> None:
    assert near_duplicates([one, other]) == near_duplicates([one], [other]) == []
    for pair in near_duplicates([one, other], threshold=0.01):  # may not be looked at so far below
        assert pair.similarity == pytest.approx(similarity, abs=0.005)


def test_the_examples_among_each_other() -> None:
    ones, others = [one for one, *_ in NEAR], [other for _, other, _ in NEAR]
    found = [(pair.first, pair.second) for pair in near_duplicates(ones, others)]
    assert found == [(index, index) for index in range(len(NEAR))]
    apart = [text for one, other, _ in APART for text in (one, other)]
    assert near_duplicates(apart) == [] and near_duplicates(apart[:12], apart[12:]) == []


def test_the_formula() -> None:
    # one shingle for each letter and one for the space put before: 27, the last 5 hold the change
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    (pair,) = near_duplicates([alphabet, alphabet[:-1] + "!"])
    assert pair.similarity == pytest.approx(22 / 32)
    # in Chinese of two: of 9 the last 2 hold the change
    (pair,) = near_duplicates(["天地玄黄宇宙洪荒", "天地玄黄宇宙洪水"])
    assert pair.similarity == pytest.approx(7 / 11)


def test_case_width_and_white_space_do_not_count() -> None:
    texts = ["Ｈｅｌｌｏ，  World\n", "hello, world", "HELLO,\tWORLD"]
    assert near_duplicates(texts) == [Pair(0, 1, 1.0), Pair(0, 2, 1.0)]


def test_each_text_has_one_pair_with_the_most_alike() -> None:
    text = "The quick brown fox jumps over the lazy dog and runs far away into the forest"
    texts = [f"{text}, they say.", "something else entirely", f"{text}!", f"{text}."]
    first, second = near_duplicates(texts)
    assert (first.first, first.second) == (0, 2)
    assert (second.first, second.second) == (2, 3) and second.similarity > first.similarity
    held = near_duplicates(texts[:3], [texts[3], "nothing of the kind", texts[3], texts[1]])
    assert [(pair.first, pair.second) for pair in held] == [(2, 0), (2, 2), (1, 3)]
    assert held[0].similarity == held[1].similarity < held[2].similarity == 1.0


def test_nothing_to_compare() -> None:
    assert near_duplicates([]) == near_duplicates(["a"]) == near_duplicates(["a"], []) == []
    assert near_duplicates([], ["a", "a"]) == []
    assert near_duplicates(["", " \n"]) == [Pair(0, 1, 1.0)]
    with pytest.raises(ValueError, match=r"threshold 1.5: expected more than 0, at most 1"):
        near_duplicates(["a"], threshold=1.5)


def _sentences(count: int, words: int) -> list[list[str]]:
    dice = random.Random(0)
    letters = "etaoinshrdlu"
    lexicon = ["".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(2000)]
    return [dice.choices(lexicon, k=words) for _ in range(count)]


def test_needles_in_a_haystack() -> None:
    sentences = _sentences(3000, 60)
    for index in range(0, 3000, 100):  # the row behind each hundredth is its copy but for 3 words
        sentences[index + 1] = sentences[index].copy()
        sentences[index + 1][7::20] = ["one", "two", "three"]
    texts = [" ".join(sentence) for sentence in sentences]
    found = near_duplicates(texts)
    assert [(p.first, p.second) for p in found] == [(i, i + 1) for i in range(0, 3000, 100)]
    assert found == near_duplicates(texts)
    across = near_duplicates(texts[::2], texts[1::2])
    assert [(p.first, p.second) for p in across] == [(i // 2, i // 2) for i in range(0, 3000, 100)]


def test_rows_of_one_pattern_are_found_in_time() -> None:
    texts = [f"The number of this row is {n}, and all else is the same." for n in range(5000)]
    found = near_duplicates(texts)
    assert [pair.second for pair in found] == list(range(1, 5000))


TEXTS = st.lists(st.text(max_size=40), max_size=12)


@settings(deadline=None, max_examples=100)
@given(texts=TEXTS, others=TEXTS, copied=st.integers(0, 11), data=st.data())
def test_copies_are_always_found(
    texts: list[str], others: list[str], copied: int, data: st.DataObject
) -> None:
    if texts:
        text = texts[copied % len(texts)]
        at = data.draw(st.integers(0, len(others)))
        others.insert(at, text)
        assert any(
            pair.second == at and pair.similarity == 1.0 for pair in near_duplicates(texts, others)
        )
    both = [*texts, *others]
    found = near_duplicates(both)
    assert all(pair.first < pair.second and pair.similarity >= THRESHOLD for pair in found)
    seconds = [pair.second for pair in found]
    assert seconds == sorted(set(seconds))
    copies = {pair.second for pair in found if pair.similarity == 1.0}
    assert copies >= {index for index, text in enumerate(both) if text in both[:index]}
