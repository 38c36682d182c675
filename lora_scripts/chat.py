"""Talk to a language model in the terminal, with LoRAs on it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_scripts import adapters
from lora_scripts.adapters import Adapter

logger = logging.getLogger(__name__)

HELP = "/reset forgets what was said, /exit (or Ctrl-D) ends."


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
    base = adapters.base_of(request.loras, request.base)
    from lora_scripts import device
    from lora_scripts.data.chat import ChatFormat
    from lora_scripts.logs import quiet_libraries
    from lora_scripts.models import causal_lm, lora
    from lora_scripts.tasks import build

    quiet_libraries()
    compute = device.choose(request.device, "auto")
    loaded = causal_lm.load(build.find_text_base(base), compute)
    model, tokenizer = loaded.model, loaded.tokenizer
    folder = adapters.tokenizer_folder(request.loras)
    if folder is not None:
        tokenizer = causal_lm.read_tokenizer(folder)
    if request.loras:
        model = lora.with_adapters(model, [(each.path, each.scale) for each in request.loras])
    chat = ChatFormat(tokenizer, None, request.system_prompt)
    messages: list[dict[str, Any]] = []
    for number, prompt in enumerate(_prompts(request)):
        if prompt == "/reset":
            messages.clear()
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
                stream=_write,
            )
        _write("\n")
        messages.append({"role": "assistant", "content": answer})


def _prompts(request: ChatRequest) -> Iterator[str]:
    """The prompts of the command line, else those typed until /exit or the end of the input."""
    if request.prompts:
        for prompt in request.prompts:
            _write(f"> {prompt}\n")
            yield prompt
        return
    if sys.stdin.isatty():
        logger.info(HELP)
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        if prompt in ("/exit", "/quit"):
            return
        if prompt:
            yield prompt


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
