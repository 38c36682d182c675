"""A PEFT directory looked at before PEFT's own reader gets it: what a stranger can write into one.

PEFT trusts its adapter_config.json: it imports a module that is named there (megatron_core), makes
matrices of the rank that is named there before any is read, and matches names by the regular
expressions that stand there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_scripts.errors import user_error
from lora_scripts.models.header import TensorInfo, read_header
from lora_scripts.models.json_file import read_json
from lora_scripts.run_files import ADAPTER_NAME

CONFIG_NAME = "adapter_config.json"
# What a PEFT adapter may use beyond a scale, two matrices and magnitudes. Refused where set.
_SPECIAL = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
            "megatron_config", "arrow_config", "alora_invocation_tokens", "lora_bias")  # fmt: skip
_LONGEST_PATTERN = 1000
_MOST_REPEATS = 3  # of *, + and {} in a pattern: with more, matching a name may take hours


def check(folder: Path) -> None:
    """See that a directory holds a LoRA, rsLoRA or DoRA, whole, with nothing but that.

    Raises:
        UserError: saying what is wrong.
    """
    config = folder / CONFIG_NAME
    values = read_json(config)
    what = _wrong(values)
    if what is not None:
        raise user_error(str(config), what)
    header = read_header(folder / ADAPTER_NAME)
    if (damage := _damage(header, values)) is not None:
        raise user_error(str(folder / ADAPTER_NAME), damage)


def _wrong(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the settings."""
    if values.get("peft_type") != "LORA":
        return f"its peft_type is {values.get('peft_type')!r}; only LORA is read"
    if special := [name for name in _SPECIAL if values.get(name)]:
        return f"uses {', '.join(special)}, which is not LoRA, rsLoRA or DoRA"
    if not _is_rank(values.get("r", 8)):
        return f"r: found {values.get('r')!r}, must be a whole number of at least 1"
    if not _is_alpha(values.get("lora_alpha", 8)):
        return f"lora_alpha: found {values.get('lora_alpha')!r}, must be a number"
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            return f"{key}: must be names of layers with a number each"
        if any(not _is_harmless(pattern) for pattern in patterns):
            return _harmful(key)
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if (what := _wrong_names(key, values.get(key))) is not None:
            return what
    return None


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e9 and math.isfinite(value)


def _wrong_names(key: str, value: object) -> str | None:
    """A list of names, one name or pattern, or nothing."""
    names = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(name, str) for name in names):
        return f"{key}: must be a list of names of layers"
    return None if all(map(_is_harmless, names)) else _harmful(key)


def _is_harmless(pattern: str) -> bool:
    """A regular expression that is matched in no time, whatever it is matched with."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    repeated_group = re.search(r"(?<!\\)\)[*+{?]", pattern)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(pattern) <= _LONGEST_PATTERN and repeats <= _MOST_REPEATS and not repeated_group


def _harmful(key: str) -> str:
    return (
        f"{key}: holds a pattern that is damaged or could take hours to match; write the names "
        "of the layers out"
    )


def _damage(header: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> str | None:
    """What is wrong with the matrices, by their shapes alone."""
    ranks = set()
    for name, info in header.items():
        stem, is_down, _ = name.partition(".lora_A.weight")
        if not is_down:
            continue
        other = header.get(f"{stem}.lora_B.weight")
        if other is None:
            return f"lacks the second matrix of {stem}"
        fits = len(info.shape) == len(other.shape) == 2 and info.shape[0] == other.shape[1] > 0
        if not fits:
            return f"the matrices of {stem} do not fit each other: {info.shape}, {other.shape}"
        ranks.add(info.shape[0])
    if not ranks:
        return "holds no matrices of a LoRA"
    named = {values.get("r", 8), *(values.get("rank_pattern") or {}).values()}
    if max(named) > max(ranks):
        return f"its largest rank is {max(ranks)}, {CONFIG_NAME} says {max(named)}"
    return None
