"""Rows of text as token ids on disk: tokenised once, memory-mapped, dealt into batches.

One file holds the ids of all samples end to end, which of them are learned, and where each begins.
Its name is a hash of the rows and of all that turns them into tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lora_scripts.data import cache, weights
from lora_scripts.data.chat import ChatFormat, Encoded
from lora_scripts.data.conversations import TextRecord
from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.randomness import numpy_generator, seed_of
from lora_scripts.schema import TextConfig, TextDataset

GROUPED_BATCHES = 32  # of so many batches the rows are sorted by length, where they are padded
MEASURED_TRAINING_SAMPLES = 32  # when nothing is held out
MOST_PROBLEMS = 50  # of the rows; then the rest is not looked at
CUT_ROWS_NAMED = 10  # those that lose most
ENTRY_FORMAT = 2  # of what is stored; entries of another one are not found
Row = tuple[TextRecord, TextDataset]


@dataclass(frozen=True)
class Encoding:
    """All samples of a run as they lie on disk.

    Attributes:
        ends: Where sample i ends in the file; shape (samples,).
        rows: The row that sample i was made of.
        learned: How many of its tokens are learned.
        cut: Where each row longer than `max_seq_length` stands, and how many tokens it lost.
    """

    path: Path
    ends: np.ndarray
    rows: np.ndarray
    learned: np.ndarray
    cut: list[tuple[str, int]]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self.ends, prepend=0)

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
    rows: Sequence[Row],
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


def remarks(format: ChatFormat, encoding: Encoding, config: TextConfig) -> list[str]:
    """What a person should know of how the rows became tokens."""
    said = list(format.notes)
    if format.unseen_system:
        said.append(
            "The template puts a system message before conversations without one: "
            f"{format.unseen_system!r}. It is seen in training, too; system_prompt replaces it."
        )
    if encoding.cut:
        said.append(_what_is_cut(encoding, config))
    return said


def _what_is_cut(encoding: Encoding, config: TextConfig) -> str:
    """How many rows lose their ends, and which lose most."""
    count = int(encoding.rows[-1]) + 1  # every row has a sample
    most = sorted(encoding.cut, key=lambda row: -row[1])
    named = ", ".join(f"{where} ({lost:,})" for where, lost in most[:CUT_ROWS_NAMED])
    more = f" and {len(most) - CUT_ROWS_NAMED:,} more" if len(most) > CUT_ROWS_NAMED else ""
    return (
        f"{len(most):,} of {count:,} rows are longer than max_seq_length {config.max_seq_length}: "
        f"{sum(lost for _, lost in most):,} tokens at their ends are cut off and not learned, "
        f"of {named}{more}. Raise max_seq_length, or shorten these rows"
    )


def encode(
    rows: Sequence[Row],
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
        [content_of(record) for record, _ in rows],
        (format.tokenizer_id, format.template, config.system_prompt),
        (config.train_on, config.max_seq_length, config.stride),
    )
    if store.missing([key]):
        store.write(key, _tokenise(rows, format, config, progress))
    stored = store.read(key, leaving=("ids", "supervised"))
    return Encoding(
        path=store.path(key),
        ends=stored["ends"].numpy(),
        rows=stored["rows"].numpy(),
        learned=stored["learned"].numpy(),
        cut=[(rows[row][0].where, lost) for row, lost in stored["cut"].tolist()],
    )


def _tokenise(
    rows: Sequence[Row],
    format: ChatFormat,
    config: TextConfig,
    progress: Callable[[int, int], None],
) -> dict[str, torch.Tensor]:
    samples: list[Encoded] = []
    origins: list[int] = []
    problems: list[Problem] = []
    cut: list[tuple[int, int]] = []
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
            cut.append((number, lost))
        for sample in kept:
            if sample.supervised[1:].any():
                samples.append(sample)
                origins.append(number)
            else:
                problems.append(Problem(record.where, _nothing_learned(lost, config)))
        progress(number + 1, len(rows))
    if problems:
        raise UserError(problems)
    return {
        "ids": torch.from_numpy(np.concatenate([sample.ids for sample in samples])),
        "supervised": torch.from_numpy(
            np.concatenate([sample.supervised for sample in samples]).astype(np.uint8)
        ),
        "ends": torch.tensor([len(sample.ids) for sample in samples]).cumsum(0),
        "rows": torch.tensor(origins),
        "learned": torch.tensor([int(sample.supervised[1:].sum()) for sample in samples]),
        "cut": torch.tensor(cut, dtype=torch.int64).reshape(-1, 2),
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


def content_of(record: TextRecord) -> str:
    """A hash of what a row says; its place does not count."""
    text = repr((record.messages, record.tools, record.text))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class SampleSet:
    """Samples of one split, each with how often an epoch shows it."""

    samples: np.ndarray
    weights: np.ndarray

    def views(self, *key: int | str, epoch: int) -> np.ndarray:
        """The samples of an epoch in shuffled order, each as often as its weight says."""
        views = np.repeat(self.samples, weights.times(self.weights, *key, epoch=epoch))
        return numpy_generator(*key, epoch).permutation(views)


def split(
    encoding: Encoding, rows: Sequence[Row], config: TextConfig
) -> tuple[SampleSet, SampleSet]:
    """Learned and held-out samples: by the datasets' roles, or a share drawn by the seed.

    The share is drawn by content, so that copies of a row stay on one side, and so do the samples
    of one conversation. Windows of a raw text are drawn one by one.
    """
    units = _units(encoding, rows)
    held = np.array([rows[row][1].role == "validation" for row in encoding.rows], dtype=bool)
    if config.validation_split:
        distinct = sorted(set(units), key=lambda unit: seed_of(config.seed, "split", unit))
        count = max(1, round(len(distinct) * config.validation_split)) if len(distinct) > 1 else 0
        chosen = set(distinct[:count])
        held = np.array([unit in chosen for unit in units], dtype=bool)
    weights = np.array([rows[row][1].weight for row in encoding.rows])
    numbers = np.arange(len(encoding))
    return (
        SampleSet(numbers[~held], weights[~held]),
        SampleSet(numbers[held], np.ones(int(held.sum()))),
    )


def _units(encoding: Encoding, rows: Sequence[Row]) -> list[str]:
    """For each sample the name of what must not be torn apart."""
    contents = [content_of(record) for record, _ in rows]
    return [
        f"{contents[row]} {number}" if rows[row][0].text is not None else contents[row]
        for number, row in enumerate(encoding.rows)
    ]


def batches(
    views: np.ndarray, batch_size: int, lengths: np.ndarray | None, *key: int | str
) -> list[tuple[int, ...]]:
    """Micro-batches of `batch_size` samples in the order of `views`.

    With `lengths` (tokens of each sample) those of a batch are of like length: of each few batches
    the samples are sorted by length, and the batches shuffled again.
    """
    if lengths is None:
        return [tuple(views[i : i + batch_size].tolist()) for i in range(0, len(views), batch_size)]
    span = GROUPED_BATCHES * batch_size
    grouped: list[tuple[int, ...]] = []
    for start in range(0, len(views), span):
        part = views[start : start + span]
        part = part[np.argsort(lengths[part], kind="stable")]
        grouped += batches(part, batch_size, None)
    order = numpy_generator(*key).permutation(len(grouped))
    return [grouped[i] for i in order]
