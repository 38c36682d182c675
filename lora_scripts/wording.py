"""pydantic's findings in our words: what was found, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_UNION_TAG = re.compile(
    r"literal\[.*|list\[.*|bool|constrained-int"
)  # pydantic's name for a choice in a place
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def merged(findings: Iterable[Any]) -> list[dict[str, Any]]:
    """One finding a place: where several kinds of value are allowed, pydantic tells each alone.

    If a list stands there, what is wrong inside it says more than that other kinds are allowed.
    """
    by_place: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for finding in findings:
        parts = (p for p in finding["loc"] if not isinstance(p, str) or not _UNION_TAG.fullmatch(p))
        by_place.setdefault(tuple(parts), []).append(dict(finding))
    chosen = []
    for place, found in by_place.items():
        inside = any(other[: len(place)] == place for other in by_place if other != place)
        if inside and any(finding["loc"] != place for finding in found):
            continue
        ways = ", or ".join(dict.fromkeys(allowed(f).removeprefix("must be ") for f in found))
        union = {"type": "union", "ways": ways} if len(found) > 1 else {}
        chosen.append(found[0] | {"loc": place} | union)
    return chosen


def shown(value: Any) -> str:
    """What was found in a config, as a person would name it."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            text = CONTROL_CHARACTER.sub(lambda match: repr(match[0])[1:-1], value[:80])
            return f'the text "{text}"' if len(value) < 80 else f'the text "{text[:77]}…"'
        case list():
            return "a list"
        case dict():
            return "a map of keys"
        case _:
            return str(value)


def allowed(details: Any) -> str:
    """What may stand there instead, from one of pydantic's error details."""
    context = details.get("ctx", {})
    match details["type"]:
        case "union":
            return f"must be {details['ways']}"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return 'must be a text (quote it: "…")'
        case "path_type":
            return "must be a path"
        case "list_type" | "sequence_str" | "is_instance_of":
            return "must be a list"
        case "model_type" | "dict_type" | "model_attributes_type":
            text_too = "a text or " if details["loc"][0] == "sample_prompts" else ""
            return f"must be {text_too}a map of keys"
        case "literal_error":
            expected = context["expected"].replace("'", "")
            return f"must be one of {expected}" if " or " in expected else f"must be {expected}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "multiple_of":
            return f"must be a multiple of {context['multiple_of']}"
        case "string_too_short":
            return "must not be empty"
        case "too_short":
            return "must be a list with at least one entry"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "value_error":
            return str(context["error"])
        case "string_pattern_mismatch":
            return 'must not hold any of \\ / : * ? " < > |'
        case _:
            return str(details["msg"])
