"""A finished text LoRA in other forms: merged into its base, for llama.cpp and Ollama, and so on.

Nothing is overwritten, and everything that is written is read back and compared. A folder has its
name only when it is whole.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_scripts import adapters
from lora_scripts.adapters import Adapter
from lora_scripts.errors import Problem, UserError, WorkError, user_error
from lora_scripts.logs import quiet_libraries

if TYPE_CHECKING:
    import torch

    from lora_scripts.device import Compute
    from lora_scripts.models.text_signature import TextSignature

logger = logging.getLogger(__name__)

Form = Literal["merged", "base", "gguf", "chatglm"]
FORMS: tuple[Form, ...] = get_args(Form)
MODELFILE = "Modelfile"
SAME = 1e-5  # of the largest logit: two readings of the same weights
ROUNDED = 12  # units of the last place: what rounding merged weights may do to the largest logit
# by layout: what is to be known of the base model in llama.cpp and Ollama
ADVICE = {
    "transformers": "Ollama reads such folders of some models only, a .gguf file of the same model "
    "always.",
    "chatglm": "Ollama does not read such folders: put a .gguf file there, made of the folder that "
    "`lora-scripts export --base` writes. One that was made of the original files holds query, key "
    "and value as one tensor, which this adapter does not fit.",
}


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
    if request.form != "merged" and len(request.loras) > 1:
        raise user_error("--lora", "give one; only --merge takes several")
    output = request.output or _usual(request)
    _check_free(request.form, output)
    base, found = adapters.find_base(request.loras, request.base)
    quiet_libraries()
    match request.form:
        case "merged":
            _merge(request, found, output)
        case "base":
            _write_base(request, base, found, output)
        case "gguf":
            _write_gguf(request.loras[0], base, found, output)
        case "chatglm":
            _write_original_names(request.loras[0], base, found, output)
    return output


def _usual(request: ConvertRequest) -> Path:
    folder = request.loras[0].path
    if request.form == "gguf":
        return folder / "gguf" / f"{folder.resolve().name}.gguf"
    return folder / request.form


def _check_free(form: Form, output: Path) -> None:
    """Nothing may be where something is to be written."""
    places = [output, output.with_name(MODELFILE)] if form == "gguf" else [output]
    taken = [place for place in places if place.is_file() or _holds_something(place)]
    what = "is there already; name another place with --output, or move it away"
    if taken:
        raise UserError([Problem(str(place), what) for place in taken])
    if form == "gguf" and output.suffix.lower() != ".gguf":
        raise user_error(f"--output {output}", "must be the name of a .gguf file")


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` if all goes well and is removed if not."""
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.is_dir():
            output.rmdir()  # it is empty
        temporary.replace(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _merge(request: ConvertRequest, found: TextSignature, output: Path) -> None:
    """One transformers directory: W + scale * alpha / rank * up @ down in every adapted layer."""
    import torch

    from lora_scripts import device
    from lora_scripts.models import causal_lm, lora

    compute = device.choose(request.device, "no")
    loaded = causal_lm.load(found, compute, own_dtype=True)
    folders = [(each.path, each.scale) for each in request.loras]
    adapted = lora.with_adapters(loaded.model, folders)
    expected = causal_lm.probe(adapted)
    merged = lora.merge(adapted)
    tokenizer = _tokenizer(request.loras, loaded.tokenizer)
    dtype = merged.dtype
    with _new_folder(output) as folder:
        causal_lm.save(merged, tokenizer, folder)
        del adapted, merged, loaded
        gc.collect()
        difference = _difference(folder, compute, expected)
        largest = expected.abs().max().item()
        logger.info(
            "Logits of the merged model, read back, and of base with LoRA: largest difference "
            "%.2g, largest logit %.2g (the merged weights are rounded to %s)",
            difference, largest, str(dtype).removeprefix("torch."),
        )  # fmt: skip
        if not difference <= max(1e-3, ROUNDED * torch.finfo(dtype).eps) * largest:
            raise WorkError(
                f"{output}: the merged model does not give the logits of base and LoRA (they "
                f"differ by {difference:.2g}); it is not kept"
            )
    logger.info("Written: %s, a model as transformers, vLLM and others load it", output)


def _write_base(request: ConvertRequest, base: str, found: TextSignature, output: Path) -> None:
    """The base as a transformers directory, named by the adapter from then on."""
    import torch

    from lora_scripts.device import Compute
    from lora_scripts.models import causal_lm, lora

    if found.layout == "transformers":
        raise user_error(base, "is a transformers folder already; nothing needs to be converted")
    compute = Compute(torch.device("cpu"), "no")
    loaded = causal_lm.load(found, compute, own_dtype=True)
    expected = causal_lm.probe(loaded.model)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    with _new_folder(output) as written:
        causal_lm.save(loaded.model, _tokenizer(request.loras, loaded.tokenizer), written)
        del loaded
        gc.collect()
        difference = _difference(written, compute, expected)
        if not difference <= SAME * expected.abs().max().item():
            raise WorkError(f"{output}: read back it differs from {base} by {difference:.3g}")
    logger.info("Written: %s, the base model in %s", output, dtype)
    folder = request.loras[0].path
    lora.name_base(folder, str(output))
    logger.info("%s names it as its base model now", folder / adapters.CONFIG_NAME)


def _difference(folder: Path, compute: Compute, expected: torch.Tensor) -> float:
    """The largest difference of a written model's logits from `expected`."""
    from lora_scripts.models import causal_lm
    from lora_scripts.models.text_signature import read_text_signature

    written = causal_lm.load(read_text_signature(folder), compute, own_dtype=True)
    return (causal_lm.probe(written.model) - expected).abs().max().item()


def _write_gguf(adapter: Adapter, base: str, found: TextSignature, output: Path) -> None:
    """llama.cpp's adapter file and a Modelfile for Ollama beside it."""
    import torch

    from lora_scripts.export import gguf_adapter, modelfile
    from lora_scripts.files import write_text
    from lora_scripts.models import causal_lm, lora

    layers = lora.read_peft(adapter.path, adapter.scale)
    config = causal_lm.load_config(found)
    tokenizer = _tokenizer([adapter], None) or causal_lm.load_tokenizer(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    gguf_adapter.write(output, layers, config, dtype=torch.float16, name=output.stem)
    base_file = base if found.layout == "gguf" else "BASE.gguf"
    logger.info("Written: %s, for llama.cpp: llama-cli -m %s --lora %s", output, base_file, output)
    try:
        text = modelfile.modelfile(
            tokenizer,
            base=str(found.path.resolve()),
            adapter=output.name,
            stops=_stops(tokenizer),
            system=adapters.system_prompt([adapter]),
        )
    except UserError as error:
        logger.warning("No Modelfile for Ollama: %s", error)
        return
    path = output.with_name(MODELFILE)
    write_text(path, text)
    logger.info("Written: %s, for Ollama: ollama create %s -f %s", path, output.stem, path)
    if found.layout in ADVICE:
        logger.info("Its FROM names %s. %s", base, ADVICE[found.layout])


def _write_original_names(adapter: Adapter, base: str, found: TextSignature, output: Path) -> None:
    """A PEFT directory whose layers have the names of ChatGLM's own code."""
    from lora_scripts.models import chatglm, lora

    if found.layout != "chatglm":
        raise user_error(base, "is not in ChatGLM's original layout, so there are no other names")
    layers = lora.read_peft(adapter.path, adapter.scale)
    renamed = chatglm.original_names(layers, found.config)
    with _new_folder(output) as folder:
        lora.write_peft(folder, renamed, base)
        if not lora.same(lora.read_peft(folder), renamed):
            raise WorkError(f"{output}: read back it is not what was written")
    logger.info("Written: %s, a LoRA under the layer names of ChatGLM's own code", output)


def _tokenizer(loras: Sequence[Adapter], own: Any) -> Any:
    """The tokenizer that was trained with, its template included; else the base's."""
    from lora_scripts.models import causal_lm

    folder = adapters.tokenizer_folder(loras)
    return own if folder is None else causal_lm.read_tokenizer(folder)


def _stops(tokenizer: Any) -> list[str]:
    from lora_scripts.data.chat import ChatFormat

    return [str(token) for token in tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).stop_ids)]
