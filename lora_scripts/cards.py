"""torch against the graphics card: its CUDA build, the driver, what the card can run.

The judging functions take plain values and import nothing; `look` asks torch and nvidia-smi.
Sources: NVIDIA, "CUDA Compatibility" (minor version compatibility: the least driver of each major
version) and "CUDA C++ Programming Guide", compute capabilities (binary and PTX compatibility).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_scripts.environment import Finding, State

CUDA_INSTALL = (
    "python -m pip install --force-reinstall torch==2.13.0 "
    "--index-url https://download.pytorch.org/whl/cu130"
)
DRIVERS = "https://www.nvidia.com/drivers"
# The least driver that runs anything built for a major version of CUDA.
LEAST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
BF16_SINCE = (8, 0)  # compute capability with bf16 of its own
OLDEST_IN_13 = (7, 5)  # compute capability of the oldest cards that builds for CUDA 13 know
_OLDER = (
    "install a build for CUDA 12.6 of torch 2.9 or newer: "
    "https://pytorch.org/get-started/previous-versions"
)
_SMI_SECONDS = 20
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says.

    Attributes:
        version: Of the driver: "580.95.05".
        cuda: The newest CUDA that it runs; None if it does not say ("N/A").
        trouble: Why it cannot say anything; "" if all is well.
    """

    version: str = ""
    cuda: tuple[int, int] | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Card:
    """A card as torch sees it: `capability` (8, 6), `memory` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: "2.13.0+cu130".
        cuda: The CUDA that it was built for, "13.0"; None for a build without.
        hip: The same of AMD's ROCm.
        architectures: What it holds code for: "sm_86", "compute_120".
        cards: Those that it can use.
        has_mps: Whether it sees an Apple GPU.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    architectures: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    has_mps: bool = False


# --- judging: plain values in, rows out -----------------------------------------------------------


def read_smi(text: str) -> Driver:
    """What the output of a plain `nvidia-smi` says; its first line of text if it says no version.

    The table was drawn in several ways since 2015; the two words stand in all of them.
    """
    version = re.search(r"Driver Version: *(\d[\d.]*)", text)
    if version is None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return Driver(trouble=lines[0] if lines else "it says nothing")
    cuda = re.search(r"CUDA Version: *(\d+)\.(\d+)", text)
    return Driver(version[1], None if cuda is None else (int(cuda[1]), int(cuda[2])))


def judge_driver(torch: Torch, driver: Driver, *, has_card: bool = True) -> Finding:
    """An NVIDIA driver against the CUDA that torch was built for.

    Where torch sees the cards all the same (with NVIDIA's compatibility package, say) it is right.
    """
    state: State = "note" if torch.cards else "bad"
    if driver.trouble:
        found = f"nvidia-smi says: {driver.trouble}"
        if not has_card:
            needed = "a driver that works, if there is an NVIDIA card"
            return Finding("NVIDIA driver", found, needed, state="note")
        mend = f"install the driver anew, restart the machine: {DRIVERS}"
        return Finding("NVIDIA driver", found, "a driver that works", mend, state)
    runs = "" if driver.cuda is None else f", runs CUDA up to {_dotted(driver.cuda)}"
    found = f"{driver.version}{runs}"
    if torch.cuda is None:
        return Finding("NVIDIA driver", found)
    major, minor = (int(part) for part in torch.cuda.split(".")[:2])
    least = LEAST_DRIVER.get(major)
    needed = f"{least} or newer for CUDA {major}" if least else f"one for CUDA {major}"
    if _is_too_old(driver, major):
        mend = f"install a newer driver: {DRIVERS}"
        return Finding("NVIDIA driver", found, needed, mend, state)
    if driver.cuda is not None and driver.cuda < (major, minor):
        needed += f"; torch's CUDA {torch.cuda} is newer, which NVIDIA lets run"
    return Finding("NVIDIA driver", found, needed)


def _is_too_old(driver: Driver, major: int) -> bool:
    """By the CUDA that the driver names, else by its own number."""
    if driver.cuda is not None:
        return driver.cuda[0] < major
    return int(driver.version.split(".")[0]) < LEAST_DRIVER.get(major, 0)


def judge_card(card: Card, architectures: Sequence[str]) -> list[Finding]:
    """A card against what torch holds code for; its memory and its bf16."""
    said = f"{card.name}, {card.memory / 2**30:.1f} GiB, capability {_dotted(card.capability)}"
    row = Finding("card", said)
    if not runs_on(card.capability, architectures):
        known = ", ".join(name for name in architectures if name.startswith("sm_"))
        mend = CUDA_INSTALL if card.capability >= OLDEST_IN_13 else _OLDER
        row = Finding("card", said, f"this torch holds code for {known}", mend, "bad")
    is_new = card.capability >= BF16_SINCE
    takes = "bf16" if is_new else "fp16; no bf16 of its own (cards since 2020 have it)"
    return [row, Finding("card's precision", f"mixed_precision: auto takes {takes}")]


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a card.

    Machine code (sm_86) runs on its own major version from its minor version on; PTX (compute_86)
    is compiled by the driver for every later card. With an `a` it is for that card alone, with an
    `f` for its major version from its minor version on.
    """
    return any(_runs(capability, architecture) for architecture in architectures)


def _runs(capability: tuple[int, int], architecture: str) -> bool:
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return False
    kind, its, mark = match[1], (int(match[2]), int(match[3])), match[4]
    if mark == "a":
        return capability == its
    if kind == "compute" and not mark:
        return capability >= its
    return capability[0] == its[0] and capability[1] >= its[1]


def judge_torch(
    torch: Torch, *, has_nvidia: bool, has_amd: bool, hidden: bool = False, device: str = "auto"
) -> Finding:
    """Which device a run will have with this torch, and whether the machine could do better.

    Args:
        torch: As `look` finds it.
        has_nvidia, has_amd: Whether there is such a card.
        hidden: Whether the user hides all cards (CUDA_VISIBLE_DEVICES).
        device: The config's key.
    """
    if torch.hip is not None:
        found = f"a ROCm build (HIP {torch.hip}) for AMD cards"
        needed = "an NVIDIA card or the CPU: AMD's are not supported, a run on one is untested"
        return Finding("device", found, needed, "device: cpu in the config", "note")
    if hidden:
        return Finding("device", "CPU; CUDA_VISIBLE_DEVICES hides the cards", state="note")
    if torch.cuda is None and has_nvidia:
        found = f"torch {torch.version}, a build for the CPU only, beside an NVIDIA card"
        state: State = "note" if device == "cpu" else "bad"
        return Finding("device", found, "a CUDA build", CUDA_INSTALL, state)
    if torch.cards:
        return Finding("device", f"{len(torch.cards)} × CUDA {torch.cuda}; a run uses the first")
    if torch.cuda is not None and has_nvidia:
        mend = "see the driver's line; then: nvidia-smi"
        state = "note" if device == "cpu" else "bad"
        return Finding("device", "torch sees no card", "the card that is there", mend, state)
    if device == "cuda":
        mend = "device: auto or cpu in the config"
        return Finding("device", "no NVIDIA card", "one, for device: cuda", mend, "bad")
    if torch.has_mps:
        found = "CPU; Apple's GPU (mps) is not supported: device: auto takes the CPU"
        return Finding("device", found, state="note")
    if has_amd:
        found = "CPU; AMD cards are not supported: device: auto takes the CPU"
        return Finding("device", found, state="note")
    return Finding("device", "CPU; no NVIDIA card was found", state="note")


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


# --- looking at this machine ----------------------------------------------------------------------


def rows(device: str = "auto") -> list[Finding]:
    """torch, the driver and every card. Must not be called if torch cannot be loaded.

    `device`: the config's key.
    """
    torch, smi = look(), run_smi()
    driver = None if smi is None else read_smi(smi)
    has_nvidia = has_nvidia_card() or (driver is not None and not driver.trouble)
    found = [
        judge_torch(
            torch, has_nvidia=has_nvidia, has_amd=_has_amd(), hidden=_hidden(), device=device
        )
    ]
    if driver is not None:
        found.append(judge_driver(torch, driver, has_card=has_nvidia))
    for number, card in enumerate(torch.cards if torch.hip is None else ()):
        judged = judge_card(card, torch.architectures)
        found += judged if number == 0 else _remarks(judged)
    return _remarks(found) if device == "cpu" else found


def _remarks(findings: Sequence[Finding]) -> list[Finding]:
    """The same of a device that the run does not use."""
    return [replace(f, state="note") if f.state == "bad" else f for f in findings]


def look() -> Torch:
    """The installed torch and what it sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    return Torch(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()),
        cards=tuple(Card(p.name, (p.major, p.minor), p.total_memory) for p in properties),
        has_mps=torch.backends.mps.is_available(),
    )


def run_smi() -> str | None:
    """What nvidia-smi prints; None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program], capture_output=True, encoding="utf-8", errors="replace",
            timeout=_SMI_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return done.stdout + done.stderr


def has_nvidia_card() -> bool:
    """Whether this machine has an NVIDIA card with a driver."""
    if platform.system() == "Windows" or _is_wsl():
        return shutil.which("nvidia-smi") is not None
    return Path("/proc/driver/nvidia/gpus").is_dir() and shutil.which("nvidia-smi") is not None


def _hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no card."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def _is_wsl() -> bool:
    """Linux in Windows: the card's driver is Windows' own."""
    return Path("/dev/dxg").exists()


def _has_amd() -> bool:
    """Whether Linux has AMD's compute driver."""
    return Path("/dev/kfd").exists()
