"""Versions against ranges, drivers against CUDA builds, cards against what torch holds code for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lora_scripts import cards, environment
from lora_scripts.cards import Card, Driver, Torch
from lora_scripts.environment import Need, judge_package, judge_python, parse_needs

# Lines of real nvidia-smi tables, of drivers from 2019 to 2025
SMI_418 = "| NVIDIA-SMI 450.66       Driver Version: 418.67       CUDA Version: 10.1     |"
SMI_470 = """\
Thu Sep 23 12:42:56 2021
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 11.4     |
|-------------------------------+----------------------+----------------------+
| GPU  Name        Persistence-M| Bus-Id        Disp.A | Volatile Uncorr. ECC |
"""
SMI_550 = """\
Wed Jan 24 15:18:40 2024
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.40.07              Driver Version: 550.40.07      CUDA Version: 12.4     |
"""
SMI_575 = (  # a driver without its CUDA part
    "| NVIDIA-SMI 575.64.03              Driver Version: 575.64.03      CUDA Version: N/A      |"
)
SMI_580 = (
    "| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |"
)
# What it says where the driver does not run
SMI_BROKEN = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running.\n\n"
)
SMI_MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\n"

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


# --- Python and packages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "state"), [("3.10.14", "bad"), ("3.11.0", "good"), ("3.14.0rc2", "good")]
)
def test_python(found: str, state: str) -> None:
    row = judge_python(found, ">=3.11", "/usr/bin/python3")
    assert row.state == state
    assert row.found == f"{found} (/usr/bin/python3)"
    if state == "bad":
        assert row.to_type == "install Python 3.11, make a new virtual environment with it"


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.42.1", "good"),
        ("0.42.0.dev0", "good"),
        ("0.41.9", "bad"),
        ("0.43.0", "bad"),
        ("not a version", "bad"),
    ],
)
def test_a_package_against_its_range(version: str, state: str) -> None:
    (need,) = parse_needs(["diffusers<0.43,>=0.42"])
    row = judge_package(need, version)
    assert (row.state, row.needed) == (state, ">=0.42, <0.43")
    if state == "bad":
        assert row.to_type.endswith('-m pip install "diffusers>=0.42,<0.43"')


def test_a_build_of_torch_counts_as_its_version() -> None:
    (need,) = parse_needs(["torch>=2.9"])
    assert judge_package(need, "2.13.0+cu130").state == "good"
    assert judge_package(need, "2.8.0+cpu").state == "bad"


def test_a_package_that_is_missing() -> None:
    (need,) = parse_needs(["ruamel.yaml>=0.19"])
    row = judge_package(need, None)
    assert (row.found, row.state) == ("not installed", "bad")
    assert row.to_type.endswith('-m pip install "ruamel.yaml>=0.19"')


def test_a_package_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "half_a_package"
    broken.mkdir()
    (broken / "__init__.py").write_text('raise OSError("lib.so: no\\nsuch")', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    trouble = environment._trouble_with("half_a_package")
    assert trouble == "OSError: lib.so: no"
    row = judge_package(parse_needs(["half-a-package"])[0], "1.0", trouble)
    assert row.found == "1.0, but it cannot be loaded: OSError: lib.so: no"
    assert row.to_type.endswith('-m pip install --force-reinstall "half-a-package"')


def test_torch_without_the_runtime_of_windows() -> None:
    trouble = (
        "OSError: [WinError 126] The specified module could not be found. Error loading "
        r'"C:\venv\Lib\site-packages\torch\lib\fbgemm.dll" or one of its dependencies.'
    )
    row = judge_package(parse_needs(["torch>=2.9"])[0], "2.13.0+cpu", trouble)
    assert row.state == "bad"
    assert row.to_type.endswith("https://aka.ms/vs/17/release/vc_redist.x64.exe")


def test_markers_and_extras() -> None:
    requirements = [
        "numpy>=2",
        'gguf<0.20,>=0.19; extra == "gguf"',
        'colorama; sys_platform == "amiga"',
    ]
    assert [need.name for need in parse_needs(requirements)] == ["numpy"]
    assert [(need.name, need.extra) for need in parse_needs(requirements, "gguf")] == [
        ("gguf", "gguf")
    ]


def test_the_needs_are_those_of_the_project() -> None:
    names = {need.name for need in environment.needs()}
    assert {"torch", "diffusers", "ruamel.yaml", "packaging", "Pillow"} <= names
    for extra in environment.EXTRAS:
        assert environment.needs(extra), extra
    assert Need("Pillow", environment.needs()[0].range).module == "PIL"


def test_an_extra_is_a_remark_as_long_as_nothing_asks_for_it() -> None:
    found = environment.needs("optimizers")
    none = dict.fromkeys((need.name for need in found), None)
    row = environment.judge_extra("optimizers", found, none)
    assert row.state == "note"
    assert row.found == (
        "bitsandbytes not installed, lion-pytorch not installed, prodigyopt not installed"
    )
    assert row.needed == "only for optimizer: adamw8bit, lion or prodigy"
    assert '"lion-pytorch>=0.2.4"' in row.to_type
    old = environment.judge_extra("optimizers", found, {**none, "bitsandbytes": "0.49.0"})
    assert old.found.startswith("bitsandbytes 0.49.0, too old, ")


def test_a_package_that_a_config_asks_for_has_the_range_of_its_last_extra() -> None:
    row = environment.wanted_row("bitsandbytes", "needed by optimizer: adamw8bit (a.yaml line 3)")
    assert row.needed == ">=0.50; needed by optimizer: adamw8bit (a.yaml line 3)"
    assert row.state == "good"


def test_everything_here_is_in_order() -> None:
    rows = [*environment.system_rows(), *environment.package_rows()]
    assert [row for row in rows if row.state == "bad"] == []


# --- driver and CUDA build ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (SMI_418, Driver("418.67", (10, 1))),
        (SMI_470, Driver("470.57.02", (11, 4))),
        (SMI_550, Driver("550.40.07", (12, 4))),
        (SMI_575, Driver("575.64.03", None)),
        (SMI_580, Driver("580.95.05", (13, 0))),
        (SMI_BROKEN, Driver(trouble=SMI_BROKEN.strip())),
        (SMI_MISMATCH, Driver(trouble=SMI_MISMATCH.strip())),
        ("", Driver(trouble="it says nothing")),
    ],
)
def test_nvidia_smi_is_read(text: str, driver: Driver) -> None:
    assert cards.read_smi(text) == driver


@pytest.mark.parametrize(
    ("text", "cuda", "state", "needed"),
    [
        (SMI_470, "12.6", "bad", "525 or newer for CUDA 12"),
        (SMI_550, "12.4", "good", "525 or newer for CUDA 12"),
        (SMI_550, "12.6", "good", "torch's CUDA 12.6 is newer, which NVIDIA lets run"),
        (SMI_550, "13.0", "bad", "580 or newer for CUDA 13"),
        (SMI_575, "13.0", "bad", "580 or newer for CUDA 13"),
        (SMI_575, "12.8", "good", "525 or newer for CUDA 12"),
        (SMI_580, "13.0", "good", "580 or newer for CUDA 13"),
        (SMI_580, "12.6", "good", "525 or newer for CUDA 12"),
        (SMI_580, "14.0", "bad", "one for CUDA 14"),
        (SMI_MISMATCH, "13.0", "bad", "a driver that works"),
    ],
)
def test_a_driver_against_the_cuda_of_torch(text: str, cuda: str, state: str, needed: str) -> None:
    row = cards.judge_driver(Torch("2.13.0", cuda=cuda), cards.read_smi(text))
    assert row.state == state
    assert needed in row.needed
    assert (cards.DRIVERS in row.to_type) == (state == "bad")


def test_nvidia_smi_without_a_card_is_a_remark() -> None:
    row = cards.judge_driver(Torch("2.13.0"), cards.read_smi(SMI_BROKEN), has_card=False)
    assert row.state == "note"


# --- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), CU126, True),  # RTX 40: code for 8.6 runs
        ((12, 0), CU126, False),  # RTX 50 and a build of 2024
        ((12, 0), CU130, True),
        ((12, 1), CU130, True),
        ((6, 1), CU126, True),  # GTX 10
        ((6, 1), CU130, False),
        ((7, 0), CU130, False),
        ((8, 0), ("sm_86",), False),  # not from a later minor version
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100f",), True),
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX, for every later card
        ((8, 6), ("compute_90",), False),
        ((12, 0), ("compute_90a",), False),
        ((8, 6), (), False),
    ],
)
def test_which_code_runs_on_which_card(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert cards.runs_on(capability, architectures) == runs


def test_a_card_and_its_precision() -> None:
    row, precision = cards.judge_card(Card("RTX 3060", (8, 6), 12 * 2**30), CU130)
    assert (row.found, row.state) == ("RTX 3060, 12.0 GiB, capability 8.6", "good")
    assert precision.found == "mixed_precision: auto takes bf16"


def test_a_card_that_is_too_old_or_too_new_for_the_torch() -> None:
    row, precision = cards.judge_card(Card("GTX 1080", (6, 1), 8 * 2**30), CU130)
    assert row.state == "bad"
    assert row.needed == "this torch holds code for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120"
    assert row.to_type.startswith("install a build for CUDA 12.6 of torch 2.9 or newer: https://")
    assert precision.found.startswith("mixed_precision: auto takes fp16")
    row, _ = cards.judge_card(Card("RTX 5080", (12, 0), 16 * 2**30), CU126)
    assert row.to_type == cards.CUDA_INSTALL


CARD = Card("RTX 3060", (8, 6), 12 * 2**30)


@pytest.mark.parametrize(
    ("found", "has_nvidia", "has_amd", "device", "state", "said"),
    [
        (Torch("2.13.0+cpu"), False, False, "auto", "note", "no NVIDIA card was found"),
        (Torch("2.13.0+cpu"), True, False, "auto", "bad", "a build for the CPU only"),
        (Torch("2.13.0+cpu"), True, False, "cpu", "note", "a build for the CPU only"),
        (Torch("2.13.0+cpu"), False, False, "cuda", "bad", "no NVIDIA card"),
        (Torch("2.13.0", "13.0", cards=(CARD,)), True, False, "auto", "good", "1 × CUDA 13.0"),
        (Torch("2.13.0", "13.0"), True, False, "auto", "bad", "torch sees no card"),
        (Torch("2.13.0", "13.0"), False, False, "auto", "note", "no NVIDIA card was found"),
        (Torch("2.13.0", None, "6.4"), False, True, "auto", "note", "ROCm build (HIP 6.4)"),
        (Torch("2.13.0+cpu"), False, True, "auto", "note", "AMD cards are not supported"),
        (Torch("2.13.0", has_mps=True), False, False, "auto", "note", "(mps) is not supported"),
    ],
)
def test_the_device_of_a_run(
    found: Torch, has_nvidia: bool, has_amd: bool, device: str, state: str, said: str
) -> None:
    row = cards.judge_torch(found, has_nvidia=has_nvidia, has_amd=has_amd, device=device)
    assert row.state == state
    assert said in row.found


def test_a_cpu_torch_beside_a_card_is_told_the_version_that_is_pinned() -> None:
    row = cards.judge_torch(Torch("2.13.0+cpu"), has_nvidia=True, has_amd=False)
    assert row.to_type == cards.CUDA_INSTALL
    assert f"torch=={torch.__version__.partition('+')[0]} " in cards.CUDA_INSTALL


def test_cards_that_the_user_hides_are_not_missed() -> None:
    hidden = Torch("2.13.0", "13.0")
    row = cards.judge_torch(hidden, has_nvidia=True, has_amd=False, hidden=True)
    assert (row.state, row.found) == ("note", "CPU; CUDA_VISIBLE_DEVICES hides the cards")


def test_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "nt":
        pytest.skip("a shell script stands for the program")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards.run_smi() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver Version: 580.95.05'\nexit 9\n", encoding="utf-8")
    program.chmod(0o755)
    printed = cards.run_smi()
    assert printed is not None
    assert cards.read_smi(printed) == Driver("580.95.05")


def test_this_machine() -> None:
    found = cards.look()
    assert found.version == torch.__version__
    expected = "good" if found.cards else "note"
    assert cards.rows()[0].state == expected
