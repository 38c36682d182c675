"""Hosts that differ in versions, in the code itself, in what lies at a path: told once, by name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests import runs, text_toys, toys

ROOT = Path(__file__).resolve().parents[1]
TELL = """
import json
from dataclasses import asdict
from lora_scripts import hosts
from lora_scripts.processes import joined
with joined() as processes:
    print(json.dumps([asdict(problem) for problem in hosts.differences(processes)]))
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gloo's store needs libuv on Windows")


def pair(
    folder: Path, *commands: Sequence[str], environment: Mapping[str, str]
) -> list[subprocess.CompletedProcess[str]]:
    """Two processes of a run as if on two hosts; the second has this environment besides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
              "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    path = os.environ.get("PYTHONPATH", "")
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}", **common,
                 "RANK": str(rank), **(environment if rank else {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *said)
        for process in started
        for said in [process.communicate(timeout=120)]
    ]


def installed(folder: Path, package: str, version: str) -> None:
    """What pip would note of a package, before the real one on the path."""
    note = folder / f"{package}-{version}.dist-info" / "METADATA"
    note.parent.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    note.write_text(text, encoding="utf-8")


def test_versions_and_code_that_differ_are_told_with_who_has_which(tmp_path: Path) -> None:
    build = importlib.metadata.version("torch").partition("+")[0] + "+other"
    installed(tmp_path, "peft", "0.0.1")
    installed(tmp_path, "safetensors", "0.0.1")
    installed(tmp_path, "torch", build)
    shutil.copytree(ROOT / "lora_scripts", tmp_path / "lora_scripts")
    with (tmp_path / "lora_scripts" / "grid.py").open("a", encoding="utf-8") as file:
        file.write("# another line\n")
    first, second = pair(
        ROOT, ("-c", TELL), ("-P", "-c", TELL), environment={"PYTHONPATH": str(tmp_path)}
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    found = {problem["where"]: problem for problem in json.loads(first.stdout)}
    assert {name: problem["severity"] for name, problem in found.items()} == {
        "lora_scripts": "error", "torch": "warning", "peft": "error", "safetensors": "warning",
    }  # fmt: skip
    here = importlib.metadata.version("peft")
    host = socket.gethostname()
    told = f"found {here} (rank 0 on {host}); 0.0.1 (rank 1 on {host}); install the same"
    assert found["peft"]["what"].startswith(told)


def test_another_version_and_a_path_that_is_missing_are_refused_together(tmp_path: Path) -> None:
    rows = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    values = runs.text_values(text_toys.save_model(tmp_path / "base"), rows, tmp_path)
    here = toys.write_config(tmp_path / "a.yaml", **values)
    changes = {"train_data_dir": "not/there", "output_dir": str(tmp_path / "there")}
    there = toys.write_config(tmp_path / "b.yaml", **values | changes)
    installed(tmp_path / "other", "peft", "0.0.1")
    path = f"{tmp_path / 'other'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    first, second = pair(
        ROOT,
        ("train.py", "--config", str(here)),
        ("train.py", "--config", str(there)),
        environment={"PYTHONPATH": path},
    )
    assert first.returncode == second.returncode == 2, first.stderr + second.stderr
    told = " ".join(first.stderr.split())
    assert "peft: found" in told and "0.0.1 (rank 1 on" in told
    assert "found not/there, but there is no such folder" in told
    assert f"(rank 1 on {socket.gethostname()})" in told
    assert "not/there" not in second.stderr, "told twice"
    assert not (tmp_path / "output").exists()


def test_a_run_whose_checkpoints_lie_on_another_host_does_not_begin_anew(tmp_path: Path) -> None:
    rows = text_toys.write_jsonl(tmp_path / "rows.jsonl")
    values = runs.text_values(text_toys.save_model(tmp_path / "base"), rows, tmp_path)
    here = toys.write_config(tmp_path / "a.yaml", **values)
    changes = {"output_dir": str(tmp_path / "there")}
    there = toys.write_config(tmp_path / "b.yaml", **values | changes)
    (tmp_path / "there" / "checkpoints" / "step-000040").mkdir(parents=True)
    first, second = pair(
        ROOT,
        ("train.py", "--config", str(here)),
        ("train.py", "--config", str(there)),
        environment={},
    )
    assert first.returncode == second.returncode == 2, first.stderr + second.stderr
    told = " ".join(first.stderr.split())
    host = socket.gethostname()
    assert f"holds step-000040 where rank 1 on {host} is, but none as new where rank 0 on" in told
    assert not (tmp_path / "output").exists()
