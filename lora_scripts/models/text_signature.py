"""What a language model's `base_model` is, told from its files' names and small JSON files.

No tensor is read and no heavy library is imported, so that a wrong base model is answered at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_scripts.errors import user_error
from lora_scripts.models import gguf_header
from lora_scripts.models.header import check_headers
from lora_scripts.models.json_file import MOST_LAYERS, read_json, read_model_config

Layout = Literal["transformers", "gguf", "chatglm"]
TAKES = (
    "For task_type: text-generation name a transformers folder (config.json, tokenizer, "
    ".safetensors), a .gguf file or a hub id"
)
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What is fetched of a hub repository: no pickles, no weights of other programs.
# ChatGLM's two Python files are only read, for which way its positions are scaled.
WANTED_WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken",
                          "modeling_chatglm.py", "tokenization_chatglm.py")  # fmt: skip
WANTED = (*WANTED_WITHOUT_WEIGHTS, "*.safetensors")
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*.gguf")


@dataclass(frozen=True)
class TextSignature:
    """What a language model is.

    Attributes:
        path: The folder, or the .gguf file.
        layout: "chatglm" is the original layout of ChatGLM2, ChatGLM3 and GLM-4-9B.
        config: config.json as it stands; of a .gguf file its facts (`gguf_header`).
    """

    path: Path
    layout: Layout
    config: Mapping[str, Any]

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights, sorted by name."""
        if self.layout == "gguf":
            return [self.path]
        return sorted(self.path.glob("*.safetensors"))

    @property
    def own_code(self) -> bool:
        """Whether the model names Python code that comes with it."""
        return bool(self.config.get("auto_map"))


def read_text_signature(path: Path, *, with_weights: bool = True) -> TextSignature:
    """Recognise a language model on disk. Without `with_weights` they need not be there.

    Raises:
        UserError: Nothing is there, or what is there cannot be taken; the message names what was
            found and what is taken.
    """
    if not path.exists():
        raise user_error(str(path), f"nothing is there. {TAKES}")
    return _of_folder(path, with_weights) if path.is_dir() else _of_file(path)


def _of_file(path: Path) -> TextSignature:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != gguf_header.MAGIC:
        raise user_error(str(path), f"this is no GGUF file{_meant(path)}. {TAKES}")
    if importlib.util.find_spec("gguf") is None:
        what = "reading a .gguf file needs the gguf package: pip install gguf"
        raise user_error(str(path), what)
    facts = gguf_header.read_gguf_header(path).facts
    kind = facts.get("general.type", "model")
    if facts.get("split.count", 1) not in (0, 1):
        what = "this is one part of several; join them by llama.cpp's `llama-gguf-split --merge`"
    elif kind != "model":
        what = f"this .gguf file holds no whole model (its type is {kind!r})"
    elif "tokenizer.ggml.tokens#" not in facts:
        what = "this .gguf file holds no tokenizer"
    elif not all(_is_layer_count(n) for key, n in facts.items() if key.endswith(".block_count")):
        what = "it does not say how many layers it has, or more than any model; it is damaged"
    else:
        return TextSignature(path, "gguf", facts)
    raise user_error(str(path), what)


def _is_layer_count(value: gguf_header.Fact) -> bool:
    return isinstance(value, int) and 0 < value <= MOST_LAYERS


def _meant(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return ", or a download that was cut short"
    if (path.parent / "config.json").is_file():
        return f"; name the folder: {path.parent}"
    return ""


def _of_folder(path: Path, with_weights: bool) -> TextSignature:
    if (path / "model_index.json").is_file():
        what = "this is a diffusers folder, a model for images: set task_type: image-generation"
        raise user_error(str(path), what)
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise user_error(str(path), f"this is a LoRA, not a base model; its base is {base!r}")
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        advice = f"; name the file: {path / ggufs[0]}" if ggufs else ""
        raise user_error(str(path), f"this folder has no config.json{advice}. {TAKES}")
    config = read_model_config(path / "config.json")
    layout: Layout = "chatglm" if config.get("model_type") == "chatglm" else "transformers"
    if with_weights:
        _check_weights(path, layout)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        what = f"there is no tokenizer (none of {', '.join(_TOKENIZERS)}); fetch the folder whole"
        raise user_error(str(path), what)
    return TextSignature(path, layout, config)


def _check_weights(path: Path, layout: Layout) -> None:
    """Safe files only, and all of them whole."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        what = (
            f"there is only {pickled[0]}, a Python pickle, which can run any code and is never "
            "opened here; in a program you trust, load the folder with transformers and save it "
            "again by save_pretrained(…), which writes .safetensors"
            if pickled
            else "there are no .safetensors weights; fetch the folder whole"
        )
        raise user_error(str(path), what)
    has_index = (path / _INDEX).is_file()
    missing = missing_weights(path) if has_index or layout == "transformers" else []
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        what = f"there is no {', '.join(missing[:5])}{more}; fetch the folder whole"
        raise user_error(str(path), what)
    check_headers(files)


def missing_weights(path: Path) -> list[str]:
    """Files of weights that a transformers folder should have and has not.

    Raises:
        UserError: if their index names none.
    """
    index = path / _INDEX
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise user_error(str(index), "there is no weight_map in it; fetch the file again")
        if not all(isinstance(name, str) and Path(name).name == name for name in named.values()):
            what = "its weight_map names files outside the folder; fetch the folder from its source"
            raise user_error(str(index), what)
        files = {file.name for file in path.iterdir()}
        return sorted(set(named.values()) - files)
    if (path / "model.safetensors").is_file():
        return []
    return [f"model.safetensors (nor {_INDEX})"]
