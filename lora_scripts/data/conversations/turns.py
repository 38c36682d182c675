"""The messages of a conversation: read from the OpenAI or the ShareGPT spelling, and checked.

What a conversation must be:

- a system message only as the first;
- the first turn after it the user's, or the assistant's where a system message stands before it;
- no two user turns, and no two assistant turns, in a row;
- results (role tool) behind an assistant's tool calls or another result, and no call without one
  unless the conversation ends there;
- at least one assistant turn, and none that is empty, unless it calls a tool.

A user turn may follow a tool's result. A conversation that ends with another role than assistant
is kept, with a warning: nothing behind the last answer is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_scripts.data.conversations.saying import (
    Findings,
    check_within,
    checked,
    listed,
    nearest,
    parse_json,
    read_text,
)
from lora_scripts.data.reading import Refused, kind, show

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

_OPENAI_KEYS = ("role", "content")
_SHAREGPT_KEYS = ("from", "value")
_EXTRA_KEYS = ("reasoning_content", "tool_calls", "function_call", "name", "tool_call_id", "weight")
_CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


class Turn(NamedTuple):
    """A message and the place in its row that the user would look for: `item 3 of "messages"`."""

    place: str
    message: dict[str, Any]


def read_turns(value: Any, field: str, findings: Findings) -> list[Turn]:
    """The turns of a list of messages, or of its JSON text. What is wrong goes to `findings`."""
    try:
        found = _list(value, field)
    except Refused as refused:
        findings.refuse(str(refused))
        return []
    turns: list[Turn] = []
    for number, item in enumerate(found, start=1):
        place = f'item {number} of "{field}"'
        try:
            turns.append(Turn(place, _message(item, findings)))
        except Refused as refused:
            findings.refuse(f"{place}: {refused}")
    return turns


def read_tools(value: Any, field: str, findings: Findings) -> tuple[dict[str, Any], ...]:
    """The functions on offer, each as `{"type": "function", "function": {…}}`. Raises `Refused`.

    Read are a list or its JSON text; a function may stand bare, as ShareGPT and the older OpenAI
    format have it.
    """
    if value in (None, "", []):
        return ()
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(_list(value, field), start=1):
        place = f'item {number} of "{field}"'
        bare = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(bare, dict) or not isinstance(bare.get("name"), str):
            example = '{"type": "function", "function": {"name": …, "parameters": {…}}}'
            raise Refused(f"{place}: not a function with a name; expected {example}")
        check_within(tool, place, findings)
        tools.append(tool if bare is not tool else {"type": "function", "function": bare})
    return tuple(tools)


def check_turns(turns: Sequence[Turn], findings: Findings) -> None:
    """Whether the turns make a conversation to learn from (see the head of this file)."""
    before: Mapping[str, Any] | None = None
    for number, (place, message) in enumerate(turns):
        if (what := _wrong_after(before, message, number)) is not None:
            findings.refuse(f"{place}: {what}")
        _check_content(place, message, findings)
        before = message
    if not any(message["role"] == "assistant" for _, message in turns):
        findings.refuse("there is no assistant turn in it: nothing could be learned")
    elif turns[-1].message["role"] != "assistant":
        place, message = turns[-1]
        what = f"the last turn is the {message['role']}'s: nothing behind the last answer is"
        findings.remark(f"{place}: {what} learned")


def _wrong_after(
    before: Mapping[str, Any] | None, message: Mapping[str, Any], at: int
) -> str | None:
    role = message["role"]
    last = before["role"] if before is not None else None
    waiting = before is not None and bool(before.get("tool_calls"))
    match role:
        case "system" if at > 0:
            return "a system message in the middle; expected only as the first"
        case "tool" if last != "tool" and not waiting:
            return "a tool's result without a call; expected behind an assistant's tool_calls"
        case "user" | "assistant" if waiting:
            return "the tool calls before it have no result; expected role tool here"
        case "user" | "assistant" if last == role:
            return f"two {role} turns in a row; join them to one, or put in what is missing between"
        case "assistant" if last is None:
            return (
                "the conversation begins with the assistant; expected a user turn before it, or a "
                "system message that says what it answers to"
            )
        case _:
            return None


def _check_content(place: str, message: Mapping[str, Any], findings: Findings) -> None:
    if message["content"].strip() or message.get("tool_calls"):
        return
    if message["role"] == "assistant":
        findings.refuse(f"{place}: the answer is empty; expected what the model shall say")
    elif message["role"] == "user":
        findings.remark(f"{place}: the user's text is empty")


# --- one message ----------------------------------------------------------------------------------


def _message(found: Any, findings: Findings) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Refused(f'found {kind(found)}; expected {{"role": "user", "content": "…"}}')
    sharegpt = "from" in found and "role" not in found
    role_key, content_key = _SHAREGPT_KEYS if sharegpt else _OPENAI_KEYS
    role = _role(found, role_key, SHAREGPT_ROLES if sharegpt else OPENAI_ROLES)
    message: dict[str, Any] = {"role": role}
    if found[role_key] == "function_call":
        message |= {"content": "", "tool_calls": _calls_of_text(found, content_key, findings)}
    else:
        calls = _calls(found, findings)
        message["content"] = _content(found, content_key, bool(calls), findings)
        if calls:
            message["tool_calls"] = calls
    for key in ("reasoning_content", "name", "tool_call_id"):
        if found.get(key) is not None:
            message[key] = read_text(found[key], f'"{key}"', findings)
    for key in ("reasoning_content", "tool_calls"):
        if key in message and role != "assistant":
            raise Refused(f'"{key}" in a message of role {role}; only an assistant has it')
    if found.get("weight") not in (None, 1):
        raise Refused('"weight" is not supported; what is learned is set by train_on')
    known = (role_key, content_key, *_EXTRA_KEYS)
    findings.ignore((key for key in found if key not in known and found[key] is not None), known)
    return message


def _role(found: Mapping[str, Any], key: str, roles: Mapping[str, str]) -> str:
    if key not in found:
        raise Refused(f'no "{key}"; found {listed(found)}{_meant(key, found)}')
    role = found[key]
    if not isinstance(role, str):
        raise Refused(f'"{key}" is {kind(role)}; expected one of {", ".join(roles)}')
    if role not in roles:
        near = nearest(role, roles)
        hint = f'; did you mean "{near}"?' if near else ";"
        raise Refused(f'"{key}" is {show(role)}{hint} expected one of {", ".join(roles)}')
    return roles[role]


def _meant(key: str, found: Mapping[str, Any]) -> str:
    near = nearest(key, found)
    return f' (is {show(near)} meant for "{key}"?)' if near else ""


def _content(found: Mapping[str, Any], key: str, optional: bool, findings: Findings) -> str:
    value = found.get(key)
    if value is None and optional:
        return ""
    if key not in found:
        raise Refused(f'no "{key}"; found {listed(found)}{_meant(key, found)}')
    if isinstance(value, list):
        return "\n".join(_part(part, key, findings) for part in value)
    return read_text(value, f'"{key}"', findings)


def _part(part: Any, key: str, findings: Findings) -> str:
    """One of OpenAI's content parts; those of one message are joined by a line break."""
    if not isinstance(part, dict) or part.get("type") != "text":
        found = show(str(part.get("type"))) if isinstance(part, dict) else kind(part)
        raise Refused(
            f'"{key}" holds a part of type {found}; only texts are learned here: '
            '{"type": "text", "text": "…"}'
        )
    return read_text(part.get("text"), f'"text" in a part of "{key}"', findings)


# --- tool calls -----------------------------------------------------------------------------------


def _calls(found: Mapping[str, Any], findings: Findings) -> list[dict[str, Any]]:
    calls, field = found.get("tool_calls"), "tool_calls"
    if calls is None and found.get("function_call") is not None:
        calls, field = [found["function_call"]], "function_call"  # OpenAI's older format
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Refused(f'"{field}" is {kind(calls)}; expected a list of calls like {_CALL}')
    return [_call(call, f'"{field}"', findings) for call in calls]


def _calls_of_text(found: Mapping[str, Any], key: str, findings: Findings) -> list[dict[str, Any]]:
    """ShareGPT's `function_call`: the JSON text of a call, or of a list of calls."""
    text = _content(found, key, False, findings)
    try:
        calls = parse_json(text)
    except Refused as refused:
        raise Refused(f'"{key}" of a function_call is {refused}; expected {_CALL}') from None
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, f'"{key}"', findings) for call in calls]


def _call(found: Any, field: str, findings: Findings) -> dict[str, Any]:
    function = found.get("function", found) if isinstance(found, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{field} holds a call without a name; expected {_CALL}")
    if found.get("type", "function") != "function":
        raise Refused(f"{field} holds a call of type {show(str(found['type']))}; expected function")
    name = checked(function["name"], f'"name" in {field}', findings)
    arguments = _arguments(function, name, field)
    check_within(arguments, f'"arguments" of {show(name)} in {field}', findings)
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if found.get("id") is not None:
        call["id"] = read_text(found["id"], f'"id" in {field}', findings)
    return call


def _arguments(function: Mapping[str, Any], name: str, field: str) -> dict[str, Any]:
    place = f'"arguments" of {show(name)} in {field}'
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except Refused as refused:
            raise Refused(f"{place}: {refused}; expected an object, at least {{}}") from None
    if not isinstance(arguments, dict):
        found = kind(arguments) if "arguments" in function else "none"
        raise Refused(f"{place}: found {found}; expected an object, at least {{}}")
    return arguments


def _list(value: Any, field: str) -> list[Any]:
    """A list that is not empty, or the JSON text of one (as in a cell of a table)."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except Refused as refused:
            raise Refused(f'"{field}" is a text, and {refused}; expected a list') from None
    if not isinstance(value, list):
        raise Refused(f'"{field}" is {kind(value)}; expected a list')
    if not value:
        raise Refused(f'"{field}" is an empty list')
    return value
