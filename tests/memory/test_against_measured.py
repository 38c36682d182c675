"""What is foretold against a real run's resident set. Slow: three processes a case."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from benchmarks import memory_estimate


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(platform.system() != "Linux", reason="the heap that is replayed is glibc's")
@pytest.mark.parametrize(
    "name", ["SD small, 320², batch 3, bf16", "Llama 110M, packed, 6 short rows, attention only"]
)
def test_the_peak_is_foretold(tmp_path: Path, name: str) -> None:
    """The table of docs/memory.md has more rows; benchmarks/memory_estimate.py makes it."""
    found = memory_estimate.figures(tmp_path, name)
    assert found.foretold == pytest.approx(found.measured, rel=0.15)
    assert found.corrected == pytest.approx(found.measured, rel=0.05)
