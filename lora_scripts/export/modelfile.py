"""An Ollama Modelfile whose Go template gives the model the text it was trained on.

The pieces of the Go template are found by rendering the tokenizer's chat template (Jinja) with
marked messages. Before anything is returned, conversations are rendered by both templates and the
texts compared, so a chat template that cannot be expressed is an error, not a poor answer.

Sources (github.com/ollama/ollama at fb30760): `docs/modelfile.mdx` and `docs/template.mdx` for the
instructions and variables; `template/template.go`: `.System` is all system messages joined,
`.Messages` all messages, those of one role in a row merged; `parser/parser.go`: no escapes in
quotes, characters that do not print are dropped; `llm/llama_server.go`: the server adds the BOS
token where the tokenizer does, so the template must not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_scripts.errors import UserError, user_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # role, content
Render = Callable[[Sequence[Message], bool], str]  # messages, with the start of an answer? -> text

WHERE = "Ollama Modelfile"
MARKS = ("FirstUserMark", "FirstAnswerMark", "SecondUserMark", "SecondAnswerMark", "ThirdUserMark")
SYSTEM_MARK = "SystemMark"
IS_LAST = "and $.System (eq (len (slice $.Messages $i)) 1)"
PROOF = (
    "What is {{ 1 }}?", 'It is "one".\nYes: {% 1 %}', "And 'zwölf'?", "12, }} or <b>.", "Why\n\n?",
    "Because.", "I see: 数",
)  # fmt: skip


@dataclass(frozen=True)
class _System:
    """Where a chat template puts the system message, and what it writes on both sides of it."""

    place: Literal["head", "first user", "last user"]
    before: str
    after: str


@dataclass(frozen=True)
class _Pieces:
    """A chat template as literal text: what opens and closes a turn, and what comes first."""

    head: str  # of a conversation without a system message; may hold a default one
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str  # at the end, so that the model answers
    system: _System | None  # None: the template refuses or ignores system messages


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str,
    adapter: str,
    stops: Sequence[str],
    system: str | None = None,
) -> str:
    """The text of a Modelfile for an adapter that was trained with `tokenizer`'s chat template.

    `base` is what stands after FROM (a model's name in Ollama, or a path), `adapter` the name of
    the GGUF adapter file beside the Modelfile, `stops` the texts that end an answer, `system` the
    system message of every conversation that brings none.

    Contents are inserted as they are; a chat template that trims them agrees where there is nothing
    to trim. A model in Ollama's library may have a built-in renderer, which wins over any TEMPLATE:
    give FROM a GGUF file then.

    Raises:
        UserError: saying what Go templates, or Modelfiles, cannot express.
    """
    if tokenizer.chat_template is None:
        raise user_error(WHERE, "the tokenizer has no chat template to make a TEMPLATE from")
    render = _renderer(tokenizer)
    pieces = _derive(render)
    if system is not None and pieces.system is None:
        raise user_error(WHERE, "the chat template has no place for the system message given")
    template = _go_template(pieces)
    _prove(template, render, with_system=pieces.system is not None)
    lines = [f"# {remark}" for remark in _remarks(tokenizer, pieces)]
    lines += [f"FROM {_plain(base)}", f"ADAPTER ./{_plain(adapter)}", f'TEMPLATE """{template}"""']
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """The tokenizer's chat template as a function, without a BOS token that Ollama adds itself."""
    from jinja2 import TemplateError

    bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""

    def render(messages: Sequence[Message], answer: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer
            )
        except (TemplateError, TypeError) as error:  # a template may run into its own mistakes
            roles = ", ".join(message["role"] for message in messages)
            raise user_error(WHERE, f"the chat template refuses {roles}: {error}") from error
        return text.removeprefix(bos)

    return render


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before any text, as its GGUF then does too."""
    if tokenizer.bos_token is None:
        return False
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _remarks(tokenizer: PreTrainedTokenizerBase, pieces: _Pieces) -> list[str]:
    """What the user should know that the Modelfile itself cannot say. One line each."""
    remarks = ["TEMPLATE gives the text that the adapter was trained on."]
    if pieces.system is None:
        remarks.append("The chat template has no system role: system messages are left out.")
    if "strftime_now" in str(tokenizer.chat_template):
        remarks.append("The chat template writes today's date: it is that of this file.")
    messages = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if _adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        remarks.append("Ollama puts a BOS token in front, which the chat template does not have.")
    return remarks


def _conversation(contents: Sequence[str], system: str | None = None) -> list[Message]:
    """User and assistant in turn, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """The literal texts before, between and after the marks, each of which must be there once."""
    for mark in marks:
        if text.count(mark) != 1:
            raise user_error(
                WHERE, f"the chat template writes a message {text.count(mark)} times, not once"
            )
    pattern = "(.*)".join(re.escape(mark) for mark in marks)
    found = re.fullmatch(f"(.*){pattern}(.*)", text, flags=re.DOTALL)
    if found is None:
        raise user_error(WHERE, "the chat template changes the order of the messages")
    return list(found.groups())


def _shared_start(*texts: str) -> str:
    """The longest text that all of them begin with."""
    shared = min(texts, key=len)
    while not all(text.startswith(shared) for text in texts):
        shared = shared[:-1]
    return shared


def _derive(render: Render) -> _Pieces:
    """Find the pieces of a chat template that writes every turn of a role alike."""
    start, to_answer, to_user, to_answer_2, to_user_2, end = _between(
        render(_conversation(MARKS), True), MARKS
    )
    if (to_answer, to_user) != (to_answer_2, to_user_2):
        raise user_error(WHERE, "the chat template writes later turns differently from the first")
    asked = _between(render(_conversation(MARKS[:1]), False), MARKS[:1])[-1]
    answered = _between(render(_conversation(MARKS[:2]), False), MARKS[:2])[-1]
    user_after = _shared_start(asked, to_answer, end)
    assistant_after = _shared_start(answered, to_user)
    while not start.endswith(to_user.removeprefix(assistant_after)):
        # Some close an answer only when the next turn opens: Llama 2 with `</s><s>`.
        assistant_after = to_user[: len(assistant_after) + 1]
    user_before = to_user.removeprefix(assistant_after)
    head = start.removesuffix(user_before)
    return _Pieces(
        head=head,
        user=(user_before, user_after),
        assistant=(to_answer.removeprefix(user_after), assistant_after),
        answer=end.removeprefix(user_after),
        system=_derive_system(render, head, user_before, to_user),
    )


def _derive_system(render: Render, head: str, user_before: str, to_user: str) -> _System | None:
    """Find what a system message changes: a turn of its own, or a part of a user's turn."""
    try:
        text = render(_conversation(MARKS[:3], SYSTEM_MARK), True)
    except UserError:
        return None
    if SYSTEM_MARK not in text:
        return None
    if text.find(SYSTEM_MARK) > text.find(MARKS[1]):
        marks = (*MARKS[:2], SYSTEM_MARK, MARKS[2])
        _, _, before, after, _ = _between(text, marks)
        return _System("last user", before.removeprefix(to_user), after)
    before, after, *_ = _between(text, (SYSTEM_MARK, *MARKS[:3]))
    if after.endswith(user_before):
        return _System("head", before, after.removesuffix(user_before))
    return _System("first user", before.removeprefix(head + user_before), after)


def _go_template(pieces: _Pieces) -> str:
    """The pieces as a Go template over `.System` and `.Messages`. No whitespace is trimmed."""
    head, inside, loop = _literal(pieces.head), "", "range .Messages"
    match pieces.system:
        case _System("head", before, after):
            default = f"{{{{ else }}}}{head}" if head else ""
            head = (
                f"{{{{ if .System }}}}{_literal(before)}{{{{ .System }}}}{_literal(after)}"
                f"{default}{{{{ end }}}}"
            )
        case _System("first user", before, after):
            head = f"{{{{ $system := .System }}}}{head}"
            inside = (
                f"{{{{ if $system }}}}{_literal(before)}{{{{ $system }}}}{_literal(after)}"
                '{{ $system = "" }}{{ end }}'
            )
        case _System("last user", before, after):
            loop = "range $i, $_ := .Messages"
            inside = (
                f"{{{{ if {IS_LAST} }}}}{_literal(before)}{{{{ $.System }}}}{_literal(after)}"
                "{{ end }}"
            )
    user_before, user_after = map(_literal, pieces.user)
    assistant_before, assistant_after = map(_literal, pieces.assistant)
    return (
        f"{head}{{{{ {loop} }}}}"
        f'{{{{ if eq .Role "user" }}}}{user_before}{inside}{{{{ .Content }}}}{user_after}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant_before}{{{{ .Content }}}}'
        f"{assistant_after}{{{{ end }}}}{{{{ end }}}}{_literal(pieces.answer)}"
    )


def _literal(text: str) -> str:
    """Text as it may stand in a Go template between three quotes in a Modelfile.

    Braces that would open an action, three quotes and characters that do not print become Go
    strings: `{{ "{{" }}`, `{{ "\\"\\"\\"" }}`, `{{ "\\U0000200b" }}`.
    """

    def as_go_string(found: re.Match[str]) -> str:
        piece = found[0]
        if len(piece) == 1 and piece != "{" and (piece.isprintable() or piece in "\n\t"):
            return piece
        escaped = [one if one.isprintable() else f"\\U{ord(one):08x}" for one in piece]
        return '{{ "' + "".join(escaped).replace('"', '\\"') + '" }}'

    return re.sub(r'\{{2,}|\{\Z|"{3,}|[^ -~]', as_go_string, text)


def _plain(value: str) -> str:
    """A value without quotes: one line of characters that print."""
    if not value.isprintable() or value != value.strip() or value.startswith('"') or not value:
        raise user_error(WHERE, f"{value!r} cannot stand in a Modelfile without quotes")
    return value


def _quoted(value: str) -> str:
    """A value in quotes. Modelfiles know no escapes and lose characters that do not print."""
    lost = sorted({one for one in value if not (one.isprintable() or one in "\n\t")})
    if lost or '"""' in value:
        raise user_error(
            WHERE, f"{value!r} cannot stand in a Modelfile: {lost[0] if lost else chr(34) * 3!r}"
        )
    return f'"""{value}"""' if '"' in value or "\n" in value else f'"{value}"'


def _prove(template: str, render: Render, *, with_system: bool) -> None:
    """Render conversations of one to four turns by both templates and compare the texts."""
    systems = [None, 'Be {{ "brief" }}.\nAlways.'] if with_system else [None]
    for system in systems:
        for count in range(1, len(PROOF) + 1, 2):
            messages = _conversation(PROOF[:count], system)
            expected, found = render(messages, True), _execute(template, messages)
            if found != expected:
                common = len(_shared_start(found, expected))
                raise user_error(
                    WHERE,
                    "the chat template cannot be expressed as a Go template: for "
                    f"{', '.join(message['role'] for message in messages)} it writes "
                    f"{expected[common : common + 60]!r} where the Go template writes "
                    f"{found[common : common + 60]!r}",
                )


@dataclass(frozen=True)
class _Action:
    text: str


@dataclass(frozen=True)
class _If:
    branches: Sequence[tuple[str, Sequence[_Node]]]  # (condition, "" for else; what it guards)


@dataclass(frozen=True)
class _Range:
    body: Sequence[_Node]


_Node = str | _Action | _If | _Range


def _execute(template: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of one of our templates: an interpreter of just the actions we emit."""
    pieces = iter(enumerate(re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)))
    nodes, _ = _parse(pieces)
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    output: list[str] = []
    values = {".System": system, "$.System": system}
    _run(nodes, values, messages, output)
    return "".join(output)


def _parse(pieces: Iterator[tuple[int, str]]) -> tuple[list[_Node], str]:
    """Nodes up to the action that closes them, and that action. Odd pieces are actions."""
    nodes: list[_Node] = []
    for number, text in pieces:
        if number % 2 == 0:
            nodes.append(text)
        elif text == "end" or text.startswith("else"):
            return nodes, text
        elif text.startswith("range "):
            nodes.append(_Range(_parse(pieces)[0]))
        elif text.startswith("if "):
            branches, closing = [], text
            while closing != "end":
                condition = closing.removeprefix("else").strip().removeprefix("if ")
                body, closing = _parse(pieces)
                branches.append((condition, body))
            nodes.append(_If(branches))
        else:
            nodes.append(_Action(text))
    return nodes, ""


def _run(
    nodes: Sequence[_Node],
    values: dict[str, str],
    messages: Sequence[Message],
    output: list[str],
) -> None:
    for node in nodes:
        match node:
            case str():
                output.append(node)
            case _Action(text):
                output.append(_act(text, values))
            case _If(branches):
                for condition, body in branches:
                    if _holds(condition, values):
                        _run(body, values, messages, output)
                        break
            case _Range(body):
                for number, message in enumerate(messages):
                    values[".Role"], values[".Content"] = message["role"], message["content"]
                    values["last"] = "yes" if number == len(messages) - 1 else ""
                    _run(body, values, messages, output)


def _act(text: str, values: dict[str, str]) -> str:
    """The text of an action; an assignment has none."""
    name, assigned, value = re.fullmatch(r"(\$\w+)? ?(:?=)? ?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if assigned is None:
        return _value(text, values)
    values[name] = _value(value, values)
    return ""


def _value(text: str, values: Mapping[str, str]) -> str:
    """A variable, or a Go string with the two escapes that `_literal` writes."""
    if not text.startswith('"'):
        return values[text]
    unicode = re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), text[1:-1])
    return unicode.replace('\\"', '"')


def _holds(condition: str, values: Mapping[str, str]) -> bool:
    if condition == IS_LAST:
        return bool(values["$.System"] and values["last"])
    if condition.startswith("eq .Role "):
        return condition.removeprefix("eq .Role ") == f'"{values[".Role"]}"'
    return condition == "" or bool(values[condition])
