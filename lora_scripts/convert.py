"""A finished text LoRA in other forms: merged into its base, for llama.cpp and Ollama, and so on.

Nothing is overwritten, and everything that is written is read back and compared.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_scripts import adapters
from lora_scripts.adapters import Adapter
from lora_scripts.errors import WorkError, user_error

logger = logging.getLogger(__name__)

Form = Literal["merged", "base", "gguf", "chatglm"]
SAME = 1e-5  # of the largest logit: two readings of the same weights


@dataclass(frozen=True)
class ConvertRequest:
    """What to write. `output`: the folder or file; by default beside the first LoRA."""

    form: Form
    loras: Sequence[Adapter]
    base: str | None
    output: Path | None
    device: str


def run(request: ConvertRequest) -> Path:
    """Write the form asked for. Returns its path.

    Raises:
        UserError: if something is not there, does not fit, or cannot be expressed in that form.
        WorkError: if what was written does not read back as it should.
    """
    adapters.check(request.loras)
    if not request.loras:
        raise user_error("--lora", "name the folder of a finished run")
    if request.form != "merged" and len(request.loras) > 1:
        raise user_error("--lora", "give one; only --merge takes several")
    base = adapters.base_of(request.loras, request.base)
    output = request.output or _usual(request)
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise user_error(str(output), "is there already; name another place with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    from lora_scripts.logs import quiet_libraries

    quiet_libraries()
    match request.form:
        case "merged":
            _merge(request, base, output)
        case "base":
            _write_base(request, base, output)
        case "gguf":
            _write_gguf(request.loras[0], base, output)
        case "chatglm":
            _write_original_names(request.loras[0], base, output)
    logger.info("Written: %s", output)
    return output


def _usual(request: ConvertRequest) -> Path:
    folder = request.loras[0].path
    name = f"{folder.resolve().name}.gguf" if request.form == "gguf" else request.form
    return folder / name


def _merge(request: ConvertRequest, base: str, output: Path) -> None:
    """One transformers directory: W + scale * alpha / rank * up @ down in every adapted layer."""
    from lora_scripts import device
    from lora_scripts.models import causal_lm, lora
    from lora_scripts.tasks import build

    compute = device.choose(request.device, "no")
    found = build.find_text_base(base)
    loaded = causal_lm.load(found, compute, own_dtype=True)
    folders = [(each.path, each.scale) for each in request.loras]
    adapted = lora.with_adapters(loaded.model, folders)
    expected = causal_lm.probe(adapted)
    merged = lora.merge(adapted)
    causal_lm.save(merged, _tokenizer(request.loras, loaded.tokenizer), output)
    dtype = merged.dtype
    del adapted, merged, loaded
    gc.collect()
    written = causal_lm.load(build.find_text_base(str(output)), compute, own_dtype=True)
    difference = (causal_lm.probe(written.model) - expected).abs().max().item()
    largest = expected.abs().max().item()
    logger.info(
        "Logits of the merged model and of base + LoRA differ by at most %.3g (largest logit %.3g; "
        "the merged weights are rounded to %s)", difference, largest, dtype,
    )  # fmt: skip
    if not difference <= 0.1 * largest:
        raise WorkError(f"{output}: the merged model does not give the logits of base and LoRA")


def _write_base(request: ConvertRequest, base: str, output: Path) -> None:
    """The base as a transformers directory, named by the adapter from then on."""
    import torch

    from lora_scripts.device import Compute
    from lora_scripts.models import causal_lm, lora
    from lora_scripts.tasks import build

    found = build.find_text_base(base)
    if found.layout == "transformers":
        raise user_error(base, "is a transformers folder already; nothing needs to be converted")
    compute = Compute(torch.device("cpu"), "no")
    loaded = causal_lm.load(found, compute, own_dtype=True)
    expected = causal_lm.probe(loaded.model)
    causal_lm.save(loaded.model, _tokenizer(request.loras, loaded.tokenizer), output)
    del loaded
    gc.collect()
    written = causal_lm.load(build.find_text_base(str(output)), compute, own_dtype=True)
    difference = (causal_lm.probe(written.model) - expected).abs().max().item()
    if not difference <= SAME * expected.abs().max().item():
        raise WorkError(f"{output}: read back it differs from {base} by {difference:.3g}")
    folder = request.loras[0].path
    lora.name_base(folder, str(output))
    logger.info("%s names it as its base now", folder / adapters.CONFIG_NAME)


def _write_gguf(adapter: Adapter, base: str, output: Path) -> None:
    """llama.cpp's adapter file and a Modelfile for Ollama beside it."""
    import torch

    from lora_scripts.errors import UserError
    from lora_scripts.export import gguf_adapter, modelfile
    from lora_scripts.files import write_text
    from lora_scripts.models import causal_lm, lora
    from lora_scripts.tasks import build

    found = build.find_text_base(base)
    layers = lora.read_peft(adapter.path, adapter.scale)
    config = causal_lm.load_config(found)
    gguf_adapter.write(output, layers, config, dtype=torch.float16, name=output.stem)
    tokenizer = _tokenizer([adapter], None) or causal_lm.load_tokenizer(found)
    path = output.with_name("Modelfile")
    try:
        text = modelfile.modelfile(
            tokenizer, base=base, adapter=output.name, stops=_stops(tokenizer)
        )
    except UserError as error:
        logger.warning("No Modelfile for Ollama: %s", error)
        return
    write_text(path, text)
    logger.info("For Ollama: ollama create %s -f %s", output.stem, path)


def _write_original_names(adapter: Adapter, base: str, output: Path) -> None:
    """A PEFT directory whose layers have the names of ChatGLM's own code."""
    from lora_scripts.models import chatglm, lora
    from lora_scripts.tasks import build

    found = build.find_text_base(base)
    if found.layout != "chatglm":
        raise user_error(base, "is not in ChatGLM's original layout, so there are no other names")
    layers = lora.read_peft(adapter.path, adapter.scale)
    lora.write_peft(output, chatglm.original_names(layers, found.config), base)


def _tokenizer(loras: Sequence[Adapter], own: Any) -> Any:
    """The tokenizer that was trained with, its template included; else the base's."""
    from lora_scripts.models import causal_lm

    folder = adapters.tokenizer_folder(loras)
    return own if folder is None else causal_lm.read_tokenizer(folder)


def _stops(tokenizer: Any) -> list[str]:
    from lora_scripts.data.chat import ChatFormat

    return [str(token) for token in tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).stop_ids)]
