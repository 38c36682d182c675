"""`lora-scripts doctor` on this machine and on real configs: the table, its exit codes, JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len

from lora_scripts import cards, disk, doctor, run_lock
from lora_scripts.doctor import Section
from lora_scripts.environment import Finding
from lora_scripts.models.kinds import Family
from tests import runs, text_toys, toys
from tests.console import command


def findings(*arguments: str) -> dict[str, Finding]:
    """What `doctor --json` finds, by name."""
    _, text = command("doctor", *arguments, "--json")
    sections = json.loads(text)["sections"]
    return {row["what"]: Finding(**row) for part in sections for row in part["findings"]}


@pytest.fixture
def project(
    bases: dict[Family, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The keys of a good config, with Chinese names, from the folder where a run would start."""
    monkeypatch.chdir(tmp_path)
    toys.save_pictures(tmp_path / "图片")
    values = runs.values(bases["sd1"], Path("图片"), tmp_path)
    return {**values, "output_dir": "输出/猫", "cache_dir": "cache"}


def config(values: dict[str, Any]) -> str:
    """`my.yaml` with these keys."""
    return str(toys.write_config(Path("my.yaml"), **values))


# --- the machine ----------------------------------------------------------------------------------


def test_this_machine() -> None:
    code, text = command("doctor")
    assert code == 0
    assert text.endswith("\nNothing is wrong here.\n")
    for title in ("This machine", "Devices", "Packages", "Extras: needed for what stands beside"):
        assert f"\n{title}" in text
    assert f"ok     torch              {torch.__version__} " in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    found = findings()
    threads, speed, precision = re.fullmatch(
        r"threads: (\d+); bf16 is (fast|slow) here, mixed_precision: auto takes (bf16|no)",
        found["CPU"].found,
    ).groups()  # type: ignore[union-attr]
    assert int(threads) == torch.get_num_threads()
    assert precision == {"fast": "bf16", "slow": "no"}[speed]  # timed anew each time
    assert re.fullmatch(r"[\d.]+ GB, [\d.]+ GB free", found["RAM"].found)


def test_overrides_need_a_config() -> None:
    said = "1 problem:\n  lora_rank=4: changes a config; name it by --config\n"
    assert command("doctor", "lora_rank=4") == (2, said)


def test_a_broken_torch_is_a_row_with_what_to_type(tmp_path: Path) -> None:
    """Nothing falls over, the devices are left out, and torch alone is to be mended."""
    (tmp_path / "torch").mkdir()
    text = 'raise OSError("libcublas.so.12: cannot open shared object file")'
    (tmp_path / "torch" / "__init__.py").write_text(text, encoding="utf-8")
    code = "from lora_scripts.cli import main; main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8",
             "COLUMNS": "140"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "WRONG  torch " in done.stdout
    assert "cannot be loaded: OSError: libcublas.so.12" in done.stdout
    assert '-m pip install --force-reinstall "torch>=2.9"\n' in done.stdout
    assert "; not tried without torch" in done.stdout
    assert "Devices" not in done.stdout
    assert done.stdout.endswith("\nWrong here: torch. What to do stands below each, at ->.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_weights_that_would_wait_for_a_card_where_none_is(project: dict[str, Any]) -> None:
    """Wrong here, and nothing else is; libraries say nothing between."""
    config({**project, "offload": True, "device": "auto"})
    done = subprocess.run(
        [sys.executable, "-m", "lora_scripts", "doctor", "--config", "my.yaml"],
        capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "140"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "WRONG  offload" in done.stdout and "no card is used" in done.stdout
    assert done.stdout.endswith("\nWrong here: offload. What to do stands below each, at ->.\n")


def test_a_broken_package_beside_a_config(project: dict[str, Any], tmp_path: Path) -> None:
    """The run is not looked at, as that needs the package; the machine is all the same."""
    (tmp_path / "diffusers").mkdir()
    text = "raise ImportError('cannot import name x')"
    (tmp_path / "diffusers" / "__init__.py").write_text(text, encoding="utf-8")
    code = "from lora_scripts.cli import main; main(['doctor', '--config', 'my.yaml'])"
    config(project)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8",
             "COLUMNS": "140"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "WRONG  diffusers " in done.stdout
    assert "cannot be loaded: ImportError: cannot import name x" in done.stdout
    assert "not looked at before the packages are in order" in done.stdout
    assert "\nDevices\n" in done.stdout and "RAM" not in done.stdout
    assert done.stdout.endswith("\nWrong here: diffusers. What to do stands below each, at ->.\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_in_a_chinese_console(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    path = "输出/" + "很长的名字" * 20
    rows = [
        Finding("torch", "2.13.0+cpu, a build for the CPU only", "CUDA", cards.CUDA_INSTALL, "bad"),
        Finding("output_dir", f"{path}: will be made", "read and write"),
    ]
    said = io.TextIOWrapper(io.BytesIO(), encoding="gbk", errors="strict", write_through=True)
    with contextlib.redirect_stdout(said):
        doctor.show([Section("Packages", rows, ["a line below"])])
    lines = said.buffer.getvalue().decode("gbk").splitlines()  # type: ignore[attr-defined]
    # what is to be typed is never broken into lines
    assert f"       -> {cards.CUDA_INSTALL}" in lines
    assert "a line below" in lines
    assert max(cell_len(line) for line in lines if "->" not in line) <= width
    shown = "".join(line[7 + 19 :].split("  ")[0].strip() for line in lines if "很" in line)
    assert shown.count("很") == 20


# --- the hub --------------------------------------------------------------------------------------


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.without_secret("https://hf-mirror.com/x") == "https://hf-mirror.com/x"
    address = "https://anna:geheim@mirror.example:8443/hub"
    assert doctor.without_secret(address) == "https://…@mirror.example:8443/hub"
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    rows = doctor.hub_rows()
    assert "a token is set" in [row.found for row in rows]
    assert "hf_abcdefghijklmnop" not in str(rows)
    assert any(row.what == "offline" for row in rows)  # as the tests are


# --- a run ----------------------------------------------------------------------------------------


def test_a_good_config(project: dict[str, Any]) -> None:
    file = config({**project, "optimizer": "prodigy", "learning_rate": 1.0})
    found = findings("--config", file)
    assert found["prodigyopt"].needed.endswith("; needed by optimizer: prodigy (my.yaml line 11)")
    assert found["train_data_dir"] == Finding("train_data_dir", "图片: a folder", "read")
    assert found["cache_dir"].found == "cache: can be written to"  # what was seen of the pictures
    assert found["output_dir"].found == "输出/猫: will be made"
    assert found["base model"].found == "SD 1.x, diffusers folder"
    assert found["data"].found == "6 pictures with captions"
    assert found["output folder"].found == "train would begin anew"
    assert found["checkpoints"].found.startswith("1 in about 6 steps, ")
    assert found["disk"].found.endswith(" free for 输出/猫")
    assert "1 checkpoint of" in found["disk"].needed
    assert {row.state for row in found.values()} <= {"good", "note"}
    assert not Path("输出").exists()
    code, text = command("doctor", "--config", file)
    assert code == 0
    assert "\nNeeded by my.yaml\n" in text and "输出/猫" in text


def test_a_config_with_mistakes(project: dict[str, Any]) -> None:
    file = config({**project, "lora_rnk": 4, "vae": "no/where/vae", "train_data_dir": "图"})
    code, text = command("doctor", "--config", file)
    assert code == 2
    assert "\n3 problems:\n" in text
    assert "lora_rnk: unknown key; did you mean lora_rank?" in text
    found = findings("--config", file)
    assert (found["vae"].found, found["vae"].state) == ("no/where/vae: nothing is there", "bad")
    assert found["train_data_dir"].found == "图: nothing is there"
    assert "output folder" not in found


def test_no_such_config(tmp_path: Path) -> None:
    code, text = command("doctor", "--config", str(tmp_path / "nothing.yaml"))
    assert code == 2
    assert "\nPackages\n" in text and "no such file" in text


def test_data_with_errors(project: dict[str, Any]) -> None:
    Path("图片/img01.png").write_bytes(b"no picture")
    code, text = command("doctor", "--config", config(project))
    assert code == 1
    assert "img01.png" in text


def test_a_config_for_another_machine(project: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    code, text = command("doctor", "--config", config(project), "device=cuda")
    assert code == 1
    assert text.endswith("\nWrong here: device. What to do stands below each, at ->.\n")
    assert "\n       -> device: auto or cpu in the config\n" in text


def test_a_folder_in_use(project: dict[str, Any]) -> None:
    with run_lock.in_use(Path("输出/猫")):
        row = findings("--config", config(project))["output folder"]
        assert row.state == "bad"
        assert row.found.startswith(f"another run is writing to it: process {os.getpid()} on ")
        assert command("doctor", "--config", config(project))[0] == 1


def test_a_folder_with_a_run(project: dict[str, Any], tmp_path: Path) -> None:
    base = Path(project["base_model"])
    assert runs.run(base, tmp_path / "图片", tmp_path, epochs=1)[0] == 0
    finished = runs.values(base, tmp_path / "图片", tmp_path, epochs=1)
    said = findings("--config", config(finished))["output folder"]
    assert said.found == "its run is finished: train would do nothing"
    said = findings("--config", config({**finished, "epochs": 2}))["output folder"]
    assert said.found == "train would go on from step-000003"
    code, text = command("doctor", "--config", config({**finished, "lora_rank": 2}))
    assert code == 2
    assert "lora_rank: found 2, but step-000003 was trained with 4" in text


def test_a_disk_that_is_too_small(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space is made up, as no disk that small is at hand; all else is real."""
    monkeypatch.setattr(disk, "room", lambda config: disk.Room(1000))
    code, text = command("doctor", "--config", config(project))
    assert code == 2
    assert "output_dir: found 输出/猫, on a disk with 1 kB free; one checkpoint takes" in text
    assert "\nWRONG  disk " in text


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files")
def test_a_folder_that_cannot_be_written_to(project: dict[str, Any]) -> None:
    row = findings("--config", config({**project, "cache_dir": "/proc/cache"}))["cache_dir"]
    assert row.found.startswith("/proc/cache: cannot be written to (")
    assert (row.state, row.needed) == ("bad", "read and write")


def test_a_text_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = text_toys.save_model(tmp_path / "base")
    text_toys.write_jsonl(tmp_path / "rows.jsonl", text_toys.conversations(6))
    values = runs.text_values(base, tmp_path / "rows.jsonl", tmp_path)
    found = findings("--config", config(values))
    assert found["base model"].found == "llama, layout transformers"
    assert found["data"].found == "6 rows"
    found = findings("--config", config({**values, "base_model": "someone/a-model"}))
    assert found["base_model"].found == "someone/a-model of the hub, to be fetched"
    assert found["disk"].found == "not known before the base model is here"


def test_packages_that_files_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_bytes(b"PAR1")
    values = {
        "task_type": "text-generation", "base_model": "model.gguf", "train_data_dir": "data",
        "output_dir": "out", "quantization": "nf4",
    }  # fmt: skip
    found = findings("--config", config(values))
    needed = {name: found[name].needed for name in ("bitsandbytes", "gguf", "pyarrow")}
    assert needed["bitsandbytes"].endswith("; needed by quantization: nf4 (my.yaml line 5)")
    assert needed["gguf"].endswith("; needed by base_model (my.yaml line 2)")
    assert needed["pyarrow"].endswith("; needed by .parquet data")


# --- for machines ---------------------------------------------------------------------------------


def test_json(project: dict[str, Any]) -> None:
    code, text = command("doctor", "--config", config({**project, "lora_rnk": 4}), "--json")
    assert code == 2
    values = json.loads(text)
    titles = [section["title"] for section in values["sections"]]
    assert titles[:3] == ["This machine", "Devices", "Packages"]
    (python,) = [f for f in values["sections"][0]["findings"] if f["what"] == "Python"]
    assert python["needed"] == ">=3.11" and python["state"] == "good"
    assert [error["what"] for error in values["errors"]] == ["unknown key; did you mean lora_rank?"]
    assert values["wrong"] == []
    assert "report" not in values
