"""The folders of captioners' weights: which captioner one is for, and whether it is whole.

Only names and small JSON files are read, and the headers of the weights, so that a wrong or a
half-fetched folder is answered at once.
"""

from __future__ import annotations

from pathlib import Path

from lora_scripts.errors import Problem, UserError, user_error
from lora_scripts.models.header import check_headers
from lora_scripts.models.json_file import read_json
from lora_scripts.models.text_signature import missing_weights

TAGGER_MODEL = "model.onnx"
TAGGER_TAGS = "selected_tags.csv"
_TRANSFORMERS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
# Copies in other formats and precisions beside the weights that are read.
UNWANTED = ("onnx/*", "original/*", "openvino/*", "*.fp16.*", "*.bf16.*", "consolidated*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_KINDS = {"blip": "blip", "blip-2": "blip2", "florence2": "florence2"}
# The branch of the hub's own converter, of a model whose main branch has a pickle only.
_CONVERTED = {"Salesforce/blip-image-captioning-base": "refs/pr/50"}
_POINTER = b"version https://git-lfs"


def wanted(name: str) -> tuple[str, ...]:
    """Patterns of the files that a captioner's folder on the hub is fetched for: no pickles."""
    return (TAGGER_MODEL, TAGGER_TAGS) if name == "wd14" else _TRANSFORMERS


def revision(hub_id: str) -> str | None:
    """The branch on the hub that has .safetensors; None: the main one."""
    return _CONVERTED.get(hub_id)


def with_advice(error: UserError, hub_id: str) -> UserError:
    """The same problems, each with how to come by the weights on a machine that reaches the hub."""
    folder = f"models/{hub_id.split('/')[-1]}"
    branch = revision(hub_id)
    chosen = hub_id if branch is None else f"{hub_id} --revision {branch}"
    advice = (
        f"Download the weights where there is a network: `hf download {chosen} --local-dir "
        f"{folder}`; put that folder anywhere on this machine and name it: --model {folder}"
    )
    if branch is not None:
        advice += (
            ". Without --revision the hub gives a pickle; --model "
            "Salesforce/blip-image-captioning-large has .safetensors at once"
        )
    return UserError([Problem(p.where, f"{p.what}. {advice}") for p in error.problems])


def kind(path: Path) -> str:
    """Which captioner a folder of weights is for.

    Raises:
        UserError: It is for none, or it is not there.
    """
    if not path.is_dir():
        what = "name the folder that it lies in" if path.exists() else "there is no such folder"
        raise user_error(str(path), what)
    if (path / TAGGER_TAGS).is_file() or (path / TAGGER_MODEL).is_file():
        return "wd14"
    if not (path / "config.json").is_file():
        what = f"there is neither config.json nor {TAGGER_MODEL}; no captioner's weights look so"
        raise user_error(str(path), what)
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type in _KINDS:
        return _KINDS[str(model_type)]
    if model_type is not None and any(key.startswith("vision") for key in config):
        return "vlm"
    raise user_error(
        str(path),
        f"its config.json names the model type {model_type!r}, which describes no pictures",
    )


def check(name: str, path: Path, hub_id: str, default: str) -> None:
    """See that a folder holds all that a captioner needs.

    Args:
        name: The captioner.
        path: The folder.
        hub_id: What to download where the folder is not whole.
        default: What to download where it is of another kind.

    Raises:
        UserError: It is not there, not whole, or of another captioner.
    """
    try:
        _check_kind(name, path)
    except UserError as error:
        raise with_advice(error, default) from None
    try:
        if name == "wd14":
            _check_tagger(path)
        else:
            _check_transformers(path)
    except UserError as error:
        raise with_advice(error, hub_id) from None


def _check_kind(name: str, path: Path) -> None:
    found = kind(path)
    if found != name:
        what = f"these weights are for --captioner {found}, not {name}; change one of the two"
        raise user_error(str(path), what)
    if name == "florence2" and read_json(path / "config.json").get("auto_map"):
        what = (
            "these are Microsoft's own files of Florence-2, which need Microsoft's code; the same "
            "weights for transformers' own class are florence-community/Florence-2-base and "
            "florence-community/Florence-2-large"
        )
        raise user_error(str(path), what)


def _check_tagger(path: Path) -> None:
    for file in (path / TAGGER_MODEL, path / TAGGER_TAGS):
        if not file.is_file():
            raise user_error(
                str(path), f"there is no {file.name}; both files of the tagger belong there"
            )
        with file.open("rb") as stream:
            first = stream.read(len(_POINTER))
        if first == _POINTER or not first:
            what = (
                "the file is empty"
                if not first
                else "this is a Git LFS pointer, not the file itself"
            )
            raise user_error(str(file), what)


def _check_transformers(path: Path) -> None:
    _check_safetensors(path)
    if not any(
        (path / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        what = (
            "there is neither preprocessor_config.json nor processor_config.json beside the weights"
        )
        raise user_error(str(path), what)
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((path / name).is_file() for name in tokenizers):
        raise user_error(str(path), f"there is no tokenizer (none of {', '.join(tokenizers)})")


def _check_safetensors(path: Path) -> None:
    """The weights are there, all of them whole, and not only as pickles."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        what = (
            f"there is only {pickled[0]}; pickles can run any code and are never opened here, only "
            ".safetensors files"
            if pickled
            else "there are no .safetensors weights (pickles are neither fetched nor opened)"
        )
        raise user_error(str(path), what)
    missing = missing_weights(path)
    if missing:
        raise user_error(str(path), f"there is no {', '.join(missing[:5])}")
    check_headers(files)
