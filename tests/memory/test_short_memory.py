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
for more in map(int, sys.argv[2:]):
    roomy = memory.foretell(checked, rows, compute)
    free = roomy.peak_ram + more
    memory.free = lambda compute: Room(ram_total=10**12, ram_free=free)
    found = memory_check.before(checked, rows, compute)
    parts = found.largest("ram").ram
    print("found", allocator.maps_alone(), found.peak_ram < roomy.peak_ram, *parts, sep="|")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_tensors_are_mapped_alone_where_memory_is_short(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """With 50 MB more than the run needs, then with 10 kB less."""
    values = runs.values(sd_folder, pictures, tmp_path, resolution=128, batch_size=4)
    config = toys.write_config(tmp_path / "run.yaml", **values)
    done = subprocess.run(
        [sys.executable, "-c", FORETOLD, str(config), "50000000", "-10000"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    first, last = (number for number, line in enumerate(lines) if line.startswith("found|"))
    for result, said, alone in (
        (lines[first], lines[:first], False),
        (lines[last], lines[first + 1 : last], True),
    ):
        _, mapped, less, *parts = result.split("|")
        assert (mapped, less) == (str(alone), str(alone))
        assert any("tensors are mapped alone" in line for line in said) == alone
        assert ("gaps" in parts) != alone
