"""A language model: read from a folder, a .gguf file or ChatGLM's layout; what is adapted of it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_scripts.device import Compute
from lora_scripts.errors import user_error
from lora_scripts.files import file_hash
from lora_scripts.models import foreign, sharding
from lora_scripts.models.text_signature import TextSignature

_ATTENTION = re.compile(r"(?:^|\.)(?:self_)?(?:attn|attention)\.")  # the block around a layer
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
PROBE_TOKENS = 24


@dataclass
class CausalLM:
    """A language model in memory."""

    model: Any  # a PreTrainedModel with a language-model head
    tokenizer: Any  # a fast PreTrainedTokenizer
    found: TextSignature  # where it was read from

    @cached_property
    def weights_id(self) -> str:
        """SHA-256 of the file of weights; of several, of their hashes in the order of names."""
        hashes = [file_hash(path) for path in self.found.weights]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )

    @property
    def facts(self) -> Mapping[str, str]:
        """What the weights are, for the files' metadata."""
        return _facts(self.found)


@dataclass(frozen=True)
class Targets:
    """Full paths of the layers that get an adapter, and kinds of weights that could but do not."""

    adapted: Sequence[str]
    skipped: Sequence[str]


def load(
    found: TextSignature,
    compute: Compute,
    *,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    own_dtype: bool = False,
) -> CausalLM:
    """Read model and tokenizer; the weights frozen, in the precision of `compute`.

    `own_dtype` keeps the precision in which the files hold them; a quantised .gguf file is
    unpacked to bfloat16 then.

    Raises:
        UserError: if transformers has no such model, or a file or package is missing.
    """
    check_quantization(quantization, compute, found)
    dtype = _own_dtype(found) if own_dtype else compute.dtype
    model = _load_model(found, compute, dtype, trust_remote_code, quantization)
    model.requires_grad_(False)
    model.eval()
    return CausalLM(
        model=model,
        tokenizer=load_tokenizer(found, trust_remote_code=trust_remote_code),
        found=found,
    )


def load_tokenizer(found: TextSignature, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone."""
    match found.layout:
        case "gguf":
            status = found.path.stat()
            return copy.deepcopy(_gguf_tokenizer(found.path, status.st_mtime_ns, status.st_size))
        case "chatglm":
            from lora_scripts.models import chatglm

            with foreign.reading(found.path, "the tokenizer"):
                return chatglm.load_tokenizer(found.path)
        case "transformers":
            return read_tokenizer(found.path, trust_remote_code=trust_remote_code)


@lru_cache(maxsize=1)
def _gguf_tokenizer(path: Path, changed: int, size: int) -> Any:
    """The tokenizer in a .gguf file, which takes seconds to read and is asked for twice in a run.

    `changed`, `size`: of the file, so that another one under its name is read anew.
    """
    from transformers import AutoTokenizer

    with _gguf_reading(path):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@lru_cache(maxsize=1)
def _gguf_config(path: Path, changed: int, size: int) -> Any:
    """The config in a .gguf file; as `_gguf_tokenizer`."""
    from transformers import AutoConfig

    with _gguf_reading(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a transformers folder or of a finished run.

    Raises:
        UserError: if it is not a fast one.
    """
    from transformers import AutoTokenizer

    with foreign.reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    foreign.check_vocabulary(folder, tokenizer)
    if not isinstance(tokenizer.model_max_length, int | float):
        found = type(tokenizer.model_max_length).__name__
        raise user_error(str(folder), f"model_max_length of its tokenizer is no number but {found}")
    if not tokenizer.is_fast:
        what = "its tokenizer has no fast version (tokenizer.json), which the loss mask needs"
        raise user_error(str(folder), what)
    return tokenizer


def load_config(found: TextSignature) -> Any:
    """The model's config alone."""
    from transformers import AutoConfig

    match found.layout:
        case "chatglm":
            from lora_scripts.models import chatglm

            rope = chatglm.rope_rule(found.path, found.config)
            return chatglm.convert_config(found.config, rope)
        case "gguf":
            status = found.path.stat()
            return copy.deepcopy(_gguf_config(found.path, status.st_mtime_ns, status.st_size))
        case "transformers":
            _check_known(found, trust_remote_code=False)
            with foreign.reading(found.path / "config.json", "the model's config"):
                return AutoConfig.from_pretrained(found.path)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain transformers directory, tokenizer and chat template included."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _own_dtype(found: TextSignature) -> torch.dtype:
    if found.layout == "gguf":
        quantization = _facts(found)["base_quantization"]
        return {"F32": torch.float32, "F16": torch.float16}.get(quantization, torch.bfloat16)
    name = found.config.get("dtype") or found.config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise user_error(str(found.path / "config.json"), f"dtype: found {name}")
    return dtype


def _load_model(
    found: TextSignature,
    compute: Compute,
    dtype: torch.dtype,
    trust_remote_code: bool,
    quantization: str | None,
) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    match found.layout:
        case "chatglm":
            from lora_scripts.models import chatglm

            return chatglm.load(found.path, dtype).to(compute.home)
        case "gguf":
            silent = redirect_stderr(io.StringIO())  # a progress bar that cannot be switched off
            with _gguf_reading(found.path), silent:
                model = AutoModelForCausalLM.from_pretrained(
                    found.path.parent,
                    gguf_file=found.path.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=dtype,
                )
            return model.to(compute.home)
        case "transformers":
            _check_known(found, trust_remote_code)
            packed = _bitsandbytes(quantization, compute)
            with foreign.reading(found.path, "this model"):
                model, facts = AutoModelForCausalLM.from_pretrained(
                    found.path,
                    dtype=dtype,
                    device_map={"": compute.home},
                    trust_remote_code=trust_remote_code,
                    quantization_config=packed,
                    output_loading_info=True,
                )
            foreign.refuse_missing(found.path, facts["missing_keys"])
            return model


def _check_known(found: TextSignature, trust_remote_code: bool) -> None:
    """Only classes that transformers itself has, unless the user asked for the model's own code."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = found.config.get("model_type")
    is_known = isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_known or (found.own_code and trust_remote_code):
        return
    known = f"transformers {transformers.__version__} has no language model of the type"
    if found.own_code:
        what = (
            f"{known} {model_type!r}; this one brings Python code of its own, which is not run "
            "unless the config says trust_remote_code: true. Read that code first: it can do "
            "anything that you can"
        )
    else:
        what = f"{known} {model_type!r}"
    raise user_error(str(found.path), what)


def check_quantization(quantization: str | None, compute: Compute, base: TextSignature) -> None:
    """4 and 8 bits only where they are known to work.

    bitsandbytes packs the weights anew on CPUs at the first pass without gradients, after which the
    adapters no longer learn: so not there.

    Raises:
        UserError: with the reason.
    """
    if quantization is None:
        return
    found = f"found {quantization}, "
    if base.layout != "transformers":
        what = f"but this base is in the layout {base.layout}, which is read in full: leave it out"
        raise user_error("quantization", found + what)
    if compute.device.type != "cuda":
        what = f"but this run is on a {compute.device.type}; it needs an NVIDIA card: leave it out"
        raise user_error("quantization", found + what)
    if importlib.util.find_spec("bitsandbytes") is None:
        what = "which needs bitsandbytes: pip install bitsandbytes"
        raise user_error("quantization", found + what)


def _bitsandbytes(quantization: str | None, compute: Compute) -> Any:
    """QLoRA's 4 bits (Dettmers et al. 2023, arXiv 2305.14314), or 8 bits; None for neither."""
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute.dtype,
    )


def targets(model: Any, chosen: Literal["attention", "linear"] | Sequence[str]) -> Targets:
    """The linear layers of the decoder's blocks; those in attention; or those named by path ends.

    Left out: embeddings and head, routers of experts, experts held as one 3-D weight, and all that
    is not the text decoder (a vision tower).

    Raises:
        UserError: if a name fits no layer, with the names that there are.
    """
    layers = [path for path, module in _in_blocks(model) if _is_adaptable(path, module)]
    skipped = sorted(set(_skipped(model)))
    if chosen == "linear":
        return Targets(layers, skipped)
    if chosen == "attention":
        return Targets([path for path in layers if _ATTENTION.search(path)], skipped)
    names = [chosen] if isinstance(chosen, str) else chosen
    unknown = [name for name in names if not any(_ends(path, name) for path in layers)]
    if unknown:
        kinds = sorted({path.rsplit(".", 1)[-1] for path in layers})
        what = f"found {', '.join(unknown)}; this model's layers are {', '.join(kinds)}"
        raise user_error("lora_targets", what)
    named = [path for path in layers if any(_ends(path, name) for name in names)]
    return Targets(named, skipped)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _in_blocks(model: Any) -> Iterable[tuple[str, nn.Module]]:
    """Every module of the text decoder's blocks, with its full path."""
    blocks = _blocks(model)
    prefix = next(path for path, module in model.named_modules() if module is blocks)
    return [(f"{prefix}.{path}", module) for path, module in blocks.named_modules() if path]


def _blocks(model: Any) -> nn.ModuleList:
    """The text decoder's blocks."""
    decoder = model.get_decoder()
    count = model.config.get_text_config().num_hidden_layers
    for child in decoder.modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise user_error("base_model", f"no list of {count} blocks was found in {type(decoder)}")


def _is_adaptable(path: str, module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer

    return isinstance(module, nn.Linear | Conv1D) and path.rsplit(".", 1)[-1] not in _ROUTERS


def _skipped(model: Any) -> Iterable[str]:
    for path, module in _in_blocks(model):
        name = path.rsplit(".", 1)[-1]
        if name in _ROUTERS:
            yield f"{name} (chooses the experts)"
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and not isinstance(module, nn.Conv1d):
                yield f"{name}.{parameter} (all experts in one weight of {value.ndim} dimensions)"
        if isinstance(module, nn.Conv1d):
            yield f"{name} (a convolution)"


def units(model: Any) -> list[nn.Module]:
    """What is gathered at once where a model is spread: a block, embeddings, head, the rest."""
    decoder = model.get_decoder()
    return [*_blocks(model), model.get_input_embeddings(), model.get_output_embeddings(), decoder]


def shard(model: Any, compute: Compute) -> None:
    """Spread the frozen weights over the processes; embeddings that are the head stay so."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    sharding.shard(model, units(model), compute)
    if tied:
        head.weight = embeddings.weight
    sharding.bring_rest(model, compute)  # what is neither decoder nor head


def checkpoint_gradients(model: Any) -> None:
    """Keep fewer activations while training and compute them again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stream: Callable[[str], None] | None = None,
) -> str:
    """The text that the model goes on with after `ids`, given to `stream` as it grows.

    The global generator is left as it was.
    """
    prompt_BT = torch.tensor([list(ids)], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output_BT = model.generate(
            input_ids=prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            synced_gpus=sharding.is_shared(model),  # none ends before the others do
            streamer=None if stream is None else _Streamer(tokenizer, stream),
            **({"temperature": temperature} if temperature > 0 else {}),
        )
    return _decode(tokenizer, output_BT[0, len(ids) :].tolist())


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class _Streamer:
    """Gives out an answer as it grows, in whole characters; transformers calls `put` and `end`.

    The answer is decoded from its first token each time: decoders leave out the space before a
    first word, and a character may be spread over several tokens.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] | None = None  # None until the prompt has been given
        self._written = ""

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = _decode(self._tokenizer, self._ids)
        if not text.endswith("\ufffd"):
            self._give(text)

    def end(self) -> None:
        self._give(_decode(self._tokenizer, self._ids or []))

    def _give(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    """Logits of a fixed short text, shape (tokens, vocabulary), float32: to compare models by."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids_BT = torch.randint(0, size, (1, PROBE_TOKENS), generator=generator)
    logits: torch.Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[0]
    return logits.float().cpu()


def _facts(found: TextSignature) -> dict[str, str]:
    """What can be said of the base in a LoRA's metadata."""
    if found.layout != "gguf":
        return {"base_layout": found.layout, "base_model_type": str(found.config.get("model_type"))}
    from gguf import LlamaFileType

    known: dict[Any, str] = {kind.value: kind.name for kind in LlamaFileType}
    file_type = known.get(found.config.get("general.file_type"), "unknown")
    return {
        "base_layout": "gguf",
        "base_model_type": str(found.config.get("general.architecture")),
        "base_quantization": file_type.removeprefix("MOSTLY_").removeprefix("ALL_"),
    }


def _gguf_reading(path: Path) -> AbstractContextManager[None]:
    """transformers' reader of .gguf files, whatever it raises."""
    return foreign.reading(path, "this .gguf file", "; take the model as safetensors")
