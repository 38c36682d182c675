"""Talk to a language model in the terminal, with LoRAs on it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_scripts import adapters, collector
from lora_scripts.adapters import Adapter
from lora_scripts.errors import user_error
from lora_scripts.logs import quiet_libraries

logger = logging.getLogger(__name__)

HELP = "Type what you want to say. /reset forgets what was said, /exit (or Ctrl-D) ends."


@dataclass(frozen=True)
class ChatRequest:
    """What to talk to, and how it answers. Without `prompts` they are read from the terminal."""

    base: str | None
    loras: Sequence[Adapter]
    prompts: Sequence[str]
    system_prompt: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    device: str


def run(request: ChatRequest) -> None:
    """Answer each prompt as it comes; what was said before is remembered.

    Raises:
        UserError: if base or LoRAs are not there or do not fit each other.
    """
    adapters.check(request.loras)
    base, found = adapters.find_base(request.loras, request.base)
    with collector.importing():
        quiet_libraries()
        from lora_scripts import device
        from lora_scripts.data.chat import ChatFormat
        from lora_scripts.models import causal_lm, lora
    compute = device.choose(request.device, "auto")
    loaded = causal_lm.load(found, compute)
    model, tokenizer = loaded.model, loaded.tokenizer
    folder = adapters.tokenizer_folder(request.loras)
    if folder is not None:
        tokenizer = causal_lm.read_tokenizer(folder)
    elif request.loras:
        logger.warning("The LoRA has no tokenizer with it; the base's chat template is used")
    if request.loras:
        model = lora.with_adapters(model, [(each.path, each.scale) for each in request.loras])
    system_prompt = request.system_prompt
    if system_prompt is None:
        system_prompt = adapters.system_prompt(request.loras)
    chat = ChatFormat(tokenizer, None, system_prompt or None)
    logger.info("%s", _partners(base, request.loras))
    if system_prompt:
        logger.info("System message: %s", system_prompt)
    messages: list[dict[str, Any]] = []
    for number, prompt in enumerate(_prompts(request)):
        if prompt == "/reset":
            messages.clear()
            logger.info("Forgotten.")
            continue
        messages.append({"role": "user", "content": prompt})
        with compute.autocast():
            answer = causal_lm.generate(
                model,
                tokenizer,
                chat.prompt_ids(messages),
                stop_ids=chat.stop_ids,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed + number,
                stream=_Console(),
            )
        _write("\n")
        # A template puts white space of its own around what it is given (ChatGLM3's "\n ").
        messages.append({"role": "assistant", "content": answer.strip()})


def _partners(base: str, loras: Sequence[Adapter]) -> str:
    """Who is talked to: `Qwen/Qwen3-0.6B with output/mine at 0.8`."""
    parts = [f"{each.path}{'' if each.scale == 1 else f' at {each.scale:g}'}" for each in loras]
    return f"{base} with {' and '.join(parts)}" if parts else base


def _prompts(request: ChatRequest) -> Iterator[str]:
    """The prompts of the command line, else those typed until /exit or the end of the input."""
    if request.prompts:
        for prompt in request.prompts:
            _write(f"> {prompt}\n")
            yield prompt
        return
    typed = sys.stdin.isatty()
    if typed:
        logger.info(HELP)
    while True:
        try:
            prompt = input("> ").strip() if typed else _piped()
        except (EOFError, KeyboardInterrupt):
            _write("\n" if typed else "")
            return
        except UnicodeDecodeError:
            what = f"is not {sys.stdin.encoding}; set PYTHONIOENCODING to the encoding that it has"
            raise user_error("the input", what) from None
        if prompt in ("/exit", "/quit"):
            return
        if prompt:
            yield prompt


def _piped() -> str:
    """The next line of an input that is no terminal, shown as if it had been typed."""
    prompt = input().strip()
    if prompt:
        _write(f"> {prompt}\n")
    return prompt


class _Console:
    """Writes an answer as it comes, without white space at its head."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, text: str) -> None:
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        _write(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
