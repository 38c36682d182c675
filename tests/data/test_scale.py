"""What a row costs in memory: a few bytes, whatever it says. benchmarks/scale.py measures more."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lora_scripts.data import (
    buckets,
    cache,
    conversations,
    duplicates,
    images,
    looking,
    picture_memory,
    reading,
    samples,
    spool,
    text,
    text_checks,
    validate,
    weights,
)
from lora_scripts.data.chat import ChatFormat
from lora_scripts.data.conversations import TextRecord, TextRecords, content_of
from lora_scripts.data.pictures import Picture, Pictures
from lora_scripts.data.records import Record, read_images
from lora_scripts.data.rows import Rows
from lora_scripts.data.views import PictureSet
from lora_scripts.schema import ImageConfig, ImageDataset, TextConfig, TextDataset
from tests import text_toys, toys

SMALL, LARGE = 500, 3000
MOST_CHECKED = 1000  # bytes of a picture, whose look alone takes as much
MOST = 160  # bytes; rows kept in memory take thousands each, benchmarks/scale.py finds about 30


@contextmanager
def peak(peaks: list[int]) -> Iterator[None]:
    """Note the most that Python and NumPy have allocated within this context, beyond before."""
    tracemalloc.start()
    try:
        yield
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def slopes(found: dict[int, list[int]], small: int, large: int) -> list[float]:
    """By how many bytes a row each peak grows."""
    pairs = zip(found[small], found[large], strict=True)
    return [(more - less) / (large - small) for less, more in pairs]


def generated(path: Path, count: int) -> Path:
    dice = random.Random(count)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 7))) for _ in range(2000)]
    sides = (" ".join(dice.choices(words, k=6)) for _ in range(2 * count))
    rows = [{"prompt": asked, "completion": next(sides)} for asked in sides]
    return text_toys.write_jsonl(path, rows)


def test_a_row_takes_a_few_bytes_from_the_check_to_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", 1)  # small data would not be put on disk
    monkeypatch.setattr(spool, "_FEW", 256)
    for module in (
        reading,
        spool,
        duplicates,
        text,
        weights,
    ):  # blocks are full with a few rows, as with many
        monkeypatch.setattr(module, "_BLOCK", 256)
    for name, size in {"_KEPT": 16, "_SLICE": 2000, "_COMPARED": 64}.items():
        monkeypatch.setattr(duplicates, name, size)
    format = ChatFormat(text_toys.chatml_tokenizer(), None, "Be kind.")
    found: dict[int, list[int]] = {}
    for count in (10, SMALL, LARGE):  # the first for what is loaded once
        path = generated(tmp_path / f"{count}.jsonl", count)
        values = {"task_type": "text-generation", "base_model": "toy", "train_data_dir": path,
                  "output_dir": "out", "cache_dir": tmp_path / str(count)}  # fmt: skip
        config = TextConfig.model_validate(values)
        peaks = found.setdefault(count, [])
        with peak(peaks):
            read = conversations.read_texts(path, None, tmp_path)
            rows = Rows([(read.records, TextDataset(path=path))])
        with peak(peaks):
            assert text_checks.check(rows, tmp_path) == []
        with peak(peaks):
            dealt = text.deal(rows, format, config, lambda done, total: None)
        with peak(peaks):
            views = dealt.train.views(1, "train", epoch=0)
            planned = samples.batches(views, 4, dealt.encoding.lengths(), 1)
        assert len(rows) == len(dealt.encoding) == count and len(planned) > count // 5
    found_slopes = slopes(found, SMALL, LARGE)
    assert max(found_slopes) < MOST, found_slopes


def test_a_picture_takes_little_while_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names in its folder; with records and looks in memory it was six kilobytes."""
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    for name, size in {"_AT_ONCE": 16, "_CHUNK": 8}.items():
        monkeypatch.setattr(looking, name, size)
    found: dict[int, list[int]] = {}
    for count in (10, SMALL // 5, LARGE // 5):
        folder = toys.save_pictures(tmp_path / str(count), count=count, side=8)
        with picture_memory.opened(tmp_path / "cache") as memory, peak(found.setdefault(count, [])):
            records, _ = read_images(folder, None, spool_dir=tmp_path)
            rows = Rows([(records, ImageDataset(path=folder))])
            paths = (record.file for record in records)
            looks = looking.look_at_all(paths, count, memory, lambda done, total: None, tmp_path)
            validate.check(rows, looks, tmp_path)
        assert len(looks) == count
    (held,) = slopes(found, SMALL // 5, LARGE // 5)
    assert held < MOST_CHECKED, held


def test_a_picture_takes_a_few_bytes_when_it_is_dealt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    monkeypatch.setattr(images, "_AT_ONCE", 8)
    for module in (spool, weights):
        monkeypatch.setattr(module, "_BLOCK", 256)
    found: dict[int, list[int]] = {}
    for count in (10, SMALL // 5, LARGE // 5):
        folder = toys.save_pictures(tmp_path / str(count), count=count, side=8)
        config = ImageConfig.model_validate(
            {"base_model": "b", "train_data_dir": folder, "output_dir": "o", "resolution": 64,
             "cache_dir": tmp_path / "cache"}
        )  # fmt: skip
        records, _ = read_images(folder, None, spool_dir=tmp_path)
        tracemalloc.start()
        data = images.gather(Rows([(records, config.all_datasets()[0])]), config, 8)
        planned = PictureSet.repeated(data.train).batches(2, 1, "order")
        gc.collect()
        found[count] = [tracemalloc.get_traced_memory()[0]]  # passing ones depend on the threads
        tracemalloc.stop()
        assert len(data.train) == count and len(planned) == count // 2
    (held,) = slopes(found, SMALL // 5, LARGE // 5)
    assert held < MOST


def test_many_pictures_take_32_bytes_each_while_they_are_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most at any moment: between two sizes of which the smaller fills each block."""
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    for module in (spool, buckets):
        monkeypatch.setattr(module, "_BLOCK", 4096)
    monkeypatch.setattr(spool, "_FEW", 4096)
    found: dict[int, list[int]] = {}
    for count in (10, SMALL * 5, LARGE * 5):
        record = Record("data/a.png", "a", "metadata.csv line 1")
        one = (Picture(record, ("a",), (64, 64), ((64, 64), (96, 48))[n % 2], 1.0, f"{n:064}")
               for n in range(count))  # fmt: skip
        with peak(found.setdefault(count, [])):
            learned = PictureSet.repeated(Pictures.of(one, tmp_path))
            planned = learned.batches(4, 1, "order")
        assert sorted(view for batch in planned for view in batch) == list(range(count))
    (held,) = slopes(found, SMALL * 5, LARGE * 5)
    assert held < 32


def test_records_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5, None, "é"]}}}
    written = [
        TextRecord("a.jsonl line 1", ({"role": "user", "content": "你好 😀\n\t\"'"},)),
        TextRecord("b.txt", text="\u2028 raw"),
        TextRecord("c.json row 3", ({"role": "assistant", "content": "", "tool_calls": [call]},),
                   ({"type": "function", "function": {"name": "f"}},)),
    ]  # fmt: skip
    for limit in (spool.IN_MEMORY, 1):
        monkeypatch.setattr(spool, "IN_MEMORY", limit)
        records = TextRecords(tmp_path / "not" / "there")
        for record in written:
            records.add(record)
        assert records == written and records[-1] == written[2] and records[:2] == written[:2]
        assert list(records.contents()) == [content_of(record) for record in written]
        records.add(written[0])  # behind what was read
        assert records[3] == written[0] and len(set(records.keys().tolist())) == 3
        with pytest.raises(IndexError):
            records[4]
    assert list(tmp_path.iterdir()) == []  # a file has no name


def test_several_threads_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    values = spool.Values()
    for number in range(500):
        values.append([number, "x" * (number % 50)])
    places = np.random.default_rng(0).integers(0, 500, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [value[0] for value in pool.map(values.__getitem__, places)] == places


def test_a_list_that_is_never_made_has_the_same_name() -> None:
    items = [("a", 1.0, "train"), ("'\"", 2.5, "validation")] * 1500
    assert cache.key_of(iter(items), "x") == cache.key_of(items, "x")
    assert cache.key_of(1, iter([])) == cache.key_of(1, [])
    assert cache.key_of(iter(items[:1])) != cache.key_of(iter(items[:2]))


def test_micro_batches_are_made_when_they_are_asked_for() -> None:
    views = np.random.default_rng(0).permutation(37).astype(np.int32)
    lengths = np.arange(37) % 5
    for planned in (samples.batches(views, 4, None), samples.batches(views, 4, lengths, 3)):
        every = list(planned)
        assert sorted(view for batch in every for view in batch) == list(range(37))
        assert [len(batch) for batch in every].count(4) == 9 and len(planned) == 10
        assert list(planned[2:5]) == every[2:5] and list(planned[1::3]) == every[1::3]
        assert planned[-1] == every[-1] and list(planned[8:99]) == every[8:]
    # those of a batch are of like length
    assert max(np.ptp(lengths[list(batch)]) for batch in samples.batches(views, 4, lengths, 3)) < 2
