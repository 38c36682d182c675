"""Where the answers stand in the text that a chat template writes, and what ends them.

An answer is found by writing the conversation twice: up to the answer with what opens one, and
with the answer. No mark in the template is needed, and no knowledge of any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_scripts.data.chat_templates import WHERE, Message, Template, Tool
from lora_scripts.errors import UserError, user_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand-ins in trial conversations: letters of the private-use area, which no template looks for.
_QUESTION, _ANSWER, _RESULT = "\ue000question\ue000", "\ue001answer\ue001", "\ue002result\ue002"
_NAME, _ID = "trial_tool", "trial0001"  # nine letters and digits: Mistral's templates insist
_REPLY: Message = {"role": "assistant", "content": _ANSWER}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": {}}},
    ],
}
_USED: Message = {"role": "tool", "content": _RESULT, "name": _NAME, "tool_call_id": _ID}

_NOT_SHOWN = {
    "text": "the text of an answer",
    "reasoning": (
        "the reasoning of an answer, so that it could not be learned: leave it out of the data, "
        "or give a template that shows it"
    ),
    "call": (
        "tool calls, so that they could not be learned: leave them out of the data, or give a "
        "template that shows them"
    ),
}


class Turn(NamedTuple):
    """The conversation up to and with one answer, which is `text[start:end]`, end token included.

    What follows in `text` ends the conversation: white space, with Phi-3 an end-of-text too.
    """

    text: str
    start: int
    end: int


class Place(NamedTuple):
    """The characters [start, end) of an answer in the whole conversation; all of it is shown?"""

    start: int
    end: int
    complete: bool


class Answers:
    """Finds the answers in what one template writes.

    Two kinds of template are told apart by a trial. Most end an answer with a token of its own
    (ChatML's `<|im_end|>`). The others let the next speaker's token end it (GLM's `<|user|>`), or
    nothing at all; then that token, or end-of-text, closes the last answer.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, opening: Sequence[Message]
    ) -> None:
        """`opening`: the messages that every conversation begins with (a system prompt, or none).

        Raises:
            UserError: if the template refuses a question and an answer, or does not show them.
        """
        self._template = template
        self._eos: str | None = tokenizer.eos_token
        added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        # Blank ones (Gemma has tokens for runs of newlines) say nothing about a turn.
        self._added = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._ask: list[Message] = [*opening, {"role": "user", "content": _QUESTION}]
        self._find_stops()

    @property
    def stops(self) -> list[str]:
        """The texts of the tokens that end an answer, end-of-text the last, each once."""
        call = self._trial([*self._ask, _CALL]).rstrip() if self._end_text else ""
        found = [
            self._token_at_start(self._end_text),
            self._token_at_end(self._end_text),
            self._token_at_end(call) if _NAME in call else "",
            self._user_stop,
            self._tool_stop,
            self._eos or "",
        ]
        return list(dict.fromkeys(stop for stop in found if stop))

    def turn(self, messages: Sequence[Message], k: int, tools: Sequence[Tool]) -> Turn:
        """The conversation up to and with answer k, closed by the token that ends it.

        Raises:
            UserError: if the answer, or a part of it, cannot be found in what the template writes.
        """
        messages = messages[: k + 1]
        text = self.write(messages, tools)
        turn = self._close(text, self._start(messages, tools, text), messages[k])
        answer = turn.text[turn.start : turn.end]
        for name, part in _parts(messages[k]):
            if part not in answer and not (name == "text" and self._shows(messages, k, tools)):
                what = f"turn {k + 1}: the template ({self._template.name}) does not show "
                raise user_error(WHERE, what + _NOT_SHOWN[name])
        return turn

    def place(
        self, whole: str, turn: Turn, messages: Sequence[Message], k: int, tools: Sequence[Tool]
    ) -> Place | None:
        """Where `whole`, all messages, shows answer k.

        None if it shows the turn, or what comes before it, otherwise than `turn` does.
        """
        if whole.startswith(turn.text[: turn.end]):
            return Place(turn.start, turn.end, True)
        ending = self._end_text or self._role_stop(messages[k])
        if not ending or not whole.startswith(turn.text[: turn.start]):
            return None
        # Written otherwise now that other turns follow: Qwen3 puts an empty thought before the
        # last answer only (then all of it is shown), and drops the thoughts of earlier ones.
        answer, found, _ = whole[turn.start :].partition(ending)
        end = turn.start + len(answer + ending)
        if not found or end > common(whole, self._write_other(messages, k + 1, tools)):
            return None  # what ends the last answer does not end this one
        shown = bool(self._end_text) and all(part in answer for _, part in _parts(messages[k]))
        return Place(turn.start, end, shown)

    def check_shown(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Refuse a template that drops what others than the assistant say (answers: `turn`)."""
        text = self.write(messages, tools)
        for k, message in enumerate(messages):
            content = message.get("content")
            if message["role"] == "assistant" or not isinstance(content, str):
                continue
            if content.strip() not in text and not self._shows(messages, k, tools):
                what = f"does not show turn {k + 1} ({message['role']})"
                raise user_error(WHERE, f"the template ({self._template.name}) {what}")
        if tools and text == self._trial(messages):
            what = "does not show the tools: leave them out, or give a template that shows them"
            raise user_error(WHERE, f"the template ({self._template.name}) {what}")

    def write(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """The conversation as the template writes it."""
        return self._template.apply(messages, tools, prompt=False)

    # --- the two ends of an answer --------------------------------------------------------------

    def _start(self, messages: Sequence[Message], tools: Sequence[Tool], text: str) -> int:
        """Where the last message, an answer, begins in `text`."""
        before = messages[:-1]
        prompt = self._template.apply(before, tools, prompt=True) if before else text
        if before and text.startswith(prompt):
            return len(prompt)
        # What opens an answer is not how the template writes one that was given (DeepSeek-R1's
        # prompt opens a thought), or the conversation begins with an answer: it begins where the
        # text leaves the prompt, or changes with the answer.
        start = min(common(text, prompt), common(text, self.write([*before, _REPLY], tools)))
        asked = self.write(before, tools) if before else ""
        if not text[:start].startswith(asked):
            raise user_error(
                WHERE,
                f"turn {len(messages)} (assistant) cannot be found in what the template "
                f"({self._template.name}) writes: it writes the turns before it otherwise then",
            )
        return start

    def _close(self, text: str, start: int, message: Message) -> Turn:
        """The answer up to its end token, added where the template writes none.

        White space after that token (ChatML's newline) is not learned.
        """
        trimmed = text[:start] + text[start:].rstrip().removesuffix(self._after_end)
        if self._end_text and self._token_at_end(trimmed):
            return Turn(text, start, len(trimmed))
        if stop := self._role_stop(message):
            return Turn(text + stop, start, len(text + stop))
        if self._eos is None:
            raise user_error("tokenizer", "names no end-of-text token, so no answer can be ended")
        return Turn(trimmed + self._eos, start, len(trimmed + self._eos))

    # --- what ends an answer --------------------------------------------------------------------

    def _find_stops(self) -> None:
        """What the template writes after an answer ("" if that holds no token of its own), and in
        templates of that kind the role tokens that follow an answer and a tool call, or "".

        What stands after white space ends the conversation, not the answer: Phi-3 writes
        `<|end|>`, a newline, and at the very end its end-of-text.
        """
        answered = [*self._ask, _REPLY]
        text = self.write(answered, ())
        if _QUESTION not in text or _ANSWER not in text:
            what = f"the template ({self._template.name}) does not show a question and its answer"
            raise user_error(WHERE, what)
        tail = text.rpartition(_ANSWER)[2].rstrip()
        self._end_text = re.split(r"(?<=\S)\s", tail, maxsplit=1)[0]
        self._after_end = tail.removeprefix(self._end_text)
        self._user_stop = self._tool_stop = ""
        if not self._token_at_end(self._end_text):
            called = [*self._ask, _CALL]
            self._end_text = self._after_end = ""
            self._user_stop = self._token_between(answered, [*answered, self._ask[-1]])
            self._tool_stop = self._token_between(called, [*called, _USED])

    def _token_between(self, shorter: Sequence[Message], longer: Sequence[Message]) -> str:
        begin, text = self._trial(shorter), self._trial(longer)
        return self._token_at_start(text[len(begin) :]) if begin and text.startswith(begin) else ""

    def _role_stop(self, message: Message) -> str:
        return (self._tool_stop if _calls(message) else "") or self._user_stop

    def _trial(self, messages: Sequence[Message]) -> str:
        """A conversation that the template may well refuse ("" then)."""
        try:
            return self.write(messages, ())
        except UserError:
            return ""

    def _token_at_start(self, text: str) -> str:
        return next((token for token in self._added if text.startswith(token)), "")

    def _token_at_end(self, text: str) -> str:
        return next((token for token in self._added if text.endswith(token)), "")

    def _shows(self, messages: Sequence[Message], k: int, tools: Sequence[Tool]) -> bool:
        """Whether the text of message k reaches the written text, though perhaps reshaped."""
        return _RESULT in self._write_other(messages, k, tools)

    def _write_other(self, messages: Sequence[Message], k: int, tools: Sequence[Tool]) -> str:
        """The conversation with another text in message k."""
        other = [*messages[:k], {**messages[k], "content": _RESULT}, *messages[k + 1 :]]
        return self.write(other, tools)


def common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """What the user wrote of an answer, each with its name in `_NOT_SHOWN`; blank ones left out."""
    content = message.get("content")
    thoughts = [message.get(key) for key in ("reasoning_content", "thinking", "reasoning")]
    if isinstance(content, str) and "</think>" in content:
        inside, _, content = content.rpartition("</think>")
        thoughts.append(inside.replace("<think>", ""))
    for thought in thoughts:
        if isinstance(thought, str) and thought.strip():
            yield "reasoning", thought.strip()
    if isinstance(content, str) and content.strip():
        yield "text", content.strip()
    for call in _calls(message):
        yield "call", call.get("function", call)["name"]


def _calls(message: Message) -> Sequence[Any]:
    return message.get("tool_calls") or ()
