"""Where a CLIP text encoder cuts prompts: into parts, and off. Needs no torch.

An encoder reads 77 tokens: a start mark, 75 of the prompt, an end mark. Longer prompts are read in
parts of 75.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts import collector

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from lora_scripts.models.kinds import Family

TOKENS_A_PART = 75  # of max_caption_tokens
LOOK_BACK = 10  # a part ends at the end of a word if there is one among so many of its last tokens
WORD_END = "</w>"
_AT_ONCE = 512  # prompts


def split(
    tokenizer: CLIPTokenizer, prompt: str, max_tokens: int
) -> tuple[list[Sequence[int]], int]:
    """The parts' ids without marks, at least one part, and the number of ids that are left over."""
    ids: Sequence[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return split_ids(tokenizer, ids, max_tokens)


def split_ids(
    tokenizer: CLIPTokenizer, ids: Sequence[int], max_tokens: int
) -> tuple[list[Sequence[int]], int]:
    """As `split`, of a prompt's ids."""
    left = ids
    room = tokenizer.model_max_length - 2
    parts = []
    for number in range(max_tokens // TOKENS_A_PART, 0, -1):
        length = room if number == 1 else _part_length(tokenizer, left, room)
        parts.append(left[:length])
        left = left[length:]
        if not left:
            break
    return parts, len(left)


def _part_length(tokenizer: CLIPTokenizer, ids: Sequence[int], room: int) -> int:
    """How many of the ids make the next part: to the end of a word, rather than through it."""
    if len(ids) <= room:
        return len(ids)
    tokens = tokenizer.convert_ids_to_tokens(list(ids[:room]))
    for length in range(room, room - LOOK_BACK, -1):
        if tokens[length - 1].endswith(WORD_END):
            return length
    return room


def readings(
    tokenizer: CLIPTokenizer, prompts: Iterable[str], max_tokens: int
) -> Iterator[tuple[int, int | None]]:
    """Of each prompt the number of its tokens, and the character from which on nothing is read."""
    left = iter(prompts)
    while some := list(itertools.islice(left, _AT_ONCE)):
        read: Any = tokenizer(
            some, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        for ids, places in zip(read.input_ids, read.offset_mapping, strict=True):
            _, lost = split_ids(tokenizer, ids, max_tokens)
            yield len(ids), places[len(ids) - lost][0] if lost else None


def tokenizer_of(path: Path | None, family: Family) -> CLIPTokenizer:
    """The first tokenizer of a base model; CLIP's own of a single file, or of one not here yet.

    Args:
        path: A diffusers folder, a single file, or None for a hub id that is not fetched.
        family: What it is.
    """
    with collector.importing():
        from lora_scripts.models.components import read_clip_tokenizer
        from lora_scripts.models.packaged import END, ZERO, clip_tokenizer

    if path is not None and path.is_dir():
        return read_clip_tokenizer(path / "tokenizer")
    return clip_tokenizer(ZERO if family == "sd2" else END)
