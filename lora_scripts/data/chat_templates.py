"""Which chat template writes a conversation, and the writing of it by transformers' own Jinja.

A template is the tokenizer's own, one of the two shipped here, a `.jinja` file, or its text.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.data import template_process
from lora_scripts.data.template_process import Refusal
from lora_scripts.errors import UserError, user_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}, with tool_calls, reasoning_content
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": …, "parameters": …}}

WHERE = "chat_template"  # the config key that every problem of a template names

_REFUSE_TOOLS = """\
{%- if tools %}{{ raise_exception('it has no place for tools') }}{% endif %}
{%- for message in messages if message.tool_calls or message.role == 'tool' %}
{{- raise_exception('it has no place for tool calls or their results') }}
{%- endfor %}
"""

# The prompt ends at the colon, before the space: tokenizers join a space to the word after it, so
# that the answer's first token is the same in training (" Yes") and after the prompt.
PLAIN = (
    _REFUSE_TOOLS
    + """\
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content | trim + '\\n\\n' }}
{%- elif message.role == 'user' %}
{{- 'User: ' + message.content | trim + '\\n' }}
{%- elif message.role == 'assistant' %}
{{- 'Assistant: ' + message.content | trim + eos_token + '\\n' }}
{%- else %}
{{- raise_exception('it does not know the role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
)

CHATML = (
    _REFUSE_TOOLS
    + """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
)

SHIPPED = {"plain": PLAIN, "chatml": CHATML}


@dataclass(frozen=True)
class Template:
    """A chat template at work. `name`: for the log; `text`: what is saved beside the adapter."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    text: str

    def apply(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompt: bool) -> str:
        """The conversation as text; with `prompt`, followed by what opens an answer.

        Raises:
            UserError: if the template is no valid Jinja, or refuses the conversation.
        """
        try:
            return self._apply(messages, tools, prompt=prompt)
        except Refusal as refusal:
            if refusal.line is not None:
                where = f"{self.name}, line {refusal.line}"
                raise user_error(WHERE, f"{where}: {refusal}") from None
            raise user_error(WHERE, self._refusal(messages, tools, str(refusal))) from None

    def _apply(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompt: bool) -> str:
        tokens = self.tokenizer.special_tokens_map
        return template_process.write(self.text, messages, tools, tokens, prompt=prompt)

    def _refusal(self, messages: Sequence[Message], tools: Sequence[Tool], said: str) -> str:
        refusal = f"the template ({self.name}) refuses the conversation: {said}"
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages):
            return refusal
        try:
            self._apply(rest, tools, prompt=False)
        except Refusal:
            return refusal
        return (
            f"{refusal}. Without its system message it is accepted: put that text at the head of "
            "the first user message, or leave it out"
        )


def choose(tokenizer: PreTrainedTokenizerBase, template: str | None, *, adds_bos: bool) -> Template:
    """The template that `template` asks for (None: the tokenizer's own, else `plain`).

    `adds_bos`: the tokenizer puts its BOS before every text; a shipped template then writes it,
    so that whoever uses the saved template has it too.

    Raises:
        UserError: if there is no such name or file, or the tokenizer cannot work with it.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if template is None and not own:
        name, text = "plain (the model has none)", PLAIN
        _check_shipped(tokenizer, "plain")
    elif template is None:
        name, text = "the tokenizer's own", own if isinstance(own, str) else _default_of(named)
    elif template in named:
        return Template(tokenizer, f'the tokenizer\'s own "{template}"', named[template])
    elif template in SHIPPED:
        name, text = template, SHIPPED[template]
        _check_shipped(tokenizer, template)
    elif any(mark in template for mark in ("{{", "{%")):
        return Template(tokenizer, "the text given", template)
    else:
        return Template(tokenizer, template, _read(template, [*SHIPPED, *named]))
    if text in SHIPPED.values() and adds_bos:
        text = "{{- bos_token }}\n" + text
    return Template(tokenizer, name, text)


def default_system(template: Template) -> str | None:
    """The system text that the template writes where the conversation has none; None if none."""
    system, user = "\ue000system\ue000", "\ue000user\ue000"
    question = {"role": "user", "content": user}
    try:
        stated = template.apply([{"role": "system", "content": system}, question], (), prompt=False)
    except UserError:
        return None  # it knows no system message
    before, found, after = stated.partition(system)
    unstated = template.apply([question], (), prompt=False).partition(user)[0]
    between = after.partition(user)[0]
    if not found or not unstated.startswith(before) or not unstated.endswith(between):
        return None
    return unstated[len(before) : len(unstated) - len(between)].strip() or None


def _default_of(named: Mapping[str, str]) -> str:
    if "default" not in named:
        names = ", ".join(f'"{name}"' for name in named)
        raise user_error(WHERE, f"the model has several templates; choose one: {names}")
    return named["default"]


def _check_shipped(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if name == "plain":
        if tokenizer.eos_token is None:
            what = "plain ends an answer with the end-of-text token, and this tokenizer names none"
            raise user_error(WHERE, what)
        return
    for token in ("<|im_start|>", "<|im_end|>"):
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise user_error(
                WHERE,
                f'"chatml" needs {token} as one token, and this model has no such token: it could '
                "not learn to stop there. Leave chat_template out to use the model's own, or "
                'write "plain", which needs no new tokens',
            )


def _read(template: str, names: Sequence[str]) -> str:
    """The text of a template file; whatever is no file was meant as a name."""
    path = Path(template)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise user_error(WHERE, f"{template}: the file is not UTF-8") from None
    except (OSError, ValueError) as error:
        if path.suffix in {".jinja", ".jinja2", ".j2", ".txt"} or len(path.parts) > 1:
            why = error.strerror if isinstance(error, OSError) else error
            raise user_error(WHERE, f"{template}: the file cannot be read ({why})") from None
    known = ", ".join(f'"{name}"' for name in names)
    near = difflib.get_close_matches(template, names, n=1)
    hint = f'; did you mean "{near[0]}"? Expected' if near else "; expected"
    raise user_error(
        WHERE,
        f'there is no template "{template}"{hint} one of {known}, the path of a .jinja file, '
        "or the text of a template",
    )
