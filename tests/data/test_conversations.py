from __future__ import annotations

import builtins
import csv
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_scripts.data.conversations import TextRecord, Texts, read_texts
from lora_scripts.errors import Problem

QUESTION = {"role": "user", "content": "Wie heißt du?"}
ANSWER = {"role": "assistant", "content": "我叫小龙。"}
SYSTEM = {"role": "system", "content": "You are a dragon."}
TOOL = {"name": "get_weather", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "巴黎"}}}


def read(folder: Path, text: str | bytes, file: str) -> tuple[Texts, str]:
    """What a data file holds, and its problems as printed."""
    (folder / file).write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    texts = read_texts(folder / file, None)
    for problem in texts.problems:
        str(problem).encode("utf-8")
    return texts, "\n".join(f"{problem.severity} {problem}" for problem in texts.problems)


def read_row(folder: Path, row: Any) -> tuple[Texts, str]:
    return read(folder, json.dumps(row), "rows.jsonl")


def messages(texts: Texts) -> list[Mapping[str, Any]]:
    (record,) = texts.records
    assert record.text is None
    return list(record.messages)


# --- the forms of rows ----------------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "messages": (
        {"messages": [SYSTEM, QUESTION, ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
        "OpenAI messages",
    ),
    "the developer's role": (
        {"messages": [{"role": "developer", "content": "You are a dragon."}, QUESTION, ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
        "OpenAI messages",
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ]
        },
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}],
        "OpenAI messages",
    ),
    "reasoning": (
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "Hm.", "refusal": None}]},
        [QUESTION, {**ANSWER, "reasoning_content": "Hm."}],
        "OpenAI messages",
    ),
    "messages as a JSON text, and an own system": (
        {"messages": json.dumps([QUESTION, ANSWER]), "system": "You are a dragon."},
        [SYSTEM, QUESTION, ANSWER],
        "OpenAI messages",
    ),
    "a greeting behind a system message": (
        {"messages": [SYSTEM, ANSWER]},
        [SYSTEM, ANSWER],
        "OpenAI messages",
    ),
    "conversations": (
        {
            "conversations": [
                {"from": "human", "value": "Wie heißt du?"},
                {"from": "gpt", "value": "我叫小龙。"},
                {"from": "user", "value": "Wie heißt du?"},
                {"from": "chatgpt", "value": "我叫小龙。"},
            ],
            "system": "You are a dragon.",
            "tools": "",
        },
        [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER],
        "ShareGPT conversations",
    ),
    "conversations spelt as OpenAI does": (
        {"conversations": [QUESTION, ANSWER]},
        [QUESTION, ANSWER],
        "ShareGPT conversations",
    ),
    "Alpaca": (
        {"instruction": "Translate.", "input": "Katze", "output": "cat", "system": ""},
        [
            {"role": "user", "content": "Translate.\nKatze"},
            {"role": "assistant", "content": "cat"},
        ],
        "Alpaca instruction/output",
    ),
    "Alpaca with a history": (
        {
            "instruction": "Wie heißt du?",
            "input": "",
            "output": "我叫小龙。",
            "system": "You are a dragon.",
            "history": [["Hi", "Hello"]],
        },
        [
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            QUESTION,
            ANSWER,
        ],
        "Alpaca instruction/output",
    ),
    "prompt and completion": (
        {"prompt": "Wie heißt du?", "completion": "我叫小龙。"},
        [QUESTION, ANSWER],
        "prompt/completion",
    ),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
        "prompt/completion",
    ),
    "prompt and response": (
        {"prompt": "Wie heißt du?", "response": "我叫小龙。"},
        [QUESTION, ANSWER],
        "prompt/response",
    ),
    "query and response": (
        {"query": "Wie heißt du?", "response": "我叫小龙。", "system": None},
        [QUESTION, ANSWER],
        "query/response",
    ),
    "question and answer": (
        {"question": "Wie heißt du?", "answer": "我叫小龙。", "system": "You are a dragon."},
        [SYSTEM, QUESTION, ANSWER],
        "question/answer",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_forms(tmp_path: Path, form: str, bom: str) -> None:
    row, expected, name = FORMS[form]
    text = json.dumps(row, ensure_ascii=False)
    texts, said = read(tmp_path, f"{bom}\r\n{text}\r\n\r\n{text}", "dialogues.jsonl")
    assert said == ""
    assert texts.records == [
        TextRecord("dialogues.jsonl line 2", tuple(expected)),
        TextRecord("dialogues.jsonl line 4", tuple(expected)),
    ]
    assert texts.forms == {name: 2}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_forms_in_json_and_parquet(tmp_path: Path, form: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([FORMS[form][0]] * 2)
    parquet.write_table(table, tmp_path / "data.parquet")
    data = json.dumps({"data": [FORMS[form][0]]}, indent=1)
    for texts in (read_texts(tmp_path / "data.parquet", None), read(tmp_path, data, "d.json")[0]):
        assert texts.problems == []
        assert list(texts.records[0].messages) == FORMS[form][1]
    assert texts.records[0].where == "d.json row 1"
    assert read_texts(tmp_path / "data.parquet", None).records[1].where == "data.parquet row 2"


def test_raw_text_rows(tmp_path: Path) -> None:
    texts, said = read(tmp_path, '{"text": "Es war\\r\\neinmal"}\n{"text": " "}', "t.jsonl")
    assert texts.records == [TextRecord("t.jsonl line 1", text="Es war\neinmal")]
    assert said == 'warning t.jsonl line 2: "text" is empty; the row is passed over'
    assert texts.forms == {"raw text": 1}


def test_each_row_has_its_own_form(tmp_path: Path) -> None:
    rows = ['{"text": "a"}', '{"prompt": "a", "completion": "b"}', '{"text": "c"}']
    texts, said = read(tmp_path, "\n".join(rows), "mixed.jsonl")
    assert said == "" and texts.forms == {"raw text": 2, "prompt/completion": 1}


# --- tools ----------------------------------------------------------------------------------------

RESULT = {"role": "tool", "content": "21 °C"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", ['{"city": "巴黎"}', {"city": "巴黎"}])
@pytest.mark.parametrize("tools", [[WRAPPED], [TOOL], json.dumps([WRAPPED]), json.dumps([TOOL])])
def test_openai_tools(tmp_path: Path, arguments: Any, tools: Any) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    rows = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "21 °C", "tool_call_id": "call_1", "name": "get_weather"},
        ANSWER,
    ]
    texts, said = read_row(tmp_path, {"messages": rows, "tools": tools})
    assert said == ""
    assert messages(texts) == [
        QUESTION,
        {**CALLING, "tool_calls": [{**CALL, "id": "call_1"}]},
        {**RESULT, "tool_call_id": "call_1", "name": "get_weather"},
        ANSWER,
    ]
    assert texts.records[0].tools == (WRAPPED,)


def test_older_openai_functions(tmp_path: Path) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "巴黎"}'}
    rows = [
        QUESTION,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "21 °C"},
        ANSWER,
    ]
    texts, said = read_row(tmp_path, {"messages": rows, "functions": [TOOL]})
    assert said == ""
    assert messages(texts) == [QUESTION, CALLING, {**RESULT, "name": "get_weather"}, ANSWER]
    assert texts.records[0].tools == (WRAPPED,)


@pytest.mark.parametrize("many", [False, True])
def test_sharegpt_tools(tmp_path: Path, many: bool) -> None:
    call = {"name": "get_weather", "arguments": {"city": "巴黎"}}
    turns = [
        {"from": "human", "value": "Wie heißt du?"},
        {"from": "function_call", "value": json.dumps([call, call] if many else call)},
        {"from": "observation", "value": "21 °C"},
        *([{"from": "tool", "value": "21 °C"}] if many else []),
        {"from": "gpt", "value": "我叫小龙。"},
    ]
    row = {"conversations": turns, "tools": json.dumps([TOOL])}
    texts, said = read_row(tmp_path, row)
    assert said == ""
    calling = {**CALLING, "tool_calls": [CALL, CALL] if many else [CALL]}
    results = [RESULT, RESULT] if many else [RESULT]
    assert messages(texts) == [QUESTION, calling, *results, ANSWER]
    assert texts.records[0].tools == (WRAPPED,)


def test_a_conversation_may_end_with_a_call(tmp_path: Path) -> None:
    texts, said = read_row(tmp_path, {"messages": [QUESTION, CALLING]})
    assert said == "" and messages(texts) == [QUESTION, CALLING]


def test_arguments_in_parquet_lose_the_keys_of_other_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    other = {"name": "f", "arguments": {"day": 1}}
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (CALL, {"type": "function", "function": other})
    ]
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    texts = read_texts(tmp_path / "a.parquet", None)
    assert texts.problems == []
    calls = [r.messages[1]["tool_calls"][0]["function"]["arguments"] for r in texts.records]
    assert calls == [{"city": "巴黎"}, {"day": 1}]


# --- rows that are refused, or remarked upon ------------------------------------------------------


def asking(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def calling(call: Any) -> dict[str, Any]:
    return asking(QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]})


def call_of(arguments: Any) -> dict[str, Any]:
    return calling({"type": "function", "function": {"name": "f", "arguments": arguments}})


FAULTS: dict[str, tuple[Any, str]] = {
    "a number": (7, "error rows.jsonl line 1: found a number; expected one object a line: {"),
    "no known field": (
        {"mesages": [], "id": 1},
        'error rows.jsonl line 1: no known form; found "mesages", "id"; did you mean "messages"? '
        "expected the fields of one form: messages | conversations | instruction, output | "
        "prompt, completion | prompt, response | query, response | question, answer | "
        "file_name, text | text",
    ),
    "no field": ({}, "error rows.jsonl line 1: no known form; found nothing; expected the"),
    "no answer": (
        {"instruction": "a", "input": "b"},
        'error rows.jsonl line 1: no "output"; found "instruction", "input"; expected the fields',
    ),
    "a misspelt answer": (
        {"prompt": "a", "complation": "b"},
        'error rows.jsonl line 1: no "completion"; found "prompt", "complation" (is "complation" '
        "meant for it?); expected",
    ),
    "a null answer": ({"question": "a", "answer": None}, '"answer" is null; expected a value'),
    "a null text": ({"text": None}, 'line 1: "text" is null; expected a value'),
    "a preference pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference pair"),
    "a picture": ({"text": "a", "images": ["a.png"]}, 'the row has "images"; only texts'),
    "an answer of numbers": (
        {"instruction": "a", "output": 42},
        'error rows.jsonl line 1: "output" is a number; expected a text in quotes',
    ),
    "an empty answer": (
        {"prompt": "a", "completion": " \n"},
        'error rows.jsonl line 1: "completion": the answer is empty; expected what the model',
    ),
    "an empty answer among messages": (
        asking(QUESTION, {"role": "assistant", "content": ""}),
        'error rows.jsonl line 1: item 2 of "messages": the answer is empty',
    ),
    "an empty prompt": (
        {"query": "", "response": "b"},
        'warning rows.jsonl line 1: "query": the user\'s text is empty',
    ),
    "a text and a list": (
        {"prompt": [QUESTION], "completion": "b"},
        '"prompt" is a list, "completion" is a text; expected two texts, or two lists',
    ),
    "messages that are no list": (
        {"messages": QUESTION},
        'error rows.jsonl line 1: "messages" is an object; expected a list',
    ),
    "messages that are no JSON": (
        {"messages": "user: hi"},
        '"messages" is a text, and not valid JSON (Expecting value at column 1); expected a list',
    ),
    "no message": ({"conversations": []}, 'line 1: "conversations" is an empty list'),
    "a message that is none": (
        asking("hi"),
        'error rows.jsonl line 1: item 1 of "messages": found a text; expected {"role": "user"',
    ),
    "no role": (
        asking({"rol": "user", "content": "a"}, ANSWER),
        'item 1 of "messages": no "role"; found "rol", "content" (is "rol" meant for "role"?)',
    ),
    "an unknown role": (
        asking(QUESTION, {"role": "assistent", "content": "a"}),
        'error rows.jsonl line 1: item 2 of "messages": "role" is "assistent"; did you mean '
        '"assistant"? expected one of system, developer, user, assistant, tool, function',
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        'item 1 of "conversations": "from" is "narrator"; expected one of system, human, user, gpt',
    ),
    "no content": (
        asking({"role": "user", "text": "a"}, ANSWER),
        'item 1 of "messages": no "content"; found "role", "text"',
    ),
    "a null content": (asking({"role": "user", "content": None}, ANSWER), '"content" is null'),
    "no value": (
        {"conversations": [{"from": "human", "content": "a"}]},
        'item 1 of "conversations": no "value"; found "from", "content"',
    ),
    "content that is no text": (
        asking({"role": "user", "content": {"a": 1}}, ANSWER),
        'item 1 of "messages": "content" is an object; expected a text in quotes',
    ),
    "a picture among the parts": (
        asking({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
        'item 1 of "messages": "content" holds a part of type "image_url"; only texts are learned',
    ),
    "a weight": (
        asking(QUESTION, {**ANSWER, "weight": 0}),
        'item 2 of "messages": "weight" is not supported; what is learned is set by train_on',
    ),
    "reasoning of the user": (
        asking({**QUESTION, "reasoning_content": "a"}, ANSWER),
        '"reasoning_content" in a message of role user; only an assistant has it',
    ),
    "reasoning that is no text": (
        asking(QUESTION, {**ANSWER, "reasoning_content": ["a"]}),
        'item 2 of "messages": "reasoning_content" is a list; expected a text',
    ),
    "system in the middle": (
        asking(QUESTION, ANSWER, SYSTEM, QUESTION, ANSWER),
        'item 3 of "messages": a system message in the middle; expected only as the first',
    ),
    "two systems": (
        {**asking(SYSTEM, QUESTION, ANSWER), "system": "a"},
        '"system" and a system message in the conversation; keep one of them',
    ),
    "two user turns": (
        asking(QUESTION, QUESTION, ANSWER),
        'error rows.jsonl line 1: item 2 of "messages": two user turns in a row; join them to one',
    ),
    "two assistant turns": (
        {"conversations": [{"from": f, "value": "a"} for f in ("human", "gpt", "assistant")]},
        'item 3 of "conversations": two assistant turns in a row; join them to one',
    ),
    "the assistant first": (
        asking(ANSWER, QUESTION, ANSWER),
        'item 1 of "messages": the conversation begins with the assistant; expected a user turn',
    ),
    "no assistant": (asking(SYSTEM, QUESTION), "line 1: there is no assistant turn in it"),
    "the user last": (
        asking(QUESTION, ANSWER, QUESTION),
        'warning rows.jsonl line 1: item 3 of "messages": the last turn is the user\'s: nothing '
        "behind the last answer is learned",
    ),
    "a result without a call": (
        asking(QUESTION, RESULT, ANSWER),
        'item 2 of "messages": a tool\'s result without a call; expected behind an assistant',
    ),
    "a call without a result": (
        asking(QUESTION, CALLING, QUESTION, ANSWER),
        'item 3 of "messages": the tool calls before it have no result; expected role tool here',
    ),
    "arguments that are no JSON": (
        call_of("{city: Paris}"),
        'error rows.jsonl line 1: item 2 of "messages": "arguments" of "f" in "tool_calls": not '
        "valid JSON (Expecting property name enclosed in double quotes at column 2); expected an "
        "object, at least {}",
    ),
    "arguments that are no object": (call_of("[1]"), "found a list; expected an object"),
    "no arguments": (calling({"name": "f"}), "found none; expected an object, at least {}"),
    "a call without a name": (
        calling({"type": "function", "function": {"arguments": {}}}),
        'item 2 of "messages": "tool_calls" holds a call without a name; expected {"name"',
    ),
    "a call that is none": (calling("f"), '"tool_calls" holds a call without a name'),
    "calls that are no list": (
        asking(QUESTION, {"role": "assistant", "content": "", "tool_calls": CALL}),
        '"tool_calls" is an object; expected a list of calls like {',
    ),
    "a call of another type": (
        calling({"type": "retrieval", "name": "f", "arguments": {}}),
        '"tool_calls" holds a call of type "retrieval"; expected function',
    ),
    "a function_call that is no JSON": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "f()"},
            ]
        },
        'item 2 of "conversations": "value" of a function_call is not valid JSON (Expecting value',
    ),
    "tools that are no JSON": (
        {**asking(QUESTION, ANSWER), "tools": "[get_weather]"},
        'error rows.jsonl line 1: "tools" is a text, and not valid JSON (Expecting value at col',
    ),
    "a tool without a name": (
        {**asking(QUESTION, ANSWER), "tools": [{"parameters": {}}]},
        'item 1 of "tools": not a function with a name; expected {"type": "function"',
    ),
    "a history that is none": (
        {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
        'item 1 of "history": found a list; expected [question, answer]',
    ),
    "half a character": (
        {"prompt": "\ud83d", "completion": "b"},
        '"prompt" holds a broken character (half of a surrogate pair)',
    ),
    "half a character in arguments": (
        call_of({"a": ["\ud83d"]}),
        '"arguments" of "f" in "tool_calls" holds a broken character',
    ),
    "a NUL": ({"text": "a\0b"}, 'line 1: "text" holds a NUL character (\\u0000); remove it'),
    "a control character": (
        {"prompt": "a", "completion": "b\n\x1b[0m"},
        'warning rows.jsonl line 1: "completion" holds U+001B in its line 2, a control character',
    ),
    "a broken encoding": (
        {"text": "Gr\ufffd\ufffde"},
        'warning rows.jsonl line 1: "text" holds U+FFFD in its line 1, the sign of a broken enc',
    ),
    "fields that are not used": (
        {"prompt": "a", "completion": "b", "id": 7, "sytem": "c", "score": None},
        'warning rows.jsonl: not used: "id", "sytem" (did you mean "system"?)',
    ),
    "keys of a message that are not used": (
        asking(QUESTION, {**ANSWER, "thinking": "a"}),
        'warning rows.jsonl: not used: "thinking"',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    row, expected = FAULTS[fault]
    texts, said = read_row(tmp_path, row)
    assert expected in said
    assert said.count("\n") == 0
    assert len(texts.records) == (1 if said.startswith("warning") else 0)


LINE_FAULTS: dict[str, tuple[str, str]] = {
    "not JSON": (
        '{"text": "a"}\n\n{"text": "b",}\n{"text": "c"}\n',
        "error rows.jsonl line 3: not valid JSON (Illegal trailing comma before end of object at "
        "column 13); expected one object a line: {",
    ),
    "a key twice": ('{"text": "a", "text": "b"}', 'line 1: the key "text" stands twice in one obj'),
    "a JSON list": ('[{"text": "a"}]', "error rows.jsonl: this is one JSON list; rename it to .js"),
    "objects over lines": ('{\n"text": "a"\n}', "error rows.jsonl: an object takes several lines"),
    "nothing": ("\n \n", "error rows.jsonl: there is no row in it; expected one for each"),
    "deep nesting": ('{"text":' * 100_000, "line 1: not usable as JSON"),
    "deep arguments": (
        json.dumps(call_of(0)).replace(": 0}", ': {"a":' + "[" * 400 + "]" * 400 + "}}"),
        "it is nested more than 50 levels deep",
    ),
    "a huge number": ('{"text": ' + "1" * 5000 + "}", "line 1: not usable as JSON"),
}


@pytest.mark.parametrize("fault", LINE_FAULTS)
def test_line_faults(tmp_path: Path, fault: str) -> None:
    text, expected = LINE_FAULTS[fault]
    _, said = read(tmp_path, text, "rows.jsonl")
    if fault == "not JSON" and sys.version_info < (3, 13):
        expected = "error rows.jsonl line 3: not valid JSON ("
    assert expected in said and said.count("\n") == 0


JSON_FAULTS: dict[str, tuple[str, str]] = {
    "an object": (
        '{"prompt": "a"}',
        'error d.json: found an object with "prompt"; expected a list of objects: [{"prompt"',
    ),
    "lines": (
        '{"text": "a"}\n{"text": "b"}',
        "error d.json: not valid JSON (Extra data at line 2, column 1): one JSON value behind "
        "another; if it is one object a line, rename it to .jsonl",
    ),
    "not JSON": (
        '[\n{"text": a}]',
        "error d.json: not valid JSON (Expecting value at line 2, column 10); expected a list",
    ),
    "a text among the rows": (
        '[{"text": "a"}, "b"]',
        "error d.json row 2: found a text; expected an object: {",
    ),
    "nothing": ("", "error d.json: there is no row in it"),
    "an empty list": ("[]", "error d.json: there is no row in it"),
    "a faulty row": ('[{"text": "a"}, {"prompt": "b"}]', 'error d.json row 2: no "completion"'),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_faults(tmp_path: Path, fault: str) -> None:
    text, expected = JSON_FAULTS[fault]
    _, said = read(tmp_path, text, "d.json")
    assert expected in said and said.count("\n") == 0


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.md"])
def test_other_encodings(tmp_path: Path, file: str) -> None:
    texts, said = read(tmp_path, "问题一,回答一\n".encode("gbk"), file)
    assert texts.records == [] and said.startswith(f"error {file}: the file is not UTF-8")
    assert "GBK" in said
    _, said = read(tmp_path, "a,b".encode("utf-16"), file)
    assert said == f"error {file}: the file seems to be UTF-16; save it as UTF-8"


def test_every_order_of_turns(tmp_path: Path) -> None:
    """All conversations of up to five turns: Begin, System, User, Answer, Call, Tool."""
    turns = {"S": SYSTEM, "U": QUESTION, "A": ANSWER, "C": CALLING, "T": RESULT}
    allowed = {"BS", "BU", "SU", "SA", "SC", "UA", "UC", "AU", "CT", "TT", "TU", "TA", "TC"}
    orders = ["".join(order) for n in range(1, 6) for order in itertools.product("SUACT", repeat=n)]
    rows = [json.dumps(asking(*(turns[letter] for letter in order))) for order in orders]
    texts, _ = read(tmp_path, "\n".join(rows), "orders.jsonl")
    good = {int(record.where.split()[-1]) - 1 for record in texts.records}
    for index, order in enumerate(orders):
        pairs = {a + b for a, b in itertools.pairwise("B" + order)}
        assert (index in good) == (pairs <= allowed and bool({*"AC"} & {*order})), order
    remarked = {problem.where for problem in texts.problems if problem.severity == "warning"}
    open_ended = {f"orders.jsonl line {i + 1}" for i in good if orders[i][-1] not in "AC"}
    assert open_ended <= remarked


def test_many_unused_fields_are_not_all_named(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "a", f"key{number}": 1}) for number in range(50)]
    _, said = read(tmp_path, "\n".join(rows), "rows.jsonl")
    assert said.startswith('warning rows.jsonl: not used: "key0", "key1", ')
    assert said.endswith('"key9" and 40 more')


def test_all_problems_of_a_conversation_at_once(tmp_path: Path) -> None:
    row = asking({"role": "user"}, {"role": "bot", "content": "a"}, ANSWER)
    texts, said = read_row(tmp_path, row)
    assert texts.records == []
    assert [line.split(":")[1] for line in said.splitlines()] == [
        ' item 1 of "messages"',
        ' item 2 of "messages"',
    ]
    _, said = read_row(tmp_path, asking(ANSWER, QUESTION, QUESTION, SYSTEM))
    said_of = [line.split(": ")[1] for line in said.splitlines()]
    assert said_of == [f'item {number} of "messages"' for number in (1, 3, 4, 4)]


def test_all_bad_rows_and_the_good_ones(tmp_path: Path) -> None:
    rows = ["{", '{"text": "a"}', '{"prompt": "b"}', "", '{"text": 3}', '{"text": "c"}']
    texts, said = read(tmp_path, "\n".join(["7", *rows]), "r.jsonl")
    assert [record.where for record in texts.records] == ["r.jsonl line 3", "r.jsonl line 7"]
    lines = [line.split(":")[0] for line in said.splitlines()]
    assert lines == [f"error r.jsonl line {number}" for number in (1, 2, 4, 6)]


# --- CSV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "prompt,completion\n", "\nPrompt , Completion\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv(tmp_path: Path, header: str, end: str) -> None:
    body = (
        'Hello,"Hi, friend"\n'
        "\n"
        '"He said ""yes"",\n\nand left", "a space before the quote"\n'
        "What now?,Nothing."
    )
    texts, said = read(tmp_path, "\ufeff" + (header + body).replace("\n", end), "talk.csv")
    assert said == ""
    before = header.count("\n")
    pairs = [
        (before + 1, "Hello", "Hi, friend"),
        (before + 3, 'He said "yes",\n\nand left', "a space before the quote"),
        (before + 6, "What now?", "Nothing."),
    ]
    assert texts.records == [
        TextRecord(
            f"talk.csv line {line}",
            ({"role": "user", "content": asked}, {"role": "assistant", "content": answer}),
        )
        for line, asked, answer in pairs
    ]
    name = "prompt/completion" if header else "prompt/completion (CSV without header)"
    assert texts.forms == {name: 3}


@pytest.mark.parametrize("form", [form for form in FORMS if "as messages" not in form])
def test_csv_carries_every_flat_form(tmp_path: Path, form: str) -> None:
    row = {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in FORMS[form][0].items()
    }
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    texts = read_texts(tmp_path / "d.csv", None)
    assert texts.problems == [] and messages(texts) == FORMS[form][1]
    assert texts.records[0].where == "d.csv line 2"


def test_csv_of_raw_texts(tmp_path: Path) -> None:
    long = "once upon a time " * 20_000  # longer than Python's own limit of a cell
    texts, said = read(tmp_path, f'id,text\n1,"{long}"\n2,short\n', "d.csv")
    assert said == 'warning d.csv: not used: "id"'
    assert [record.text for record in texts.records] == [long, "short"]
    assert csv.field_size_limit() == 131_072


CSV_FAULTS: dict[str, tuple[str, str]] = {
    "an unquoted comma": (
        "Hello you!,Hi, friend\n",
        "error d.csv line 1: 3 cells found, expected 2 (the prompt and the completion); a cell "
        'that holds a comma needs quotes: "one, two",three',
    ),
    "an unquoted comma below a header": (
        "prompt,completion\na,b\nHello,Hi, friend\n",
        "error d.csv line 3: 3 cells found, expected 2 as in the header; a cell that holds",
    ),
    "a quote never closed": (
        'a b?,c\nd,"e\n',
        'error d.csv line 2: unbalanced quotes in "d,"e"; a cell that begins with a quote ends',
    ),
    "a quote open over the next row": (
        'prompt,completion\na,"b\nc,"d"\n',
        "error d.csv line 2: unbalanced quotes",
    ),
    "no answer": (
        "prompt,completion\na,\n",
        'error d.csv line 2: "completion": the answer is empty',
    ),
    "no question": (
        "prompt,completion\n,b\n",
        'warning d.csv line 2: "prompt": the user\'s text is empty',
    ),
    "a misspelt header": (
        "prompt,complation\na,b\nc,d\n",
        'error d.csv line 1: this header fits no form; found "prompt", "complation"; did you mean '
        '"completion"? expected the fields of one form: messages |',
    ),
    "an unknown header": (
        "Frage,Antwort\nWas?,Nichts.\n",
        'warning d.csv line 1: "Frage", "Antwort" is no known header; the line is read as a row',
    ),
    "a column twice": (
        "prompt,prompt,completion\na,b,c\n",
        'error d.csv line 1: the column "prompt" stands twice in the header',
    ),
    "one column": (
        "Hello there!\nHi!\n",
        'error d.csv line 1: 1 cell ("Hello there!") and no known header; expected two (prompt,',
    ),
    "three unknown columns": (
        "Frage,Antwort,Quelle\na,b,c\n",
        'error d.csv line 1: 3 cells ("Frage", "Antwort", "Quelle") and no known header; expected',
    ),
    "semicolons": (
        "prompt;completion\na;b\n",
        "error d.csv line 1: cells are separated by commas, found semicolons",
    ),
    "tabs": ("Hello\tHi\n", "error d.csv line 1: cells are separated by commas, found tabs"),
    "full-width commas": (
        "你好，您好\n",
        "line 1: cells are separated by commas, found full-width",
    ),
    "messages that are no JSON": (
        "messages\n\"[{'role': 'user'}]\"\n",
        'error d.csv line 2: "messages" is a text, and not valid JSON (Expecting property name',
    ),
    "nothing": ("", "error d.csv: there is no row in it"),
    "a header only": ("prompt,completion\n", "error d.csv: there is no row in it"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_csv_faults(tmp_path: Path, fault: str) -> None:
    text, expected = CSV_FAULTS[fault]
    _, said = read(tmp_path, text, "d.csv")
    assert expected in said and said.count("\n") == 0


def test_csv_reading_goes_on_below_a_bad_row(tmp_path: Path) -> None:
    text = 'prompt,completion\na,b,c\nd,"e\nf,g\nh,i,\n'
    texts, said = read(tmp_path, text, "d.csv")
    assert [record.where for record in texts.records] == ["d.csv line 4"]
    lines = [line.split(":")[0] for line in said.splitlines()]
    assert lines == [f"error d.csv line {number}" for number in (2, 3, 5)]


# --- rows that name a file ------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffEin Brief.\r\nLang.".encode())
    (folder / "sub/b.MD").write_text("# Noch einer", encoding="utf-8")
    (folder / "c.txt").write_text("nobody's", encoding="utf-8")
    return folder


def test_file_and_answer(named: Path) -> None:
    text = "file_name,text\na.txt,kurz\nsub\\b.MD,kürzer\n"
    (named / "metadata.csv").write_text(text, encoding="utf-8")
    texts = read_texts(named, None)
    assert texts.records[0] == TextRecord(
        "metadata.csv line 2",
        (
            {"role": "user", "content": "Ein Brief.\nLang."},
            {"role": "assistant", "content": "kurz"},
        ),
    )
    assert texts.records[1].messages[0]["content"] == "# Noch einer"
    assert texts.forms == {"file_name/text": 2}
    what = "1 file (c.txt) in the folder not read: the data is in metadata.csv"
    assert texts.problems == [Problem(str(named), what, "warning")]
    elsewhere = named.parent / "mine.jsonl"
    elsewhere.write_text('{"file_name": "c.txt", "text": "x"}', encoding="utf-8")
    texts = read_texts(named, elsewhere)
    assert [record.where for record in texts.records] == ["mine.jsonl line 1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("d.txt", '"file_name": "d.txt": there is no such file in '),
        ("a.png", '"file_name": "a.png": expected a .txt or .md file, which holds the prompt'),
        ("../a.txt", '"file_name": "../a.txt" leaves the folder'),
        ("C:/a.txt", '"file_name": "C:/a.txt" leaves the folder'),
        ("gbk.txt", '"file_name": "gbk.txt": the file is not UTF-8'),
        ("empty.txt", 'warning metadata.csv line 2: "file_name": the user\'s text is empty'),
        ("", '"file_name": "": expected a .txt'),
    ],
)
def test_file_and_answer_faults(named: Path, name: str, expected: str) -> None:
    (named / "gbk.txt").write_bytes("一封信".encode("gbk"))
    (named / "empty.txt").write_bytes(b"")
    _, said = read(named, f"file_name,text\n{name},x\n", "metadata.csv")
    assert expected in said and "metadata.csv line 2" in said and said.count("\n") == 0


# --- files and folders ----------------------------------------------------------------------------


def test_raw_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "书.md").write_bytes("\ufeff# 一\r\n\r\n二\x0c".encode())
    (tmp_path / "sub/a.TXT").write_text("a", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF")
    texts = read_texts(tmp_path, None)
    assert texts.records == [
        TextRecord("书.md", text="# 一\n\n二\x0c"),
        TextRecord("sub/a.TXT", text="a"),
    ]
    assert texts.forms == {"raw text files": 2}
    kinds = ".jsonl, .json, .csv, .parquet, .txt, .md"
    unread = f"1 file (scan.pdf) of a kind that is not read; read are {kinds}"
    assert texts.problems == [
        Problem(str(tmp_path), unread, "warning"),
        Problem("empty.txt", "the file is empty; it is passed over", "warning"),
    ]
    assert read_texts(tmp_path / "书.md", None).records == texts.records[:1]


def test_which_files_of_a_folder_are_read(tmp_path: Path) -> None:
    def wheres() -> tuple[list[str], str]:
        texts = read_texts(tmp_path, None)
        return [record.where for record in texts.records], "\n".join(map(str, texts.problems))

    (tmp_path / "sub").mkdir()
    (tmp_path / "readme.md").write_text("a", encoding="utf-8")
    assert wheres() == (["readme.md"], "")
    (tmp_path / "sub/b.jsonl").write_text('{"text": "b"}', encoding="utf-8")
    (tmp_path / "c.csv").write_text("prompt,completion\nc,d", encoding="utf-8")
    said = f"{tmp_path}: 1 file (readme.md) in the folder not read: the data is in 2 files (c.csv, \
sub/b.jsonl)"
    assert wheres() == (["c.csv line 2", "sub/b.jsonl line 1"], said)
    (tmp_path / "metadata.jsonl").write_text('{"text": "m"}', encoding="utf-8")
    read_now, said = wheres()
    assert read_now == ["metadata.jsonl line 1"]
    assert "3 files (c.csv, sub/b.jsonl, readme.md) in the folder not read" in said
    (tmp_path / "metadata.csv").write_text("text\nm", encoding="utf-8")
    assert wheres()[0] == ["metadata.csv line 2"]
    texts = read_texts(tmp_path, tmp_path / "c.csv")
    assert [record.where for record in texts.records] == ["c.csv line 2"]


def test_places_that_do_not_serve(tmp_path: Path) -> None:
    def only(path: Path, metadata: Path | None = None) -> str:
        texts = read_texts(path, metadata)
        assert texts.records == [] and texts.forms == {}
        (problem,) = texts.problems
        assert problem.severity == "error"
        return str(problem)

    assert only(tmp_path).startswith(f"{tmp_path}: no text data found; expected files in .jsonl")
    assert "there is no such file or folder" in only(tmp_path / "nowhere")
    (tmp_path / "book.pdf").write_bytes(b"")
    assert only(tmp_path / "book.pdf").startswith(f'{tmp_path / "book.pdf"}: extension ".pdf", exp')
    (tmp_path / "a.txt").write_bytes(b"a")
    assert "a metadata_path goes with a folder" in only(tmp_path / "a.txt", tmp_path / "a.csv")
    (tmp_path / "book.pdf").unlink()
    assert only(tmp_path, tmp_path / "m.csv").startswith(f"{tmp_path / 'm.csv'}: there is no such")
    assert "expected a data file, one of .jsonl" in only(tmp_path, tmp_path / "a.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links(named: Path) -> None:
    outside = named.parent / "secret.txt"
    outside.write_text("secret", encoding="utf-8")
    (named / "out.txt").symlink_to(outside)
    (named / "in.txt").symlink_to(named / "a.txt")
    (named / "loop.txt").symlink_to(named / "loop.txt")
    (named / "linked").symlink_to(named.parent)
    texts = read_texts(named, None)
    assert [record.where for record in texts.records] == ["a.txt", "c.txt", "in.txt", "sub/b.MD"]
    said = [f"{problem.severity} {problem}" for problem in texts.problems]
    assert (
        f"warning {named / 'linked'}: is a link to another folder, which is not followed"
        in (said[0])
    )
    assert said[1].startswith('error "loop.txt": this link leads nowhere')
    assert said[2].startswith('error "out.txt": this link leads out of the folder')
    _, found = read(named, "file_name,text\nout.txt,x\nlinked/secret.txt,y\n", "metadata.csv")
    assert found.count("this link leads out of the folder") == 2


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    _, said = read(tmp_path, b"PAR1", "d.parquet")
    assert said == ("error d.parquet: Parquet files need pyarrow: pip install pyarrow")


def test_parquet_faults(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    _, said = read(tmp_path, b"no parquet at all", "d.parquet")
    assert said.startswith("error d.parquet: the file cannot be read as Parquet (")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    texts = read_texts(tmp_path / "d.parquet", None)
    assert len(texts.records) == 1
    (problem,) = texts.problems
    assert str(problem).startswith('d.parquet row 2: no "completion"; found "prompt"; expected')


# --- whatever bytes: records or problems ----------------------------------------------------------

PIECES = st.sampled_from(
    b'prompt|completion|messages|text|,|"|\n|\r\n| |a|\xef\xbb\xbf|\xff|\0|\xe5\x9b\xbe|;|{|}|'
    b'[|]|:|{"prompt": "a", "completion": "b"}|{"messages": [|"role": "user"|null|1'.split(b"|")
)
ANY_BYTES = st.binary(max_size=200) | st.lists(PIECES, max_size=40).map(b"".join)
anything = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(data=ANY_BYTES, file=st.sampled_from(["d.csv", "d.jsonl", "d.json", "d.txt", "d.parquet"]))
@example(data=b'a,"' + b"b" * 200_000, file="d.csv")
def test_any_bytes(tmp_path: Path, data: bytes, file: str) -> None:
    if file == "d.parquet":
        pytest.importorskip("pyarrow")
    texts, said = read(tmp_path, data, file)
    assert texts.records or said
    for record in texts.records:
        assert record.where.startswith(file)
        assert (record.text is None) != (record.messages == ())
        repr(record).encode("utf-8")


OPENAI_KEYS = ("messages", "role", "content", "tool_calls", "function", "name", "arguments")
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *OPENAI_KEYS,
                    "from",
                    "value",
                    "tools",
                    "prompt",
                    "completion",
                    "history",
                    "output",
                ]
            ),
            inner | st.sampled_from(["user", "assistant", "function_call", "gpt", "{}"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@anything
@given(row=JSON_VALUES)
def test_any_json(tmp_path: Path, row: Any) -> None:
    texts, said = read_row(tmp_path, row)
    assert texts.records or said
    for record in texts.records:
        roles = [message["role"] for message in record.messages]
        assert "assistant" in roles and all(isinstance(m["content"], str) for m in record.messages)
