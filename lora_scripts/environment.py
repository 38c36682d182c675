"""What is installed: Python and packages against what this version needs.

The judging functions take plain values and import nothing; the others look at this machine.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import platform
import shutil
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from lora_scripts.shell import typed

DISTRIBUTION = "lora-scripts"
# The module of a package, where it is not the package's name in small letters.
_MODULES = {"pillow": "PIL"}
VC_RUNTIME = "https://aka.ms/vs/17/release/vc_redist.x64.exe"
_NO_RUNTIME = ("WinError 126", "WinError 1114", "DLL load failed", "c10.dll")  # torch on Windows
MISSING = "not installed"
_BROKEN = ", but it cannot be loaded: "
# What each extra of pyproject.toml is for, in the keys and commands that ask for it.
EXTRAS: Mapping[str, str] = {
    "gguf": "base models in .gguf files, export --format gguf",
    "parquet": "data in .parquet files",
    "tagger": "label with wd14",
    "quantization": "quantization: nf4 or int8 (NVIDIA cards)",
    "optimizers": "optimizer: adamw8bit, lion or prodigy",
}

State = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table.

    Attributes:
        what: What is looked at.
        found: What is there.
        needed: What this version needs, or what it is needed for; "" if nothing.
        to_type: A command line or a key that mends it; "" if nothing is wrong.
        state: bad: a run would fail or not do what was asked. note: worth knowing.
    """

    what: str
    found: str
    needed: str = ""
    to_type: str = ""
    state: State = "good"


@dataclass(frozen=True)
class Need:
    """A package that this version needs.

    Attributes:
        name: As pip knows it.
        range: The versions that are taken.
        extra: The extra of pyproject.toml that it stands in; "" for what everybody needs.
    """

    name: str
    range: SpecifierSet
    extra: str = ""

    @property
    def module(self) -> str:
        """What Python imports."""
        small = self.name.lower().replace("-", "_")
        return _MODULES.get(small, small)

    @property
    def versions(self) -> str:
        """The range for people: the least version first."""
        return ", ".join(_ordered(self.range)) or "any version"


# --- judging: plain values in, rows out -----------------------------------------------------------


def judge_python(found: str, needed: str, where: str) -> Finding:
    """Whether a Python is one of those in the package's `Requires-Python`; `where` it lies."""
    if SpecifierSet(needed).contains(found, prereleases=True):
        return Finding("Python", f"{found} ({where})", needed)
    what = f"{found} ({where})"
    mend = f"install Python {_least(needed)}, make a new virtual environment with it"
    return Finding("Python", what, needed, mend, "bad")


def judge_package(need: Need, version: str | None, trouble: str = "") -> Finding:
    """A package's installed version (None: not there) against the versions that are taken.

    `trouble`: what happened when it was imported, "" if all went well.
    """
    if version is None:
        return Finding(need.name, MISSING, need.versions, pip_line(need), "bad")
    if not _taken(need.range, version):
        return Finding(need.name, version, need.versions, pip_line(need), "bad")
    if trouble:
        found = f"{version}{_BROKEN}{trouble}"
        return Finding(need.name, found, need.versions, _mend(need, trouble), "bad")
    return Finding(need.name, version, need.versions)


def judge_extra(extra: str, needs: Sequence[Need], versions: Mapping[str, str | None]) -> Finding:
    """An extra as a whole: nothing in it is needed until a config or a command asks for it."""
    state: State = "good"
    found = []
    for need in needs:
        version = versions[need.name]
        good = version is not None and _taken(need.range, version)
        said = version or MISSING
        found.append(f"{need.name} {said}" + ("" if good or version is None else ", too old"))
        state = state if good else "note"
    line = "" if state == "good" else pip_line(*needs)
    return Finding(f"extra {extra}", ", ".join(found), f"only for {EXTRAS[extra]}", line, state)


def pip_line(*needs: Need, options: str = "") -> str:
    """The command that installs packages, for any shell: `>` in quotes, this Python's own pip."""
    names = " ".join(f'"{need.name}{",".join(_ordered(need.range))}"' for need in needs)
    return f"{_python()} -m pip install {options}{names}"


def parse_needs(requirements: Sequence[str], extra: str = "") -> list[Need]:
    """Requirements as they stand in metadata; markers for other systems or extras left out."""
    needs = []
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue  # everybody needs it
        needs.append(Need(requirement.name, requirement.specifier, extra))
    return needs


def _taken(range: SpecifierSet, version: str) -> bool:
    """Whether a version is in a range; a build's mark (`+cpu`) and a pre-release are no matter."""
    try:
        return range.contains(Version(version).base_version, prereleases=True)
    except InvalidVersion:
        return False


def _ordered(range: SpecifierSet) -> list[str]:
    """The least version first: `>=0.42`, `<0.43`."""
    return sorted((str(part) for part in range), reverse=True)


def _least(needed: str) -> str:
    return next((s.version for s in SpecifierSet(needed) if s.operator == ">="), needed)


def _mend(need: Need, trouble: str) -> str:
    """What helps a package that is there and cannot be loaded."""
    if need.name == "torch" and any(mark in trouble for mark in _NO_RUNTIME):
        return f"install Microsoft's Visual C++ runtime: {VC_RUNTIME}"
    return pip_line(need, options="--force-reinstall ")


def _python() -> str:
    """How this Python is called in a terminal: by its path, if `python` is another one."""
    found = shutil.which("python")
    same = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
    return "python" if same else typed(sys.executable)


# --- looking at this machine ----------------------------------------------------------------------


def system_rows() -> list[Finding]:
    """The system and the Python that runs."""
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    return [
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        judge_python(platform.python_version(), metadata["Requires-Python"], sys.executable),
    ]


def needs(extra: str = "") -> list[Need]:
    """The packages of this version: what everybody needs, or those of one extra.

    A working copy's pyproject.toml is read where there is one: what pip noted when it was installed
    is older than the last `git pull`.
    """
    project = Path(__file__).parent.parent / "pyproject.toml"
    if not project.is_file():
        return parse_needs(importlib.metadata.requires(DISTRIBUTION) or (), extra)
    values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    listed = values["optional-dependencies"][extra] if extra else values["dependencies"]
    return [Need(need.name, need.range, extra) for need in parse_needs(listed)]


def version_rows() -> list[Finding]:
    """Every package that is needed by its version alone: a fraction of a second."""
    return [judge_package(need, version_of(need.name)) for need in needs()]


def package_rows() -> list[Finding]:
    """Every package that is needed, loaded to see that it can be."""
    with _quiet():
        rows = [_look_at(need) for need in needs()]
    if any(row.what == "torch" and row.state == "bad" for row in rows):
        return [_excused(row) for row in rows]
    return rows


def _excused(row: Finding) -> Finding:
    """What cannot be loaded beside a broken torch most likely can once that is mended."""
    version, broken, _ = row.found.partition(_BROKEN)
    if not broken or row.what == "torch":
        return row
    return Finding(row.what, f"{version}; not tried without torch", row.needed, state="note")


def extra_rows() -> list[Finding]:
    """The extras that are there and what each is for."""
    return [judge_extra(extra, found, _versions(found)) for extra, found in _extras()]


def wanted_row(package: str, needed_by: str) -> Finding:
    """A package of an extra that a config asks for: `needed_by` says where."""
    need = next(n for _, found in reversed(list(_extras())) for n in found if n.name == package)
    with _quiet():
        row = _look_at(need)
    return Finding(row.what, row.found, f"{row.needed}; {needed_by}", row.to_type, row.state)


def version_of(package: str) -> str | None:
    """The installed version of a package, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[tuple[str, list[Need]]]:
    for extra in EXTRAS:
        yield extra, needs(extra)


def _versions(found: Sequence[Need]) -> dict[str, str | None]:
    return {need.name: version_of(need.name) for need in found}


def _look_at(need: Need) -> Finding:
    version = version_of(need.name)
    return judge_package(need, version, "" if version is None else _trouble_with(need.module))


def _trouble_with(module: str) -> str:
    """What goes wrong when a module is imported; "" if nothing does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 a broken package may raise anything at all
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context libraries say nothing while they are loaded."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
