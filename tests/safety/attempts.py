"""What the tests of safety share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_scripts.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "lora_scripts").rglob("*.py"))


def refused(read: Callable[[], Any]) -> str:
    """What the user is told instead."""
    with pytest.raises(UserError) as caught:
        read()
    return str(caught.value)


def picture(folder: Path, name: str = "a.png") -> Path:
    """A folder with a picture in it."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder
