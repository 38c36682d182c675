"""What editors and readers learn of the config, written from its classes: schema and key list."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

from lora_scripts.config import schema
from lora_scripts.schema import (
    CommonConfig,
    ImageConfig,
    ImageDataset,
    SamplePrompt,
    TextConfig,
    TextDataset,
    TextPrompt,
)

# keys with a table of their own in each task: they mean something else there
_OWN = {"task_type", "base_model", "datasets", "validation_split", "lora_alpha"}
_SHARED = frozenset(CommonConfig.model_fields) - _OWN

INTRODUCTION = """\
# Every key of a config

Written by `make schema` from `lora_scripts/schema/`; a test keeps it in step. Paths are relative
to the folder where the command is typed. Any key can be given on the command line for one run:
`python train.py --config x.yaml lora_rank=32`. Text is read by YAML 1.2: `true` and `false` are the
only truth values (`no` is a text), `2e-4` is a number.
"""


def json_schema() -> str:
    """The text of configs/schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def key_list() -> str:
    """The text of docs/config.md."""
    parts = [
        INTRODUCTION,
        _common_table(),
        _table("Images: `task_type: image-generation`", ImageConfig, leaving=_SHARED),
        _table("An entry of `datasets`, images", ImageDataset),
        _table("An entry of `sample_prompts` (or just the prompt as a text), images", SamplePrompt),
        _table("Texts: `task_type: text-generation`", TextConfig, leaving=_SHARED),
        _table("An entry of `datasets`, texts", TextDataset),
        _table("An entry of `sample_prompts` (or just the prompt as a text), texts", TextPrompt),
    ]
    return "\n".join(parts)


def _common_table() -> str:
    """The keys that both tasks have; where their defaults differ, both."""
    image, text = (kind.model_json_schema()["properties"] for kind in (ImageConfig, TextConfig))
    required = set(CommonConfig.model_json_schema()["required"])
    common = CommonConfig.model_json_schema()["properties"]
    rows = []
    for name, properties in common.items():
        if name not in _SHARED:
            continue
        defaults = [_default(kind[name]) for kind in (image, text)]
        default = " / ".join(dict.fromkeys(defaults))
        rows.append(
            f"| `{name}` | {_allowed(properties)} | "
            f"{'**required**' if name in required else default} | {properties['description']} |"
        )
    intro = "Where two defaults stand, the first is that of images, the second that of texts.\n"
    head = ["## Both tasks\n", intro, "| key | takes | default | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _table(title: str, section: type[BaseModel], leaving: Collection[str] = ()) -> str:
    required = set(section.model_json_schema().get("required", ()))
    rows = [
        f"| `{name}` | {_allowed(properties)} | "
        f"{'**required**' if name in required else _default(properties)} | "
        f"{properties['description']} |"
        for name, properties in section.model_json_schema()["properties"].items()
        if name not in leaving
    ]
    return "\n".join(
        [f"## {title}\n", "| key | takes | default | |", "|---|---|---|---|", *rows, ""]
    )


def _default(properties: dict[str, Any]) -> str:
    if "default" not in properties:
        return "follows"
    return f"`{json.dumps(properties['default'], ensure_ascii=False)}`"


def _allowed(properties: dict[str, Any]) -> str:
    """Type and bounds in a few words."""
    if "anyOf" in properties:
        return " or ".join(_allowed(option) for option in properties["anyOf"])
    if "enum" in properties:
        return ", ".join(f"`{value}`" for value in properties["enum"])
    if "const" in properties:
        return f"`{properties['const']}`"
    if "$ref" in properties:
        return "a map, see below"
    if properties.get("format") == "path":
        return "path"
    if properties["type"] == "array":
        return f"list of {_allowed(properties['items'])}"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    bounds = [
        f"{sign} {properties[key]:g}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in properties and abs(properties[key]) < 1e9
    ]
    name = {"string": "text", "null": "null", **words}[properties["type"]]
    return " ".join([name, ", ".join(bounds)]).strip()
