"""The small JSON files of a model's folder: config.json and the like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_scripts.errors import user_error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: The file is missing, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise user_error(str(path), "the file is missing; fetch the folder whole") from None
    except (ValueError, OSError) as error:
        raise user_error(str(path), f"the file cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise user_error(str(path), "the file should hold one JSON object")
    return content
