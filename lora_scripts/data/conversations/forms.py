"""The forms that a row of text data can have, told apart by the names of its fields.

Every row is looked at by itself. The first form of `FORMS` whose needed fields are all there is
the row's form; further fields are named in a warning and not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_scripts.data.conversations.saying import (
    Findings,
    checked,
    listed,
    nearest,
    parse_json,
    read_text,
)
from lora_scripts.data.conversations.turns import Turn, check_turns, read_tools, read_turns
from lora_scripts.data.reading import Refused, kind, show


class Form(NamedTuple):
    """A form: its name for the log, the fields it is told by, and those it may have besides."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ("system", "tools", "functions")


MESSAGES = Form("OpenAI messages", ("messages",))
CONVERSATIONS = Form("ShareGPT conversations", ("conversations",))
ALPACA = Form(
    "Alpaca instruction/output",
    ("instruction", "output"),
    ("input", "history", "system", "tools", "functions"),
)
PAIRS = (
    Form("prompt/completion", ("prompt", "completion")),
    Form("prompt/response", ("prompt", "response")),
    Form("query/response", ("query", "response")),
    Form("question/answer", ("question", "answer")),
)
FILE = Form("file_name/text", ("file_name", "text"), ("system",))
TEXT = Form("raw text", ("text",), ())
FORMS = (MESSAGES, CONVERSATIONS, ALPACA, *PAIRS, FILE, TEXT)

KNOWN = tuple(dict.fromkeys(name for form in FORMS for name in (*form.needs, *form.may)))
EXPECTED = "expected the fields of one form: " + " | ".join(", ".join(f.needs) for f in FORMS)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")

ReadFile = Callable[[str], str]  # the text of a file that a row names; raises Refused


@dataclass(frozen=True)
class Content:
    """What a row says: a conversation, or a raw text and no messages."""

    form: Form
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None


def read_row(row: Mapping[str, Any], read_file: ReadFile, findings: Findings) -> Content | None:
    """What a row says, or None with the reasons in `findings`. A blank raw text is passed over."""
    present = {name: value for name, value in row.items() if value is not None}
    try:
        form = _form(present, row)
        _refuse_media(present)
        known = (*form.needs, *form.may)
        findings.ignore((name for name in present if name not in known), known)
        if form is TEXT:
            return _raw(read_text(row["text"], '"text"', findings), findings)
        turns = _turns(form, present, read_file, findings)
        tools = _tools(present, findings)
    except Refused as refused:
        findings.refuse(str(refused))
        return None
    if not findings.refused:
        check_turns(turns, findings)
    if findings.refused:
        return None
    return Content(form, tuple(turn.message for turn in turns), tools)


# --- which form -----------------------------------------------------------------------------------


def _form(present: Mapping[str, Any], row: Mapping[str, Any]) -> Form:
    for form in FORMS:
        if all(name in present for name in form.needs):
            return form
    if "chosen" in present and "rejected" in present:
        raise Refused(
            '"chosen" and "rejected" are a preference pair, from which nothing is learned here; '
            "write prompt and completion, with the better answer as the completion"
        )
    begun = [form for form in FORMS if any(name in row for name in form.needs)]
    if begun:
        raise Refused(_incomplete(min(begun, key=lambda form: _missing(form, row)), row))
    nears = [f'did you mean "{near}"? ' for name in row if (near := nearest(name, KNOWN))]
    raise Refused(f"no known form; found {listed(row)}; {''.join(nears[:1])}{EXPECTED}")


def _missing(form: Form, row: Mapping[str, Any]) -> int:
    return sum(name not in row for name in form.needs)


def _incomplete(form: Form, row: Mapping[str, Any]) -> str:
    """What is said of a row that has some of a form's fields."""
    missing = next(name for name in form.needs if row.get(name) is None)
    if missing in row:
        return f'"{missing}" is null; expected a value'
    others = [name for name in row if name not in KNOWN]
    close = nearest(missing, others)
    hint = f" (is {show(close)} meant for it?)" if close else ""
    return f'no "{missing}"; found {listed(row)}{hint}; {EXPECTED}'


def _refuse_media(present: Mapping[str, Any]) -> None:
    for name in _MEDIA:
        if present.get(name):
            raise Refused(f'the row has "{name}"; only texts are learned here')


# --- what the row says ----------------------------------------------------------------------------


def _raw(text: str, findings: Findings) -> Content | None:
    if not text.strip():
        findings.remark('"text" is empty; the row is passed over')
        return None
    return Content(TEXT, text=text)


def _turns(
    form: Form, row: Mapping[str, Any], read_file: ReadFile, findings: Findings
) -> list[Turn]:
    system = _system(row, findings)
    match form.needs:
        case ("messages" | "conversations" as field,):
            turns = read_turns(row[field], field, findings)
        case ("instruction", "output"):
            turns = _alpaca(row, findings)
        case ("file_name", "text"):
            name = read_text(row["file_name"], '"file_name"', findings)
            asked = checked(read_file(name), f"the file {show(name)}", findings)
            turns = [
                Turn('"file_name"', {"role": "user", "content": asked}),
                _side("text", "assistant", row, findings),
            ]
        case (prompt, answer):
            turns = _pair(prompt, answer, row, findings)
        case _:
            raise AssertionError(form)
    if system and any(turn.message["role"] == "system" for turn in turns):
        raise Refused('"system" and a system message in the conversation; keep one of them')
    return [*system, *turns]


def _system(row: Mapping[str, Any], findings: Findings) -> list[Turn]:
    text = read_text(row.get("system", ""), '"system"', findings)
    return [Turn('"system"', {"role": "system", "content": text})] if text.strip() else []


def _tools(row: Mapping[str, Any], findings: Findings) -> tuple[Mapping[str, Any], ...]:
    field = "tools" if "tools" in row else "functions"
    return read_tools(row.get(field), field, findings)


def _side(field: str, role: str, row: Mapping[str, Any], findings: Findings) -> Turn:
    content = read_text(row[field], f'"{field}"', findings)
    return Turn(f'"{field}"', {"role": role, "content": content})


def _pair(prompt: str, answer: str, row: Mapping[str, Any], findings: Findings) -> list[Turn]:
    """Two texts, or two lists of messages that are one conversation together."""
    lists = [isinstance(row[field], list) for field in (prompt, answer)]
    if all(lists):
        return [turn for f in (prompt, answer) for turn in read_turns(row[f], f, findings)]
    if any(lists):
        found = f'"{prompt}" is {kind(row[prompt])}, "{answer}" is {kind(row[answer])}'
        raise Refused(f"{found}; expected two texts, or two lists of messages")
    return [_side(prompt, "user", row, findings), _side(answer, "assistant", row, findings)]


def _alpaca(row: Mapping[str, Any], findings: Findings) -> list[Turn]:
    """Earlier turns, then instruction and input (joined by a line break), then the output."""
    asked = read_text(row["instruction"], '"instruction"', findings)
    given = read_text(row.get("input", ""), '"input"', findings)
    question = "\n".join(text for text in (asked, given) if text.strip())
    return [
        *_history(row.get("history"), findings),
        Turn('"instruction"', {"role": "user", "content": question}),
        _side("output", "assistant", row, findings),
    ]


def _history(value: Any, findings: Findings) -> list[Turn]:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except Refused as refused:
            raise Refused(f'"history" is a text, and {refused}') from None
    if not value:
        return []
    if not isinstance(value, list):
        raise Refused(f'"history" is {kind(value)}; expected a list of [question, answer]')
    turns: list[Turn] = []
    for number, pair in enumerate(value, start=1):
        place = f'item {number} of "history"'
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(f"{place}: found {kind(pair)}; expected [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(place, {"role": role, "content": read_text(text, place, findings)}))
    return turns
