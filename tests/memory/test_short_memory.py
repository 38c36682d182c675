"""Memory that does not suffice with the heap's gaps: tensors are mapped alone, and it is said."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs, toys

FORETOLD = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from lora_scripts import allocator, config, device, memory, memory_check, preflight
from lora_scripts.memory import Room
draft = config.read(Path(sys.argv[1]))
rows, _ = preflight.inputs(draft)
checked, compute = draft.checked(), device.choose("cpu", "no")
roomy = memory.foretell(checked, rows, compute)
free = roomy.peak_ram + int(sys.argv[2])
memory.free = lambda compute: Room(ram_total=10**12, ram_free=free)
found = memory_check.before(checked, rows, compute)
print(allocator.maps_alone(), found.peak_ram < roomy.peak_ram, *found.largest("ram").ram, sep="|")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
@pytest.mark.parametrize(("more", "alone"), [(50_000_000, False), (-10_000, True)])
def test_tensors_are_mapped_alone_where_memory_is_short(
    sd_folder: Path, pictures: Path, tmp_path: Path, more: int, alone: bool
) -> None:
    values = runs.values(sd_folder, pictures, tmp_path, resolution=128, batch_size=4)
    config = toys.write_config(tmp_path / "run.yaml", **values)
    done = subprocess.run(
        [sys.executable, "-c", FORETOLD, str(config), str(more)],
        capture_output=True,
        text=True,
        check=True,
    )
    *said, last = done.stdout.splitlines()
    mapped, less, *parts = last.split("|")
    assert (mapped, less) == (str(alone), str(alone))
    assert any("tensors are mapped alone" in line for line in said) == alone
    assert ("gaps" in parts) != alone
