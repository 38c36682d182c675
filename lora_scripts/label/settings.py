"""How captions are made: settings that all captioners share the type of, and which act where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from lora_scripts.errors import Problem

# Pictures without alpha, in RGB -> one caption each, in the same order. A caption depends on its
# picture alone, not on the pictures beside it.
Caption = Callable[[Sequence[Image.Image]], list[str]]

SEED = 42


@dataclass(frozen=True)
class Settings:
    """How captions are made. None is the captioner's own default.

    Attributes:
        max_new_tokens: How long a caption may get, in tokens.
        num_beams: Beams of the search for the likeliest caption; 1 is greedy.
        temperature: Captions are drawn at random, the wilder the higher; None and 0 are not random.
        top_p: Draw only among the likeliest tokens that together have this probability.
        seed: Of the drawing. The draw of a picture follows from it and the picture's pixels.
        prompt: blip: how captions begin. blip2: a question. florence2: a task such as <CAPTION>.
            vlm: what the model is asked to do.
        threshold: wd14: the least score of a tag.
        character_threshold: wd14: the least score of a tag that names a character.
        underscores: wd14: keep `long_hair` as it is, and do not write `long hair`.
        escape_parentheses: wd14: write `\\(` and `\\)`, as A1111 and ComfyUI want them in a prompt.
    """

    max_new_tokens: int | None = None
    num_beams: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = SEED
    prompt: str | None = None
    threshold: float | None = None
    character_threshold: float | None = None
    underscores: bool = False
    escape_parentheses: bool = False


_GENERATION = frozenset(("max_new_tokens", "num_beams", "temperature", "top_p", "seed", "prompt"))
_TAGS = frozenset(("threshold", "character_threshold", "underscores", "escape_parentheses"))


def misfits(name: str, settings: Settings) -> list[Problem]:
    """The settings that would do nothing for this captioner or beside one another, as options."""
    used = _TAGS if name == "wd14" else _GENERATION
    plain = Settings()
    changed = [key for key, value in vars(settings).items() if value != vars(plain)[key]]
    problems = [
        Problem(
            _option(key),
            f"does nothing for --captioner {name}; leave it out. What acts there: "
            f"{', '.join(_option(other) for other in vars(plain) if other in used)}",
        )
        for key in changed
        if key not in used
    ]
    if not problems:
        problems += _beside_one_another(settings, changed)
    return problems


def _beside_one_another(settings: Settings, changed: Sequence[str]) -> list[Problem]:
    problems = []
    if not settings.temperature:
        problems += [
            Problem(
                _option(key),
                f"does nothing without --temperature above 0; add it, or leave {_option(key)} out",
            )
            for key in ("top_p", "seed")
            if key in changed
        ]
    elif settings.num_beams is not None and settings.num_beams > 1:
        what = (
            "beams look for the likeliest caption, --temperature draws one at random; take one of "
            "the two"
        )
        problems.append(Problem("--num-beams", what))
    return problems


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")
