"""The command line: see the package's docstring."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from safetensors.torch import load_file
from torch.testing import assert_close

from lora_scripts.training import checkpoint
from tests import runs, text_toys, toys
from tests.two_hosts import network
from tests.two_hosts.network import Host

ROOT = Path(__file__).resolve().parents[2]
SOON = 60.0  # seconds after the cut, by which both ends must have stopped
RESULT = "adapter_model.safetensors"
STATE = "training.safetensors"  # of a checkpoint: adapters in float32, the optimizer's state
WHOLE, CUT = "whole", "cut"  # runs


def main() -> int:
    wanting = network.missing()
    if wanting:
        sys.exit(wanting)
    with tempfile.TemporaryDirectory() as name, network.joined() as hosts:
        folder = Path(name)
        for host in hosts:
            (folder / host.name).mkdir()
        make_inputs(folder)
        began = time.monotonic()
        finished(start(hosts, folder, WHOLE))
        say(f"A run that was left alone: {time.monotonic() - began:.0f} s")
        cut_off(hosts, folder)
        hosts[0].plug(into=True)
        said = finished(start(hosts, folder, CUT))
        assert "Going on from" in said[0], said[0]
        outputs = [folder / hosts[0].name / run for run in (WHOLE, CUT)]
        whole, cut = (load_file(output / RESULT) for output in outputs)
        assert_close(cut, whole, rtol=0, atol=0)  # the files themselves tell when they were made
        last = [checkpoint.listed(output / "checkpoints")[-1] for output in outputs]
        assert (last[0] / STATE).read_bytes() == (last[1] / STATE).read_bytes()
        assert not (folder / hosts[1].name / CUT / RESULT).exists()
        say(f"The same commands went on to the same bits: the LoRA and {last[0].name}'s {STATE}.")
    return 0


def make_inputs(folder: Path) -> None:
    """Base, rows and configs, at places that both hosts know; each has its own output."""
    base = text_toys.save_model(folder / "base")
    rows = text_toys.write_jsonl(folder / "rows.jsonl")
    for run in (WHOLE, CUT):
        values = runs.text_values(
            base, rows, folder, batch_size=1, gradient_accumulation_steps=2, epochs=60,
            lora_dropout=0.1, save_steps=10, save_total_limit=3,
            output_dir=run, cache_dir="cache",
        )  # fmt: skip
        toys.write_config(folder / f"{run}.yaml", **values)


def start(hosts: Sequence[Host], folder: Path, run: str) -> list[subprocess.Popen[str]]:
    """The same command on both, as docs/distributed.md has it."""
    first = hosts[0].name
    command = [str(ROOT / "train.py"), "--config", str(folder / f"{run}.yaml")]
    processes = []
    for number, host in enumerate(hosts):
        # who has lost c10d's host waits for TCP to give up, a quarter of an hour
        static = ["--node_rank", str(number), "--master_addr", first, "--master_port", "29500"]
        c10d = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first}:29500", "--rdzv_id", run]
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)),
            "--nproc_per_node", "1", "--local_addr", host.address,
            *(c10d if run == WHOLE else static),
        ]  # fmt: skip
        processes.append(host.start([*torchrun, *command], folder / host.name))
    return processes


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What both said; both must end well."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return said


def cut_off(hosts: Sequence[Host], folder: Path) -> None:
    """Pull the cable after the first checkpoint: both ends stop by themselves and say why."""
    processes = start(hosts, folder, CUT)
    checkpoints = folder / hosts[0].name / CUT / "checkpoints"
    while not checkpoint.listed(checkpoints):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    hosts[0].plug(into=False)
    began = time.monotonic()
    lost = ("has not been heard of for", "cannot be reached for")
    for number, (host, process) in enumerate(zip(hosts, processes, strict=True)):
        said = process.communicate(timeout=120)[0]
        seconds = time.monotonic() - began
        told = [line for line in said.splitlines() if "Stopped: " in line]
        say(f"{host.name} ended after {seconds:.0f} s with code {process.returncode}: {told}")
        other = hosts[1 - number].name
        assert seconds < SOON and process.returncode != 0, said
        assert len(told) == 1 and f"rank {1 - number} on {other} {lost[number]}" in told[0], said
    last = checkpoint.listed(checkpoints)[-1]
    checkpoint.read_state(last)
    say(f"{last.name} is whole.")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
