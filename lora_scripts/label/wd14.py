"""Tags by SmilingWolf's WD taggers (v1.4 to v3): danbooru's names for what a picture shows.

Pixels and thresholds are treated as by the taggers' own demo page
(https://huggingface.co/spaces/SmilingWolf/wd-tagger, app.py).
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_scripts.errors import user_error
from lora_scripts.label.settings import Caption, Settings
from lora_scripts.label.weights import TAGGER_MODEL, TAGGER_TAGS

THRESHOLD = 0.35
CHARACTER_THRESHOLD = 0.85
GENERAL, CHARACTER = 0, 4  # danbooru's numbers of categories; 9 is the rating, which is left out
# Faces, in which an underscore is a mouth.
KAOMOJI = frozenset((
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o",
    "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||",
))  # fmt: skip


@dataclass(frozen=True)
class Tag:
    """One number of the model's output: the tag it is the score of."""

    name: str
    category: int


def load(path: Path, settings: Settings, device: str) -> Caption:
    """A tagger from model.onnx and selected_tags.csv of a folder; captions are "tag, tag, …".

    Tags stand in the order of their scores, the highest first.

    Raises:
        UserError: onnxruntime is not installed or sees no card, or a file is not what it should be.
    """
    session = _session(path / TAGGER_MODEL, device)
    tags = read_tags(path / TAGGER_TAGS)
    given, scored = session.get_inputs()[0], session.get_outputs()[0]
    side = _side(path, given.shape)
    if scored.shape[-1] != len(tags):
        what = f"it has {len(tags):,} tags, the model beside it {scored.shape[-1]} scores"
        raise user_error(str(path / TAGGER_TAGS), f"{what}; fetch both files anew, from one place")
    one_by_one = given.shape[0] == 1

    def caption(pictures: Sequence[Image.Image]) -> list[str]:
        pixels_BHWC = np.stack([pixels(picture, side) for picture in pictures])
        groups = np.split(pixels_BHWC, len(pictures)) if one_by_one else [pixels_BHWC]
        scores_BT = [session.run([scored.name], {given.name: group})[0] for group in groups]
        return [chosen(scores_T, tags, settings) for scores_T in np.concatenate(scores_BT)]

    return caption


def pixels(picture: Image.Image, side: int) -> NDArray[np.float32]:
    """An RGB picture as the model wants it: in the middle of a white square, bicubic, BGR, 0–255.

    Returns:
        pixels_HWC of `side` × `side`, float32.
    """
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


def chosen(scores_T: NDArray[np.float32], tags: Sequence[Tag], settings: Settings) -> str:
    """The tags above their thresholds, the best first; of equal ones the first in the file."""
    least = {
        GENERAL: THRESHOLD if settings.threshold is None else settings.threshold,
        CHARACTER: CHARACTER_THRESHOLD
        if settings.character_threshold is None
        else settings.character_threshold,
    }
    passed = [
        (float(score), written(tag.name, settings))
        for score, tag in zip(scores_T, tags, strict=True)
        if tag.category in least and score > least[tag.category]
    ]
    return ", ".join(name for _, name in sorted(passed, key=lambda pair: -pair[0]))


def written(name: str, settings: Settings) -> str:
    """A tag's name as it stands in a caption."""
    if not settings.underscores and name not in KAOMOJI:
        name = name.replace("_", " ")
    if settings.escape_parentheses:
        name = name.replace("(", r"\(").replace(")", r"\)")
    return name


def read_tags(path: Path) -> list[Tag]:
    """The tags of selected_tags.csv, in the order of the model's output.

    Raises:
        UserError: A row cannot be read; the message names its line.
    """
    tags = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                tags.append(Tag(row["name"], int(row["category"])))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            what = f"a row should have a name and a category, a number ({error!r}); fetch it anew"
            raise user_error(f"{path} line {reader.line_num}", what) from None
    return tags


def _session(model: Path, device: str) -> Any:
    """The model in onnxruntime, on the card where there is one and its package is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        what = (
            "taggers run in onnxruntime, which is not installed: pip install onnxruntime (with an "
            "NVIDIA card onnxruntime-gpu instead)"
        )
        raise user_error("--captioner wd14", what)
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    with_card = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not with_card:
        what = (
            "found cuda, but this onnxruntime sees no CUDA device; pip install onnxruntime-gpu in "
            "place of onnxruntime, or use auto or cpu"
        )
        raise user_error("--device", what)
    providers = ["CUDAExecutionProvider"] if with_card and device != "cpu" else []
    try:
        return onnxruntime.InferenceSession(model, providers=[*providers, "CPUExecutionProvider"])
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
    ) as error:
        reason = str(error).splitlines()[0]
        raise user_error(
            str(model), f"onnxruntime cannot read it ({reason}); fetch it anew"
        ) from None


def _side(path: Path, shape: Sequence[int | str | None]) -> int:
    """Height and width in pixels of the pictures that the model takes."""
    match shape:
        case [_, int(height), int(width), 3] if height == width:
            return height
    what = (
        f"it takes inputs of the shape {list(shape)}; a WD tagger takes [pictures, side, side, 3]"
    )
    raise user_error(str(path / TAGGER_MODEL), what)
