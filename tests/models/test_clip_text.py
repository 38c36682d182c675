"""Prompts: ids as the tokenizer gives them, parts of 75, batches of unequal length."""

from __future__ import annotations

import pytest
import torch

from lora_scripts.models import clip_text
from tests import toys

PADS = ["<|endoftext|>", "!"]
LETTERS = "abcdefghij"


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize(
    "prompt", ["", "a cat", "a, very   Long  prompt: 12", LETTERS * 7, "x " * 80]
)
def test_one_part_is_what_the_tokenizer_gives(pad: str, prompt: str) -> None:
    tokenizer = toys.character_tokenizer(pad_token=pad)
    expected = tokenizer(
        prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    ids = clip_text.tokenize(tokenizer, prompt, 75)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.input_ids)


def test_long_prompts_are_read_in_parts_that_end_with_a_word() -> None:
    tokenizer = toys.character_tokenizer(pad_token="!")
    words = " ".join(["abcdef"] * 25)  # 150 tokens; the 75th is in the middle of the 13th word
    ids_PS = clip_text.tokenize(tokenizer, words, 225)
    assert ids_PS.shape == (3, 77)
    lengths = [(part == tokenizer.eos_token_id).nonzero()[0].item() - 1 for part in ids_PS]
    assert lengths == [72, 72, 6]
    assert all(part[0] == tokenizer.bos_token_id for part in ids_PS)
    assert ids_PS[2, 8:].tolist() == [0] * 69
    kept = torch.cat([part[1 : n + 1] for part, n in zip(ids_PS, lengths, strict=True)])
    assert kept.tolist() == tokenizer(words, add_special_tokens=False).input_ids


def test_a_word_without_an_end_is_cut_where_the_part_is_full() -> None:
    tokenizer = toys.character_tokenizer()
    ids_PS = clip_text.tokenize(tokenizer, "a" * 160, 150)
    assert ids_PS.shape == (2, 77)
    assert ids_PS[:, 76].tolist() == [tokenizer.eos_token_id] * 2


def test_only_as_many_parts_as_the_prompt_needs() -> None:
    tokenizer = toys.character_tokenizer()
    counts = [len(clip_text.tokenize(tokenizer, "a " * n, 225)) for n in (0, 75, 76, 150, 151, 300)]
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("most", "lost"), [(75, 125), (150, 50), (225, 0)])
def test_what_does_not_fit_is_counted(most: int, lost: int) -> None:
    tokenizer = toys.character_tokenizer()
    assert clip_text.split(tokenizer, "a " * 200, most)[1] == lost
    assert clip_text.split(tokenizer, "a cat", most)[1] == 0


def test_rows_of_one_length_need_no_mask_and_others_get_one() -> None:
    rows = [{"embedding": torch.randn(n, 4), "pooled": torch.randn(3)} for n in (2, 2, 5)]
    even = clip_text.collate(rows[:2])
    assert even.keys() == {"embedding", "pooled"}
    assert torch.equal(even["embedding"], torch.stack([row["embedding"] for row in rows[:2]]))
    uneven = clip_text.collate(rows)
    assert uneven["embedding"].shape == (3, 5, 4)
    assert uneven[clip_text.MASK].tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1] * 5]
    assert torch.equal(uneven["pooled"], torch.stack([row["pooled"] for row in rows]))


def test_short_prompts_go_on_with_empty_parts() -> None:
    tokenizer = toys.character_tokenizer()
    prompt, negative, empty = (
        {"text_encoder": clip_text.tokenize(tokenizer, text, 225)} for text in ("a " * 160, "b", "")
    )
    longer, shorter = clip_text.balanced([prompt, negative], empty)
    assert torch.equal(longer["text_encoder"], prompt["text_encoder"])
    assert torch.equal(shorter["text_encoder"][:1], negative["text_encoder"])
    assert torch.equal(shorter["text_encoder"][1:], empty["text_encoder"].repeat(2, 1))
