"""What labels pictures: which captioners there are, where their weights lie, and how one is loaded.

A captioner is one file of this folder with `load(path, settings, device) -> Caption`; the `match`
in `load` below names them all.
"""

from __future__ import annotations

from pathlib import Path

from lora_scripts import collector
from lora_scripts.errors import UserError, user_error
from lora_scripts.label import weights
from lora_scripts.label.settings import Caption as Caption
from lora_scripts.label.settings import Settings as Settings
from lora_scripts.label.settings import misfits as misfits
from lora_scripts.models import hub

NAMES = ("blip", "blip2", "florence2", "vlm", "wd14")
DEFAULT_MODELS = {
    "blip": "Salesforce/blip-image-captioning-base",
    "blip2": "Salesforce/blip2-opt-2.7b",
    "florence2": "florence-community/Florence-2-base",
    "vlm": "Qwen/Qwen3-VL-2B-Instruct",
    "wd14": "SmilingWolf/wd-swinv2-tagger-v3",
}
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[2] / "assets" / "demo" / "captioner"


def find(name: str, model: str | None) -> Path:
    """The folder of a captioner's weights: a folder here, the demo, or fetched from the hub.

    Args:
        name: One of `NAMES`.
        model: A folder, a hub id, `demo`, or None for the captioner's default.

    Raises:
        UserError: There are no weights, or they are of another captioner; the message says what to
            download and where to put it.
    """
    default = DEFAULT_MODELS[name]
    chosen = default if model is None else model
    hub_id = chosen if hub.HUB_ID.fullmatch(chosen) else default
    if chosen == DEMO:
        path = _demo()
    else:
        try:
            here = hub.local_path(chosen)
            path = here or hub.fetch(
                chosen, weights.wanted(name), weights.UNWANTED, weights.revision(chosen)
            )
        except UserError as error:
            raise weights.with_advice(error, hub_id) from None
    weights.check(name, path, hub_id, default)
    return path


def _demo() -> Path:
    if not DEMO_FOLDER.is_dir():
        what = f"{DEMO_FOLDER} is not there: the demo comes with the source tree, clone it by git"
        raise user_error("--model demo", what)
    return DEMO_FOLDER


def recognise(path: Path) -> str:
    """Which captioner a folder of weights is for, told from its small files.

    Raises:
        UserError: It is for none of them.
    """
    return weights.kind(path)


def load(name: str, path: Path, settings: Settings, device: str) -> Caption:
    """The captioner of this name with the weights of this folder (see `find`).

    Args:
        name: One of `NAMES`.
        path: The folder.
        settings: See `Settings`; `misfits` says which of them would do nothing.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: The device or a package is missing, or a setting is impossible for the model.
    """
    with collector.importing():
        from lora_scripts.label import blip, blip2, florence2, vlm, wd14

    match name:
        case "blip":
            return blip.load(path, settings, device)
        case "blip2":
            return blip2.load(path, settings, device)
        case "florence2":
            return florence2.load(path, settings, device)
        case "vlm":
            return vlm.load(path, settings, device)
        case "wd14":
            return wd14.load(path, settings, device)
        case _:
            raise user_error("--captioner", f"found {name!r}; there are {', '.join(NAMES)}")
