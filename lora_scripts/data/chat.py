"""From a conversation to token ids, and which of them are learned. No torch.

The chat template writes the conversation once as a whole (the text that the model is given when it
is used), and every answer in it is learned, from its first character to the token that ends the
turn. Where the whole shows a turn otherwise than the model has to write it (Qwen3 drops earlier
thoughts), the turn is learned from a text of its own. So every answer is learned exactly once, as
it was written. Nothing depends on the padding token or on marks in the template.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lora_scripts.data.chat_templates import WHERE, Message, Tool, choose, default_system
from lora_scripts.data.chat_turns import Answers, Place, Turn, common
from lora_scripts.errors import user_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["responses", "all", "last"]


@dataclass(frozen=True)
class Encoded:
    """Token ids, and whether each is learned (predicted from those before it); both of length L."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rendered:
    """A text, and the characters [start, end) of it that are learned, in order.

    The span of an answer ends with the token that ends the turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatFormat:
    """How a tokenizer's conversations are written, encoded and learned.

    Attributes:
        name: of the template, for the log.
        template: what is saved beside the adapter as the tokenizer's chat template.
        tokenizer_id: a content hash: same id, same tokens.
        stop_ids: the tokens at which an answer ends: those that end a turn, then end-of-text.
        unseen_system: the system text that the template adds where a conversation has none
            (Qwen2.5, SmolLM2); None where it adds none, or `system_prompt` takes its place.
        notes: what else the user should be told once about this template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """Choose the template and try it out.

        `template`: None for the tokenizer's own (`plain` if it has none), `plain`, `chatml`, the
        path of a .jinja file, or template text. `system_prompt` is put before conversations that
        have no system message.

        Raises:
            UserError: if there is no such template, its Jinja is not valid, it does not show an
                answer, refuses `system_prompt`, or does not fit the tokenizer.
        """
        if not tokenizer.is_fast:
            raise user_error("tokenizer", "is not a fast one (tokenizer.json), which is needed")
        self._tokenizer = tokenizer
        self._opening = _opening_ids(tokenizer)
        adds_bos = self._opening == [tokenizer.bos_token_id]
        self._template = choose(tokenizer, template, adds_bos=adds_bos)
        self._system: list[Message] = []
        if system_prompt:
            self._system = [{"role": "system", "content": system_prompt}]
        self._answers = Answers(self._template, tokenizer, self._system)
        self.name, self.template = self._template.name, self._template.text
        ids = (tokenizer.convert_tokens_to_ids(stop) for stop in self._answers.stops)
        self.stop_ids: tuple[int, ...] = tuple(ids)
        self.unseen_system = None if system_prompt else default_system(self._template)
        self.notes = tuple(self._try_border())
        described = tokenizer.backend_tokenizer.to_str()
        self.tokenizer_id = hashlib.sha256(described.encode("utf-8")).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        train_on: TrainOn = "responses",
    ) -> list[Rendered]:
        """The texts that teach this conversation: one as a rule, more where a turn needs its own.

        `train_on`: `responses` for every assistant turn, `last` for the last one, `all` for every
        word of it. Messages are in OpenAI's form, their content a string.

        Raises:
            UserError: if there is no assistant turn, the template refuses the conversation, does
                not show a part of it, or an answer cannot be found in what it writes.
        """
        messages = self._prepare(messages)
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers and train_on != "all":
            raise user_error(WHERE, "there is no assistant turn, so nothing to learn")
        if train_on != "all":
            messages = messages[: answers[-1] + 1]  # what follows the last answer teaches nothing
        self._answers.check_shown(messages, tools)
        if train_on == "last":
            answers = answers[-1:]
        turns = {k: self._answers.turn(messages, k, tools) for k in answers}
        if train_on == "last":
            return [_alone(turns[answers[-1]])]
        ends_with_answer = messages[-1]["role"] == "assistant"
        whole = turns[answers[-1]].text if ends_with_answer else self._write(messages, tools)
        places = {
            k: self._answers.place(whole, turn, messages, k, tools) for k, turn in turns.items()
        }
        return _share_out(whole, turns, places, train_on)

    def encode(self, rendered: Rendered) -> Encoded:
        """The token ids of a rendered text, with exactly one BOS if the tokenizer puts one.

        A token is learned if it begins inside a span. One that begins before the span and ends in
        it (some tokenizers join the prompt's last newline to a newline at the head of an answer)
        is not: it holds a part of the prompt, and can never follow the prompt when the model is
        used.

        Raises:
            ValueError: if no token is learned.
        """
        ids, begins = self._tokens(rendered.text)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        for start, end in rendered.spans:
            supervised |= (begins >= start) & (begins < end)
        encoded = self._open(ids, supervised)
        if not encoded.supervised.any():
            raise ValueError(f"no token is learned in {rendered.text[:200]!r}")
        return encoded

    def encode_text(self, text: str) -> Encoded:
        """The token ids of a text, one BOS if the tokenizer puts one, end-of-text at the end.

        Everything is learned but what stands first (BOS, else the first token): nothing is before
        it that it could be predicted from.

        Raises:
            UserError: if the tokenizer names no end-of-text token, or there is no text.
        """
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise user_error("tokenizer", "names no end-of-text token, so no text can be ended")
        ids, _ = self._tokens(text)
        if not ids:
            raise user_error("text", "is empty")
        if ids[-1] != eos:
            ids = [*ids, eos]
        return self._open(ids, np.ones(len(ids), dtype=np.bool_))

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The token ids after which the model writes its answer to `messages`.

        Raises:
            UserError: if the template refuses the conversation.
        """
        ids, _ = self._tokens(self._write(self._prepare(messages), tools, prompt=True))
        return [int(i) for i in self._open(ids, np.zeros(len(ids), dtype=np.bool_)).ids]

    # --- text -----------------------------------------------------------------------------------

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        """With the system prompt where there is none, and tool arguments as objects."""
        has_system = any(message["role"] == "system" for message in messages)
        system = [] if has_system else self._system
        return [*system, *(_with_parsed_arguments(message) for message in messages)]

    def _write(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompt: bool = False
    ) -> str:
        return self._template.apply(messages, tools, prompt=prompt)

    def _try_border(self) -> Iterator[str]:
        """Why what the model is asked to go on from may not be what it learned to go on from."""
        ask = [*self._system, {"role": "user", "content": "Is it?"}]
        prompt = self._write(ask, prompt=True)
        text = self._write([*ask, {"role": "assistant", "content": "Yes."}])
        opening = self._tokens(prompt)[0]
        if not text.startswith(prompt):
            yield (
                f"the template ({self.name}) opens an answer with "
                f"{prompt[common(prompt, text) :]!r}, which it does not write before an answer "
                "that was given: such answers are not learned as a continuation of it"
            )
        elif self._tokens(text)[0][: len(opening)] != opening:
            yield (
                f"the template ({self.name}) ends its prompt with {prompt[-1:]!r}, which this "
                "tokenizer joins to the beginning of an answer, so that the first token of it is "
                "not learned; a template of your own should end its prompt before that character"
            )

    # --- tokens ---------------------------------------------------------------------------------

    def _tokens(self, text: str) -> tuple[list[int], npt.NDArray[np.int64]]:
        """The token ids of a text, nothing added, and the character at which each begins.

        Some byte-level tokenizers leave the space out of the offsets of " word" (`trim_offsets`):
        such a token begins where the one before it ends.
        """
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        begins, reached = [], 0
        for token, (begin, end) in zip(found.tokens(), found["offset_mapping"], strict=True):
            begins.append(min(begin, reached) if token.startswith(("Ġ", "▁")) else begin)
            reached = max(reached, end)
        return found["input_ids"], np.array(begins, dtype=np.int64)

    def _open(self, ids: list[int], supervised: npt.NDArray[np.bool_]) -> Encoded:
        """With what the tokenizer puts before every text (BOS; ChatGLM's two), exactly once."""
        missing = [] if ids[: len(self._opening)] == self._opening else self._opening
        supervised = np.concatenate([np.zeros(len(missing), dtype=np.bool_), supervised])
        supervised[: max(1, len(self._opening))] = False
        return Encoded(np.array([*missing, *ids], dtype=np.int32), supervised)


def _alone(turn: Turn) -> Rendered:
    return Rendered(turn.text, ((turn.start, turn.end),))


def _share_out(
    whole: str,
    turns: Mapping[int, Turn],
    places: Mapping[int, Place | None],
    train_on: TrainOn,
) -> list[Rendered]:
    """The whole with the turns that it shows as they are, after a text for each other turn."""
    kept = {k: place[:2] for k, place in places.items() if place is not None and place.complete}
    alone = [_alone(turn) for k, turn in turns.items() if k not in kept]
    if train_on == "responses":
        return [*alone, Rendered(whole, tuple(kept.values()))]
    # All is learned but the turns that are learned alone, so that none is learned in two ways.
    cut = [place[:2] for k, place in places.items() if place is not None and k not in kept]
    edges = [0, *itertools.chain.from_iterable(cut), len(whole)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [*alone, Rendered(whole, tuple(span for span in spans if span[0] < span[1]))]


def _with_parsed_arguments(message: Message) -> Message:
    """Tool arguments as objects: OpenAI's form has them as JSON text, which most templates would
    quote a second time.
    """
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        parsed = {**function, "arguments": json.loads(function["arguments"])}
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        what = f"the arguments of a call of {function['name']} are not valid JSON ({reason})"
        raise user_error("tool_calls", what) from None
    return {**call, "function": parsed} if "function" in call else parsed


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: often its BOS, or nothing."""
    found = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1] == 1, marked)]
