"""The parts that keys are made of: types with their bounds, and the frozen section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lora_scripts import file_names, wording


def usable_path(path: str) -> str:
    """No text that is a path by accident, or that a later step would stumble over."""
    if not path.strip():
        raise ValueError("must not be empty")
    if wording.CONTROL_CHARACTER.search(path):
        raise ValueError(
            "must be a path without control characters; in double quotes a backslash is an "
            "escape: write / or use single quotes"
        )
    return path


def usable_name(name: str) -> str:
    """No name that a system takes for something else: a device, say."""
    if trouble := file_names.trouble(name):
        raise ValueError(trouble)
    return name


def _in_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a path; {error}") from None


def prompt_from_text(value: Any) -> Any:
    """A prompt given as a text alone is one without options."""
    return {"prompt": value} if isinstance(value, str) else value


PathField = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(lambda value: usable_path(value) if isinstance(value, str) else value),
    AfterValidator(_in_home),
]
ModelField = Annotated[str, AfterValidator(usable_path)]  # a hub id or a path
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
BatchField = Literal["auto"] | PositiveInt
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0, le=1000)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
AutoOrBool = Literal["auto"] | bool


class Section(BaseModel):
    """A part of the config: frozen, exact types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
