"""Base models, LoRA files and folders, tokenizers and chat templates."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_scripts import adapters, inspect_lora
from lora_scripts.data import template_child
from lora_scripts.data.chat import ChatFormat
from lora_scripts.device import Compute
from lora_scripts.errors import out_of_memory, user_error
from lora_scripts.models import causal_lm, gguf_header, header, lora, lora_file
from lora_scripts.models.family import ImageFamily
from lora_scripts.models.signature import read_signature
from lora_scripts.models.text_signature import read_text_signature
from lora_scripts.models.vae_signature import read_vae
from lora_scripts.tasks import build
from tests import base_toys, lora_toys, text_toys, toys
from tests.fuzz.mutation import Files, spoil, spoil_json
from tests.fuzz.trial import Target
from tests.models import ldm_toy

WEIGHTS = ".safetensors"


def folder_of(path: Path) -> Files:
    """The files below a folder."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def spoil_weights(chance: random.Random, content: bytes) -> bytes:
    """A .safetensors file: its header's JSON, the length before it, or its bytes."""
    length = int.from_bytes(content[:8], "little")
    text, rest = content[8 : 8 + length], content[8 + length :]
    match chance.randrange(4):
        case 0:
            return spoil(chance, content)
        case 1:
            lie = chance.choice(
                (0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1)
            )
            return lie.to_bytes(8, "little") + content[8:]
        case 2:
            text = spoil_json(chance, text)
        case _:
            text = _spoil_tensor(chance, text)
    return len(text).to_bytes(8, "little") + text + rest


def _spoil_tensor(chance: random.Random, text: bytes) -> bytes:
    """One tensor's dtype, shape or place: huge, negative, overlapping, of the wrong kind, twice."""
    try:
        entries: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        return spoil(chance, text)
    names = [name for name in entries if name != "__metadata__"]
    if not names:
        return spoil_json(chance, text)
    entry = entries[chance.choice(names)]
    other = entries[chance.choice(names)]
    match chance.randrange(6):
        case 0:
            entry["dtype"] = chance.choice(("F64", "F16", "I8", "BOOL", "F8_E4M3", "Q4", "", 7))
        case 1:
            entry["shape"] = chance.choice(
                ([2**40, 2**40], [0], [], [-1], [2**63], [1.5], [None], "ab", [1] * 5000)
            )
        case 2:
            entry["data_offsets"] = chance.choice(
                (
                    [0, 0],
                    [5, 1],
                    [-8, 8],
                    [0, 2**63],
                    [0, 2**70],
                    [0],
                    [0, 1, 2],
                    other["data_offsets"],
                )
            )
        case 3:
            entry["shape"], other["shape"] = other["shape"], entry["shape"]
        case 4:
            name = chance.choice(names)
            return json.dumps(entries)[:-1].encode() + b', "%s": %s}' % (
                name.encode(), json.dumps(entry).encode())  # fmt: skip
        case 5:
            entries[chance.choice(("", "a" * 9000, "..", "x.lora_down.weight", "\ud800"))] = entry
    return json.dumps(entries).encode("utf-8")


def spoil_folder(chance: random.Random, files: Files, rate: float = 0.15) -> Files:
    """A folder of a model: one file spoilt for certain, some more, now and then one missing."""
    files = dict(files)
    certain = chance.choice(list(files))
    for name in list(files):
        if name != certain and chance.random() > rate:
            continue
        if chance.random() < 0.1:
            del files[name]
        elif name.endswith(WEIGHTS):
            files[name] = spoil_weights(chance, files[name])
        elif name.endswith(".json"):
            files[name] = spoil_json(chance, files[name])
        else:
            files[name] = spoil(chance, files[name])
    return files


def _spoil_folders(chance: random.Random, seeds: Sequence[Files]) -> Files:
    return spoil_folder(chance, chance.choice(seeds))


# --- headers --------------------------------------------------------------------------------------


def _weights(work: Path) -> list[Files]:
    work.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0)},
              work / "a.safetensors", metadata={"format": "pt", "note": "图"})  # fmt: skip
    save_file({}, work / "b.safetensors")
    return [
        {"a.safetensors": (work / name).read_bytes()} for name in ("a.safetensors", "b.safetensors")
    ]


def _spoil_header(chance: random.Random, seeds: Sequence[Files]) -> Files:
    return {name: spoil_weights(chance, content) for name, content in chance.choice(seeds).items()}


def _read_header(folder: Path) -> None:
    """What our reader lets pass, the library reads without any error of its own."""
    from safetensors import safe_open

    found = header.read_header(folder / "a.safetensors")
    header.read_metadata(folder / "a.safetensors")
    with safe_open(folder / "a.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            assert tuple(stored.get_tensor(name).shape) == found[name].shape


def _gguf(work: Path) -> list[Files]:
    work.mkdir(parents=True, exist_ok=True)
    return [
        {"a.gguf": base_toys.save_gguf(work / f"{kind}.gguf", kind).read_bytes()}
        for kind in ("ALL_F32", "MOSTLY_Q8_0")
    ]


def _spoil_gguf(chance: random.Random, seeds: Sequence[Files]) -> Files:
    """The facts at the head more often than the tokens and tensors behind them."""
    content = chance.choice(seeds)["a.gguf"]
    split = chance.choice((24, 400, 2000, len(content)))
    return {"a.gguf": spoil(chance, content[:split]) + content[split:]}


def _read_gguf(folder: Path) -> None:
    gguf_header.read_gguf_header(folder / "a.gguf")
    read_text_signature(folder / "a.gguf")


# --- base models ----------------------------------------------------------------------------------


def _image_bases(work: Path) -> list[Files]:
    return [_headed(folder_of(save(work / name))) for name, (save, _) in toys.FAMILIES.items()]


def _headed(files: Files) -> Files:
    """A model's folder whose tensors are empty: as large as signatures need it to be."""
    return {
        name: _emptied(content) if name.endswith(WEIGHTS) else content
        for name, content in files.items()
    }


def _emptied(content: bytes) -> bytes:
    """A .safetensors file with the same names, and no numbers behind them."""
    length = int.from_bytes(content[:8], "little")
    entries: dict[str, Any] = json.loads(content[8 : 8 + length])
    kept = dict(list(entries.items())[:6])
    for entry in kept.values():
        if "shape" in entry:
            entry |= {"shape": [0, *entry["shape"][1:]], "data_offsets": [0, 0]}
    text = json.dumps(kept).encode()
    return len(text).to_bytes(8, "little") + text


def _read_image_base(folder: Path) -> None:
    read_signature(folder)
    read_vae(folder)


def _text_bases(work: Path) -> list[Files]:
    saved = [text_toys.save_model(work / name, name) for name in ("llama", "gpt2")]
    saved.append(base_toys.save_chatglm(work / "chatglm"))
    return [_headed(folder_of(folder)) for folder in saved]


def _read_text_base(folder: Path) -> None:
    found = read_text_signature(folder)
    causal_lm.load_config(found)
    if found.layout == "chatglm":
        causal_lm.load_tokenizer(found)


@contextmanager
def _memory_told() -> Iterator[None]:
    """A config may ask for more memory than there is; whoever loads a model says so."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise user_error("base_model", "needs more memory than there is") from None
        raise


def _image_models(work: Path) -> list[Files]:
    return [folder_of(toys.save_stable_diffusion(work / "sd1"))]


def _read_image_model(folder: Path) -> None:
    with _memory_told():
        build.load_family(read_signature(folder), Compute(torch.device("cpu"), "no"))


def _image_files(work: Path) -> list[Files]:
    work.mkdir(parents=True, exist_ok=True)
    save_file(ldm_toy.ldm_tensors(ldm_toy.toy_modules()), work / "a.safetensors")
    return [folder_of(work)]


def _read_image_file(folder: Path) -> None:
    path = folder / "a.safetensors"
    ldm_toy.read_parts(read_signature(path), torch.float32)


def _text_models(work: Path) -> list[Files]:
    return [folder_of(text_toys.save_model(work / name, name)) for name in ("llama", "gpt2")]


def _read_text_model(folder: Path) -> None:
    found = read_text_signature(folder)
    with _memory_told():
        causal_lm.load(found, Compute(torch.device("cpu"), "no"))


# --- LoRAs ----------------------------------------------------------------------------------------


@functools.cache
def _family(base: str) -> ImageFamily:
    return build.load_family(build.find_base(base), Compute(torch.device("cpu"), "no"))


_MADE: list[Path] = []  # the toy base that LoRA files are read for


def _loras(work: Path) -> list[Files]:
    base = toys.save_stable_diffusion(work / "base")
    _MADE[:] = [base]
    family = _family(str(base))
    found = lora_toys.random_layers(family, "attention")
    few = {component: layers[:3] for component, layers in found.items()}
    lora_toys.kohya(work / "kohya.safetensors", family, few)
    lora_toys.diffusers_mixture(work / "mixture.safetensors", few)
    lora_toys.old_diffusers(work / "old.safetensors", few)
    files = [{"a.safetensors": path.read_bytes()} for path in sorted(work.glob("*.safetensors"))]
    return [*files, folder_of(lora_toys.peft(work / "peft", few))]


def _read_lora(folder: Path) -> None:
    path = folder / "a.safetensors" if (folder / "a.safetensors").exists() else folder
    inspect_lora.inspect(path)
    lora_file.read(path, _family(str(_MADE[0])))


def _peft(work: Path) -> list[Files]:
    torch.manual_seed(0)
    found = []
    for kind in ("lora", "dora"):
        layers = [
            lora.AdaptedLayer(
                f"model.layers.{n}.self_attn.q_proj", torch.randn(2, 32), torch.randn(32, 2), 4.0,
                torch.rand(32) if kind == "dora" else None,
            )
            for n in range(2)
        ]  # fmt: skip
        lora.write_peft(work / kind, layers, "some/base")
        found.append(folder_of(work / kind))
    return found


def _read_peft(folder: Path) -> None:
    adapters.check([adapters.Adapter(folder, 1.0)])
    lora.read_peft(folder)
    lora.with_adapters(text_toys.model("llama"), [(folder, 1.0)])


# --- tokenizers and templates ---------------------------------------------------------------------


def _tokenizers(work: Path) -> list[Files]:
    tokenizer = text_toys.chatml_tokenizer()
    tokenizer.save_pretrained(work)
    return [folder_of(work)]


def _read_tokenizer(folder: Path) -> None:
    tokenizer = causal_lm.read_tokenizer(folder)
    _talk(ChatFormat(tokenizer))


TALK = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes."},
)


def _talk(chat: ChatFormat) -> None:
    for rendered in chat.render(TALK):
        chat.encode(rendered)


# Pieces of templates, some of which do what none should.
PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m.content }}", "{% if x %}",
    "{% endif %}", "{{ messages }}", "{% set x = x ~ x %}", "{% for i in range(10**9) %}",
    "{% for i in range(999999) %}{% for j in range(999999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ 9 ** 9 ** 9 }}", "{{ [0] * 10**9 }}", "{{ '%0999999999d' % 1 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ self }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ lipsum.__globals__ }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ m | tojson }}", "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'a' | center(999999999) }}", "{{ namespace(a=1).a }}",
    "{% generation %}x{% endgeneration %}",
    "{{ messages | map(attribute='__class__') | list }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}", "{% break %}", "{{ eos_token }}",
)  # fmt: skip


@functools.cache
def _template_tokenizer() -> Any:
    return text_toys.chatml_tokenizer()


def _templates(work: Path) -> list[Files]:
    from tests.data import chat_toys

    texts = [
        value for name, value in vars(chat_toys).items() if name.isupper() and "{%" in str(value)
    ]
    return [{"chat_template.jinja": text.encode()} for text in texts]


def _spoil_template(chance: random.Random, seeds: Sequence[Files]) -> Files:
    content = chance.choice(seeds)["chat_template.jinja"]
    if chance.random() < 0.5:
        return {"chat_template.jinja": spoil(chance, content, chance.choice(PIECES).encode())}
    for _ in range(chance.randint(1, 3)):
        ends = [at + 2 for at in range(len(content)) if content[at : at + 2] in (b"%}", b"}}")]
        at = chance.choice([0, *ends])
        content = content[:at] + chance.choice(PIECES).encode() + content[at:]
    if chance.random() < 0.2:
        content = "".join(chance.choices(PIECES, k=chance.randint(1, 6))).encode()
    return {"chat_template.jinja": content}


def _read_template(folder: Path) -> None:
    template_child.SECONDS = 1.0
    _talk(ChatFormat(_template_tokenizer(), str(folder / "chat_template.jinja")))


TARGETS = (
    Target("safetensors", 100, _weights, _spoil_header, _read_header),
    Target("gguf", 70, _gguf, _spoil_gguf, _read_gguf),
    Target("image-bases", 40, _image_bases, _spoil_folders, _read_image_base),
    Target("text-bases", 30, _text_bases, _spoil_folders, _read_text_base),
    Target("image-models", 6, _image_models, _spoil_folders, _read_image_model),
    Target("image-files", 6, _image_files, _spoil_header, _read_image_file),
    Target("text-models", 10, _text_models, _spoil_folders, _read_text_model),
    Target("lora-files", 50, _loras, _spoil_folders, _read_lora),
    Target("peft-folders", 20, _peft, _spoil_folders, _read_peft),
    Target("tokenizers", 10, _tokenizers, _spoil_folders, _read_tokenizer),
    Target("templates", 20, _templates, _spoil_template, _read_template),
)
