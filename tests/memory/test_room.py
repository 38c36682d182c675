"""What memory there is: the machine's, a container's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_scripts.device import Compute
from lora_scripts.memory import room

CPU = Compute(torch.device("cpu"), "no")


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_in_", "_in_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_this_machine() -> None:
    found = room.free(CPU)
    assert 0 < found.ram_free <= found.ram_total
    assert found.gpu_total is None


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    """Version 2; pages of files that are kept without need count as free."""
    (tmp_path / "memory.max").write_text("4000000\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("1500000\n", encoding="utf-8")
    assert room.of_container(tmp_path) == (4_000_000, 2_500_000)
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 500000\n", encoding="utf-8")
    assert room.of_container(tmp_path) == (4_000_000, 3_000_000)


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text("1500000\n", encoding="utf-8")
    assert room.of_container(tmp_path) is None
    assert room.of_container(tmp_path / "nothing") is None


def test_the_limit_of_an_older_container(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3000\n", encoding="utf-8")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n", encoding="utf-8")
    assert room.of_container(tmp_path) == (3000, 2000)


def test_a_limit_below_the_machines_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(str(2**20), encoding="utf-8")
    (tmp_path / "memory.current").write_text("0", encoding="utf-8")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    found = room.free(CPU)
    assert (found.ram_total, found.ram_limit) == (2**20, room.CONTAINER)
    assert found.ram_free == 2**20  # what this process holds is its own to use


def test_the_resident_set_shows_what_is_touched() -> None:
    before = room.resident()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert room.resident() - before > 60 * 2**20
    assert room.peak_resident() >= room.resident() - 2**20
    del block


def test_a_peak_can_be_forgotten() -> None:
    torch.ones(64 * 2**20, dtype=torch.uint8)
    if room.forget_peak():
        assert room.peak_resident() - room.resident() < 16 * 2**20
