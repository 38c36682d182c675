"""Memory that runs out, for real: the answer names what used it and what to change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_scripts.errors import WorkError, out_of_memory
from lora_scripts.exhausted import answered
from lora_scripts.memory import Estimate
from tests import runs, toys

NARROW = """
import resource, sys
from pathlib import Path
import lora_scripts.training.loop as loop
from lora_scripts import cli

original = loop.train

def narrowed(*everything):
    # when the first step begins nothing more may be allocated than {room} MB
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + {room} * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        return original(*everything)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

loop.train = narrowed
cli.main(["train", "--config", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 1 bytes. Error code 12"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_says_that_memory_ran_out(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) is is_one


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_run_without_memory_is_answered_and_goes_on(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    values = runs.values(sd_folder, pictures, tmp_path, batch_size=6, resolution=448)
    config = toys.write_config(tmp_path / "run.yaml", **values)
    script = tmp_path / "narrow.py"
    script.write_text(NARROW.format(room=40), encoding="utf-8")
    command = [sys.executable, str(script), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    said = done.stderr
    assert done.returncode == 1, done.stdout + said
    assert "Failed: out of memory: " in said and "Traceback" not in said
    assert "RAM: about" in said and "activations" in said
    assert "Nothing that was saved is lost" in said


def test_the_cheapest_change_is_named(sd_folder: Path, pictures: Path, tmp_path: Path) -> None:
    from lora_scripts.config import read
    from lora_scripts.device import choose
    from lora_scripts.memory import Room, foretell
    from lora_scripts.preflight import inputs

    values = runs.values(sd_folder, pictures, tmp_path, batch_size=6, resolution=448)
    draft = read(toys.write_config(tmp_path / "run.yaml", **values))
    rows, config, compute = inputs(draft)[0], draft.checked(), choose("cpu", "no")
    foretold = foretell(config, rows, compute)
    room = Room(ram_total=foretold.peak_ram - 10**7, ram_free=foretold.peak_ram - 10**7)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(WorkError) as caught,
        answered(config, rows, compute, foretold),
    ):
        patch.setattr("lora_scripts.memory.free", lambda compute: room)
        raise MemoryError
    said = str(caught.value)
    assert said.startswith("out of memory: MemoryError")
    assert "The cheapest change: batch_size: 3, gradient_accumulation_steps: 2 (about" in said
    assert "batch_size cannot change within a run that has begun" in said


def test_other_errors_pass(tmp_path: Path, sd_folder: Path, pictures: Path) -> None:
    _, config, compute = runs.task(sd_folder, pictures, tmp_path)
    nothing = Estimate([], "", {})
    with pytest.raises(RuntimeError, match="shapes"), answered(config, [], compute, nothing):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
