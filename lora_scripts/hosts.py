"""What must be right on all hosts of a run: the same program and packages, the run on the first."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from lora_scripts import __version__
from lora_scripts.config import Draft
from lora_scripts.environment import MISSING, version_of
from lora_scripts.errors import Problem
from lora_scripts.processes import Processes, some_of
from lora_scripts.run_files import CHECKPOINTS

# Another version of these computes other numbers, or asks for a sum where the rest does not
REFUSED = ("lora_scripts", "torch", "diffusers", "transformers", "peft")
NAMED = ("safetensors", "python")  # what they do is the same from version to version


def problems(draft: Draft, processes: Processes) -> list[Problem]:
    """What keeps the hosts from training together: the same list in all processes."""
    if processes.size == 1:
        return []
    return [*differences(processes), *run_elsewhere(draft, processes)]


def differences(processes: Processes) -> list[Problem]:
    """What is not the same in all processes, with who has which: the same list in all of them.

    Builds of one version of torch (`+cpu`, `+cu130`) are a warning.
    """
    every = processes.gathered((processes.name, versions()))
    problems_found = []
    for what in (*REFUSED, *NAMED):
        who: dict[str, list[str]] = {}
        for name, found in every:
            who.setdefault(found.get(what, MISSING), []).append(name)
        if len(who) == 1:
            continue
        told = "; ".join(f"{version} ({some_of(names)})" for version, names in who.items())
        others = len({version.partition("+")[0] for version in who}) > 1
        refused = others and what in REFUSED
        problems_found.append(
            Problem(
                what,
                f"found {told}; install the same on all hosts",
                severity="error" if refused else "warning",
            )
        )
    return problems_found


def run_elsewhere(draft: Draft, processes: Processes) -> list[Problem]:
    """A run that would begin anew, since what it should go on from lies on another host.

    The first process alone reads and writes the output folder.
    """
    from lora_scripts.training import checkpoint

    config = draft.config
    last = 0
    if config is not None and config.resume == "auto":
        found = checkpoint.listed(config.output_dir / CHECKPOINTS)
        last = int(found[-1].name.removeprefix("step-")) if found else 0
    every = processes.gathered((last, processes.name))
    (newest, there), (step, first) = max(every), every[0]
    if newest <= step:
        return []
    what = (
        f"holds {checkpoint.name_of(newest)} where {there} is, but none as new where {first} is, "
        "which alone reads and writes it; copy the folder there, or set resume=never"
    )
    return [Problem(draft.source.where("output_dir"), what)]


def versions() -> dict[str, str]:
    """What this process runs on, as people are told it."""
    packages = (*REFUSED[1:], NAMED[0])
    return {
        "lora_scripts": f"{__version__}, code {_code()}",
        **{package: version_of(package) or MISSING for package in packages},
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def _code() -> str:
    """The beginning of a hash of this package: its number does not change with every commit."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:8]
