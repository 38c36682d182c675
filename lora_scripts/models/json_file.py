"""The small JSON files of a model's folder: config.json and the like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_scripts.errors import user_error

MOST_LAYERS = 2_000  # layers, blocks or experts; the largest models have a few hundred
_COUNTS = re.compile(r"(?:num|n)_\w*(?:layer|block|expert)s?|layers_per_block|\w+_layers_per_block")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: The file is missing, is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise user_error(str(path), "the file is missing; fetch the folder whole") from None
    except (ValueError, RecursionError, OSError) as error:
        raise user_error(str(path), f"the file cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise user_error(str(path), "the file should hold one JSON object")
    return content


def read_model_config(path: Path) -> dict[str, Any]:
    """A model's config.json, which says how many layers are made before any weight is read.

    Raises:
        UserError: as `read_json`; or if it says more than any model has, or names code to fetch.
    """
    config = read_json(path)
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key, "")):
            what = f"{key}: found {config[key]}, compiled code from the hub, which is never fetched"
            raise user_error(str(path), what)
    for key, count in _counts(config):
        if count > MOST_LAYERS:
            what = f"{key}: found {count:,}; no model has so many, the file is damaged"
            raise user_error(str(path), what)
    return config


def _counts(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a config that counts parts of a model."""
    match value:
        case dict():
            for name, inner in value.items():
                yield from _counts(inner, name)
        case list():
            for inner in value:
                yield from _counts(inner, key)
        case int() | float() if _COUNTS.fullmatch(key):
            yield key, value
