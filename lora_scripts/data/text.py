"""Rows of text as token ids on disk: tokenised once, memory-mapped, dealt into batches.

One file holds the ids of all samples end to end, which of them are learned, and where each begins.
Its name is a hash of the rows and of all that turns them into tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lora_scripts.data import cache
from lora_scripts.data.chat import ChatFormat, Encoded
from lora_scripts.data.conversations import TextRecord, TextRecords
from lora_scripts.data.rows import Rows
from lora_scripts.data.samples import SampleSet
from lora_scripts.data.spool import Column
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.randomness import seed_of
from lora_scripts.schema import TextConfig, TextDataset
from lora_scripts.tensor_files import Part

MEASURED_TRAINING_SAMPLES = 32  # when nothing is held out
MOST_PROBLEMS = 50  # of the rows; then the rest is not looked at
CUT_ROWS_NAMED = 10  # those that lose most
ENTRY_FORMAT = 2  # of what is stored; entries of another one are not found
_BLOCK = 1 << 16  # samples looked at in one go
_KINDS: dict[str, np.dtype[Any]] = {  # of what is stored, the largest numbers first
    "ends": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "learned": np.dtype("<i8"),
    "cut": np.dtype("<i8"),
    "ids": np.dtype("<i4"),
    "supervised": np.dtype("u1"),
}
TextRows = Rows[TextRecords, TextDataset]


@dataclass(frozen=True)
class Encoding:
    """All samples of a run as they lie on disk; the arrays are mapped from there.

    Attributes:
        ends: Where sample i ends in the file; shape (samples,).
        rows: The row that sample i was made of.
        learned: How many of its tokens are learned.
        cut: Each row longer than `max_seq_length`, and how many tokens it lost; shape (cut, 2).
    """

    path: str
    ends: np.ndarray
    rows: np.ndarray
    learned: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int32."""
        lengths = np.empty(len(self), np.int32)
        for start in range(0, len(self), _BLOCK):
            before = self.ends[start - 1] if start else 0
            lengths[start : start + _BLOCK] = np.diff(self.ends[start : start + _BLOCK],
                                                      prepend=before)  # fmt: skip
        return lengths

    def learned_of(self, samples: np.ndarray) -> int:
        """How many tokens of these samples are learned."""
        parts = (samples[start : start + _BLOCK] for start in range(0, len(samples), _BLOCK))
        return sum(int(self.learned[part].sum()) for part in parts)

    def read(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (int64) and which of them are learned (bool) of one sample, from the mapped file."""
        start, end = (int(self.ends[sample - 1]) if sample else 0), int(self.ends[sample])
        with safe_open(self.path, framework="pt") as stored:
            ids = stored.get_slice("ids")[start:end]
            supervised = stored.get_slice("supervised")[start:end]
        return ids.long(), supervised.bool()


@dataclass(frozen=True)
class Dealt:
    """The samples of a run: what is learned from and what is measured.

    `held_out`: what is measured is not learned from.
    """

    encoding: Encoding
    train: SampleSet
    validation: SampleSet
    held_out: bool


def deal(
    rows: TextRows,
    format: ChatFormat,
    config: TextConfig,
    progress: Callable[[int, int], None],
) -> Dealt:
    """Tokenise the rows and split them. With nothing held out, some training samples are measured.

    Raises:
        UserError: naming every row of which nothing would be learned.
    """
    encoding = encode(rows, format, config, progress)
    train, validation = split(encoding, rows, config)
    if not len(train.samples):
        raise user_error("train_data_dir", "nothing is left to learn from after the split")
    if len(validation.samples):
        return Dealt(encoding, train, validation, held_out=True)
    measured = train.samples[:MEASURED_TRAINING_SAMPLES]
    return Dealt(encoding, train, SampleSet(measured, np.ones(len(measured))), held_out=False)


def remarks(
    format: ChatFormat, encoding: Encoding, rows: TextRows, config: TextConfig
) -> list[str]:
    """What a person should know of how the rows became tokens."""
    said = list(format.notes)
    if format.unseen_system:
        said.append(
            "The template puts a system message before conversations without one: "
            f"{format.unseen_system!r}. It is seen in training, too; system_prompt replaces it."
        )
    if len(encoding.cut):
        said.append(_what_is_cut(encoding.cut, rows, config))
    return said


def _what_is_cut(cut: np.ndarray, rows: TextRows, config: TextConfig) -> str:
    """How many rows lose their ends, and which lose most."""
    most = heapq.nlargest(CUT_ROWS_NAMED, cut, key=lambda row: int(row[1]))
    named = ", ".join(f"{rows[int(row)][0].where} ({lost:,})" for row, lost in most)
    more = f" and {len(cut) - CUT_ROWS_NAMED:,} more" if len(cut) > CUT_ROWS_NAMED else ""
    return (
        f"{len(cut):,} of {len(rows):,} rows are longer than max_seq_length "
        f"{config.max_seq_length}: {int(cut[:, 1].sum()):,} tokens at their ends are cut off and "
        f"not learned, of {named}{more}. Raise max_seq_length, or shorten these rows"
    )


def encode(
    rows: TextRows,
    format: ChatFormat,
    config: TextConfig,
    progress: Callable[[int, int], None],
) -> Encoding:
    """Tokenise the rows, or find them tokenised by an earlier run.

    Raises:
        UserError: naming every row of which nothing would be learned.
    """
    store = cache.Cache(config.cache_dir, "tokens")
    key = cache.key_of(
        ENTRY_FORMAT,
        (content for records, _ in rows.parts for content in records.contents()),
        (format.tokenizer_id, format.template, config.system_prompt),
        (config.train_on, config.max_seq_length, config.stride),
    )
    if store.missing([key]):
        store.write_parts(key, _tokenise(rows, format, config, progress))
    stored = store.mapped(key, ("ends", "rows", "learned", "cut"))
    return Encoding(store.path(key), **stored)


def _tokenise(
    rows: TextRows,
    format: ChatFormat,
    config: TextConfig,
    progress: Callable[[int, int], None],
) -> dict[str, Part]:
    columns = {name: Column(kind, config.cache_dir) for name, kind in _KINDS.items()}
    problems: list[Problem] = []
    end = 0
    for number, (record, _) in enumerate(rows):
        if len(problems) >= MOST_PROBLEMS:
            break
        try:
            whole = _encoded(record, format, config)
        except UserError as error:
            problems += error.problems
            continue
        kept = [_cut(sample, config.max_seq_length) for sample in whole]
        lost = sum(len(a.ids) - len(b.ids) for a, b in zip(whole, kept, strict=True))
        if lost:
            columns["cut"].append((number, lost))
        for sample in kept:
            learned = int(sample.supervised[1:].sum())
            if not learned:
                problems.append(Problem(record.where, _nothing_learned(lost, config)))
                continue
            end += len(sample.ids)
            values: dict[str, Any] = {"ends": end, "rows": number, "learned": learned,
                      "ids": sample.ids, "supervised": sample.supervised}  # fmt: skip
            for name, value in values.items():
                columns[name].append(value)
        progress(number + 1, len(rows))
    if problems:
        raise UserError(problems)
    return {
        name: Part(
            column.dtype,
            (len(column) // 2, 2) if name == "cut" else (len(column),),
            column.spool.copy_to,
        )
        for name, column in columns.items()
    }


def _encoded(record: TextRecord, format: ChatFormat, config: TextConfig) -> list[Encoded]:
    """The samples of a row, a conversation not cut yet, a raw text in windows."""
    try:
        if record.text is not None:
            whole = format.encode_text(record.text)
            return list(windows(whole, config.max_seq_length, config.stride))
        rendered = format.render(record.messages, record.tools, config.train_on)
    except UserError as error:
        raise UserError(
            [Problem(record.where, problem.what) for problem in error.problems]
        ) from None
    return [format.encode(part) for part in rendered]


def samples_of(record: TextRecord, format: ChatFormat, config: TextConfig) -> list[Encoded]:
    """The samples of one row as they are trained, what is too long cut off."""
    whole = _encoded(record, format, config)
    return [_cut(sample, config.max_seq_length) for sample in whole]


def pieces(sample: Encoded, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of a sample in runs of tokens that are learned or not, special tokens shown.

    Each run is what it adds to the text before it: decoders drop the space before a first word.
    """
    ends = [*(np.flatnonzero(np.diff(sample.supervised)) + 1), len(sample.ids)]
    shown = 0
    for end in ends:
        whole: str = tokenizer.decode(
            sample.ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        yield whole[shown:], bool(sample.supervised[end - 1])
        shown = len(whole)


def windows(whole: Encoded, length: int, stride: int) -> Iterator[Encoded]:
    """A long text in windows of `length` tokens; nothing is thrown away, each token learned once.

    Each window but the first begins with the last `stride` tokens of the one before it, which are
    context there and not learned again. Without a stride a window's first token is learned in no
    window (there is nothing before it), so one token is repeated all the same.
    """
    overlap = max(1, stride)
    start = 0
    while True:
        end = min(start + length, len(whole.ids))
        supervised = whole.supervised[start:end].copy()
        if start:
            supervised[:overlap] = False
        yield Encoded(whole.ids[start:end], supervised)
        if end == len(whole.ids):
            return
        start = end - overlap


def _cut(sample: Encoded, length: int) -> Encoded:
    return Encoded(sample.ids[:length], sample.supervised[:length])


def _nothing_learned(lost: int, config: TextConfig) -> str:
    if lost:
        return (
            f"nothing is left to learn of it within max_seq_length {config.max_seq_length}: the "
            "answer begins later; raise max_seq_length or shorten the row"
        )
    return "nothing is left to learn of it: the answer is empty"


def split(encoding: Encoding, rows: TextRows, config: TextConfig) -> tuple[SampleSet, SampleSet]:
    """Learned and held-out samples: by the datasets' roles, or a share drawn by the seed.

    The share is drawn by content, so that copies of a row stay on one side, and so do the samples
    of one conversation. Windows of a raw text are drawn one by one.
    """
    if config.validation_split:
        held = _drawn(_units(encoding, rows), len(encoding), config)
    else:
        held = _of_datasets(encoding, rows, [d.role == "validation" for _, d in rows.parts])
    numbers = np.arange(len(encoding), dtype=np.int32)
    learned, measured = numbers[~held], numbers[held]
    weights = _of_datasets(encoding, rows, [d.weight for _, d in rows.parts])
    if weights.strides[0]:  # not the same for all
        weights = weights[learned]
    return (
        SampleSet(learned, weights[: len(learned)]),
        SampleSet(measured, np.broadcast_to(1.0, len(measured))),
    )


def _of_datasets(encoding: Encoding, rows: TextRows, values: Sequence[float]) -> np.ndarray:
    """Of each sample the value of its dataset; if all have one, in no memory."""
    if len(set(values)) == 1:
        return np.broadcast_to(values[0], len(encoding))
    found = np.empty(len(encoding), np.result_type(*values))
    for value, own in zip(values, rows.numbers, strict=True):
        start, end = np.searchsorted(encoding.rows, (own.start, own.stop))  # they ascend
        found[start:end] = value
    return found


def _drawn(units: Iterator[str], count: int, config: TextConfig) -> np.ndarray:
    """Of each of `count` samples whether it is held out: a share of the units, the least drawn."""
    draws = np.fromiter((seed_of(config.seed, "split", unit) for unit in units), np.int64, count)
    distinct = np.sort(draws)  # np.unique would take 40 bytes a row and more
    distinct = distinct[np.append(True, distinct[1:] != distinct[:-1])]
    if len(distinct) < 2:
        return np.zeros(count, dtype=bool)
    chosen = max(1, round(len(distinct) * config.validation_split))
    least: np.ndarray = draws <= distinct[chosen - 1]
    return least


def _units(encoding: Encoding, rows: TextRows) -> Iterator[str]:
    """For each sample the name of what must not be torn apart."""
    every = (
        (content, record.text is not None)
        for records, _ in rows.parts
        for content, record in zip(records.contents(), records, strict=True)
    )
    current, content, is_raw = -1, "", False
    for number in range(len(encoding)):
        while current < encoding.rows[number]:
            content, is_raw = next(every)
            current += 1
        yield f"{content} {number}" if is_raw else content
