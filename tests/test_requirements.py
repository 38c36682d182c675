"""The hashed requirements say what constraints.txt says, and nothing of where they were made."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Name -> version of each requirement."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonical(name): version for name, version in found}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_all_but_torch_is_pinned_to_the_same_version() -> None:
    constraints = pins(read("constraints.txt"))
    assert constraints.pop("torch")
    assert pins(read("requirements/dev.txt")) == constraints
    run = pins(read("requirements/run.txt"))
    assert run.items() < constraints.items()
    project = tomllib.loads(read("pyproject.toml"))["project"]
    needed = {canonical(re.split(r"[<>=\[]", text)[0]) for text in project["dependencies"]}
    assert len(needed) > 10 and needed - {"torch"} <= run.keys()


def test_every_requirement_has_hashes_and_no_address() -> None:
    for name in ("requirements/run.txt", "requirements/dev.txt"):
        text = read(name)
        blocks = re.split(r"\n(?=\w)", text)[1:]
        assert len(blocks) == len(pins(text))
        for block in blocks:
            assert len(HASH.findall(block)) >= 1, block
        assert not re.search(r"https?:|file:|^--|\+cpu", text, re.MULTILINE)
