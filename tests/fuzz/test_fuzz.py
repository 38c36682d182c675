"""A few inputs of every target, always the same; and that a fault would be seen."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import mutation, trial
from tests.fuzz.targets import TARGETS
from tests.fuzz.trial import Tally, Target

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the time and memory of an input are bounded on Linux only"
)
SLOW = ("image-models", "image-files", "lora-files")  # their seeds take a second
FEW = {"templates": 5, "tokenizers": 15, "peft-folders": 15, **dict.fromkeys(SLOW, 4)}


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_is_a_fault(name: str, tmp_path: Path) -> None:
    tally = trial.run(
        TARGETS[name], FEW.get(name, 60), 5, tmp_path / "work", tmp_path / "saved", lambda _: None
    )
    assert not tally.faults, tally.faults
    assert tally.inputs == FEW.get(name, 60)


def test_the_same_seed_gives_the_same_inputs() -> None:
    for spoil in (mutation.spoil, mutation.spoil_lines, mutation.spoil_json):
        first, again, other = (
            [spoil(random.Random(f"{seed} {n}"), b'{"a": [1, 2], "b": "c"}') for n in range(50)]
            for seed in (1, 1, 2)
        )
        assert first == again != other
        assert len(set(first)) > 25


def _read(folder: Path) -> None:
    content = (folder / "a").read_bytes()
    if content == b"wrong":
        raise KeyError("a reader's fault")
    if content == b"slow":
        while True:
            pass
    if content == b"large":
        bytearray(trial.MEMORY * 2)


def test_faults_are_seen_counted_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.2)
    seeds = [{"a": content} for content in (b"wrong", b"slow", b"large", b"right")]
    target = Target("toy", 1, lambda work: seeds, lambda chance, seeds: chance.choice(seeds), _read)
    tally = trial.run(target, 12, 1, tmp_path / "work", tmp_path / "saved", lambda _: None)
    kinds = {fault.split()[0] for fault in tally.faults}
    assert kinds == {"KeyError", "TooSlow", "MemoryError"}
    assert tally.read > 0 and tally.read + tally.faults.total() == 12
    saved = {path.read_bytes() for path in (tmp_path / "saved").glob("*/a")}
    assert saved == {b"wrong", b"slow", b"large"}
    assert "| toy | 12 |" in command.report([tally])


def test_shares_make_the_whole() -> None:
    chosen = list(TARGETS.values())
    total = sum(command.shared(50_000, target, chosen) for target in chosen)
    assert 50_000 <= total < 50_100
    assert Tally("x").inputs == 0
