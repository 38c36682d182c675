"""Broken sets of texts, each with another fault, through `lora-scripts check` as it is typed.

Each is answered with its file, its line and what to do, and none with a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import console, runs, text_toys, toys

GOOD = '{"prompt": "When do you open?", "completion": "At nine, from Monday to Friday."}'
OTHER = '{"prompt": "Wo ist der Schlüssel?", "completion": "Unter der blauen Matte."}'
HELD = '{"prompt": "Which oil has no smell?", "completion": "Refined paraffin, the blue can."}'
CALL = {"name": "look", "arguments": {"for": "rain"}}


class Broken(NamedTuple):
    """A data set and what is said of it: each a place and a part of the text behind it."""

    name: str
    files: Mapping[str, str | bytes]
    says: Sequence[str]
    is_error: bool = True
    keys: Mapping[str, Any] = {}


def turns(*messages: Any, **fields: Any) -> str:
    """A line of a JSONL file: `"user: hi"` or a whole message."""
    found = []
    for message in messages:
        if isinstance(message, str):
            role, _, content = message.partition(": ")
            message = {"role": role, "content": content}
        found.append(message)
    return json.dumps({"messages": found, **fields}, ensure_ascii=False)


def second(line: str) -> dict[str, str]:
    """A file whose second line is broken."""
    return {"rows.jsonl": f"{GOOD}\n{line}\n{OTHER}\n"}


LINE = "rows.jsonl line 2: "
SETS = [
    # --- rows and fields
    Broken(
        "no known field", second('{"q": "x", "a": "y"}'), [LINE + 'no known form; found "q", "a"']
    ),
    Broken(
        "a typing error",
        second('{"promt": "x", "completion": "y"}'),
        [LINE + 'no "prompt"; found "promt", "completion" (is "promt" meant for it?)'],
    ),
    Broken(
        "half a form", second('{"instruction": "x"}'), [LINE + 'no "output"; found "instruction"']
    ),
    Broken(
        "a null", second('{"prompt": "x", "completion": null}'), [LINE + '"completion" is null']
    ),
    Broken(
        "a number", second('{"prompt": "x", "completion": 7}'), [LINE + '"completion" is a number']
    ),
    Broken("a list of texts", second('["x", "y"]'), [LINE + "found a list; expected one object"]),
    Broken(
        "preference pairs",
        second('{"prompt": "x", "chosen": "a", "rejected": "b"}'),
        [LINE + '"chosen" and "rejected" are a preference pair'],
    ),
    Broken(
        "pictures",
        second('{"prompt": "x", "completion": "y", "images": ["a.png"]}'),
        [LINE + 'the row has "images"; only texts are learned here'],
    ),
    Broken(
        "unused fields",
        second('{"prompt": "Wer?", "completion": "Niemand.", "sytem": "Be kind."}'),
        ['rows.jsonl: not used: "sytem" (did you mean "system"?)'],
        is_error=False,
    ),
    Broken(
        "two system texts",
        second(turns("system: a", "user: b", "assistant: c", system="d")),
        [LINE + '"system" and a system message in the conversation'],
    ),
    # --- JSON
    Broken(
        "a comma too many",
        second('{"prompt": "x", "completion": "y",}'),
        [LINE + "not valid JSON ("],
    ),
    Broken(
        "single quotes", second("{'prompt': 'x', 'completion': 'y'}"), [LINE + "not valid JSON ("]
    ),
    Broken(
        "a key twice",
        second('{"prompt": "x", "prompt": "z", "completion": "y"}'),
        [LINE + 'the key "prompt" stands twice'],
    ),
    Broken(
        "an endless number",
        second('{"prompt": "x", "completion": ' + "9" * 5000 + "}"),
        [LINE + "not usable as JSON"],
    ),
    Broken("nested without end", second("[" * 100_000), [LINE + "not usable as JSON"]),
    Broken("JSON in a .jsonl", {"rows.jsonl": f"[{GOOD}]"}, ["rows.jsonl: this is one JSON list"]),
    Broken(
        "an object on many lines",
        {"rows.jsonl": json.dumps(json.loads(GOOD), indent=2)},
        ["rows.jsonl: an object takes several lines"],
    ),
    Broken(
        "JSON lines in a .json",
        {"rows.json": f"{GOOD}\n{OTHER}\n"},
        ["rows.json: not valid JSON (Extra data at line 2, column 1)", "rename it to .jsonl"],
    ),
    Broken(
        "an item of a .json",
        {"rows.json": f'[{GOOD}, "x", {OTHER}]'},
        ["rows.json row 2: found a text; expected an object"],
    ),
    # --- roles
    Broken(
        "an unknown role",
        second(turns("user: a", "bot: b")),
        [LINE + 'item 2 of "messages": "role" is "bot"'],
    ),
    Broken(
        "a role of another form",
        second('{"conversations": [{"from": "humna", "value": "a"}]}'),
        [LINE + 'item 1 of "conversations": "from" is "humna"; did you mean "human"?'],
    ),
    Broken(
        "the assistant first",
        second(turns("assistant: a", "user: b", "assistant: c")),
        [LINE + 'item 1 of "messages": the conversation begins with the assistant'],
    ),
    Broken(
        "two users in a row",
        second(turns("user: a", "user: b", "assistant: c")),
        [LINE + 'item 2 of "messages": two user turns in a row'],
    ),
    Broken(
        "two answers in a row",
        second(turns("user: a", "assistant: b", "assistant: c")),
        [LINE + 'item 3 of "messages": two assistant turns in a row'],
    ),
    Broken(
        "the system in the middle",
        second(turns("user: a", "system: b", "assistant: c")),
        [LINE + 'item 2 of "messages": a system message in the middle'],
    ),
    Broken(
        "a result without a call",
        second(turns("user: a", "tool: b", "assistant: c")),
        [LINE + 'item 2 of "messages": a tool\'s result without a call'],
    ),
    Broken(
        "a call without a result",
        second(
            turns(
                "user: a",
                {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
                "user: b",
                "assistant: c",
            )
        ),
        [LINE + 'item 3 of "messages": the tool calls before it have no result'],
    ),
    Broken("no answer", second(turns("user: a")), [LINE + "there is no assistant turn in it"]),
    Broken(
        "the user last",
        second(turns("user: Wer da?", "assistant: Ein Freund.", "user: Danke!")),
        [LINE + 'item 3 of "messages": the last turn is the user\'s'],
        is_error=False,
    ),
    Broken(
        "no content",
        second('{"messages": [{"role": "user"}]}'),
        [LINE + 'item 1 of "messages": no "content"; found "role"'],
    ),
    Broken(
        "a message that is a text",
        second('{"messages": ["hi"]}'),
        [LINE + 'item 1 of "messages": found a text; expected {"role"'],
    ),
    Broken("an empty list", second('{"messages": []}'), [LINE + '"messages" is an empty list']),
    # --- answers
    Broken(
        "an empty answer",
        second('{"prompt": "x", "completion": ""}'),
        [LINE + '"completion": the answer is empty; expected what the model shall say'],
    ),
    Broken(
        "a blank answer",
        second(turns("user: a", "assistant:  \n\t")),
        [LINE + 'item 2 of "messages": the answer is empty'],
    ),
    Broken(
        "a filled empty cell",
        second('{"prompt": "Wer kommt heute?", "completion": "nan"}'),
        [LINE + 'the answer is only "nan", as programs fill an empty cell'],
        is_error=False,
    ),
    Broken(
        "an empty question",
        second('{"prompt": " ", "completion": "Niemand kommt heute."}'),
        [LINE + '"prompt": the user\'s text is empty'],
        is_error=False,
    ),
    Broken(
        "one answer everywhere",
        {
            "rows.jsonl": "".join(
                json.dumps({"prompt": f"{word} " * 9, "completion": "I cannot answer that."}) + "\n"
                for word in (
                    "amber",
                    "brick",
                    "cedar",
                    "dune",
                    "ember",
                    "flint",
                    "grove",
                    "hazel",
                    "jade",
                    "oak",
                )
            )
        },
        ["rows.jsonl line 1: 10 of 10 conversations end with the same answer"],
        is_error=False,
    ),
    # --- rows that stand twice
    Broken(
        "copies",
        {"rows.jsonl": f"{GOOD}\n{OTHER}\n{GOOD}\n{GOOD}\n"},
        ["rows.jsonl line 1: the row ", "2 times more, in rows.jsonl line 3, rows.jsonl line 4"],
        is_error=False,
    ),
    Broken(
        "near copies",
        {"rows.jsonl": f"{GOOD}\n{OTHER}\n{GOOD.replace('open', 'opn')}\n"},
        ["rows.jsonl line 1: 1 row is nearly the same as ", ": rows.jsonl line 3. Keep them"],
        is_error=False,
    ),
    Broken(
        "copies in two files",
        {"a.jsonl": f"{GOOD}\n", "b.jsonl": f"{OTHER}\n{GOOD}\n"},
        ["a.jsonl line 1: the row ", "once more, in b.jsonl line 2"],
        is_error=False,
    ),
    Broken(
        "held-out rows that are learned",
        {"train/rows.jsonl": f"{GOOD}\n{OTHER}\n", "held/rows.jsonl": f"{HELD}\n{OTHER}\n"},
        [
            "held/rows.jsonl line 2: this row is held out, but it also stands among",
            "train/rows.jsonl line 2",
        ],
        is_error=False,
        keys={"train_data_dir": None, "datasets": ["train", "held"]},
    ),
    Broken(
        "held-out rows that are nearly learned",
        {
            "train/rows.jsonl": f"{GOOD}\n{OTHER}\n",
            "held/rows.jsonl": GOOD.replace("nine", "ten") + "\n",
        },
        [
            "held/rows.jsonl line 1: this row is held out, but nearly the same stands",
            "train/rows.jsonl line 1",
        ],
        is_error=False,
        keys={"train_data_dir": None, "datasets": ["train", "held"]},
    ),
    # --- lengths
    Broken(
        "rows that are cut",
        second('{"prompt": "Go on?", "completion": "' + "good " * 40 + '"}'),
        ["1 of 3 rows are longer than max_seq_length 64: ", "of rows.jsonl line 2 ("],
        is_error=False,
        keys={"max_seq_length": 64},
    ),
    Broken(
        "an answer that begins too late",
        second('{"prompt": "' + "Go on? " * 40 + '", "completion": "No."}'),
        [LINE + "nothing is left to learn of it within max_seq_length 64: the answer begins later"],
        keys={"max_seq_length": 64},
    ),
    # --- CSV
    Broken(
        "a comma in a CSV cell",
        {"rows.csv": "prompt,completion\na,b\nc,d, e\n"},
        ["rows.csv line 3: 3 cells found, expected 2 as in the header"],
    ),
    Broken(
        "open quotes",
        {"rows.csv": 'prompt,completion\na,"b\nc,d\n'},
        ["rows.csv line 2: unbalanced quotes in "],
    ),
    Broken(
        "semicolons",
        {"rows.csv": "prompt;completion\na;b\n"},
        ["rows.csv line 1: cells are separated by commas, found semicolons"],
    ),
    Broken(
        "a header with an error",
        {"rows.csv": "question,anwser\na,b\n"},
        ['rows.csv line 1: this header fits no form; found "question", "anwser"'],
    ),
    Broken(
        "an empty CSV cell",
        {"rows.csv": "prompt,completion\na,b\nc,\n"},
        ['rows.csv line 3: "completion": the answer is empty'],
    ),
    Broken(
        "a column twice",
        {"rows.csv": "prompt,completion,prompt\na,b,c\n"},
        ['rows.csv line 1: the column "prompt" stands twice'],
    ),
    # --- files
    Broken(
        "GBK, as Chinese Excel writes it",
        {"rows.csv": "prompt,completion\n你们几点开门？,我们早上九点开门营业\n".encode("gbk")},
        ["rows.csv: the file is not UTF-8 (first bad byte in line 2)", "save it as UTF-8"],
    ),
    Broken(
        "UTF-16",
        {"rows.jsonl": f"{GOOD}\n".encode("utf-16")},
        ["rows.jsonl: the file seems to be UTF-16; save it as UTF-8"],
    ),
    Broken("an empty file", {"rows.jsonl": ""}, ["rows.jsonl: there is no row in it"]),
    Broken(
        "only blank texts",
        {"rows.jsonl": '{"text": " "}\n'},
        ["data: nothing to learn is in it: what was found is empty"],
    ),
    Broken(
        "nothing to read", {"rows.docx": b"PK"}, ["no text data found; expected files in .jsonl"]
    ),
    Broken(
        "raw texts beside rows",
        {"rows.jsonl": f"{GOOD}\n", "book.txt": "A tale."},
        ["1 file (book.txt) in the folder not read: the data is in 1 file"],
        is_error=False,
    ),
    Broken(
        "a name that leaves the folder",
        second('{"file_name": "../x.txt", "text": "y"}'),
        [LINE + '"file_name": "../x.txt" leaves the folder'],
    ),
    Broken(
        "a file that is not there",
        second('{"file_name": "gone.txt", "text": "y"}'),
        [LINE + '"file_name": "gone.txt": there is no such file in '],
    ),
    Broken(
        "no Parquet",
        {"rows.parquet": b"PAR1 no"},
        ["rows.parquet: the file cannot be read as Parquet"],
    ),
    # --- characters
    Broken(
        "half of a surrogate pair",
        second('{"prompt": "x", "completion": "\\ud83d"}'),
        [LINE + '"completion" holds a broken character (half of a surrogate pair)'],
    ),
    Broken(
        "a NUL",
        second('{"prompt": "x", "completion": "a\\u0000b"}'),
        [LINE + '"completion" holds a NUL character'],
    ),
    Broken(
        "a broken encoding",
        second('{"prompt": "Wer?", "completion": "Der B\\ufffdcker."}'),
        [LINE + '"completion" holds U+FFFD in its line 1, the sign of a broken encoding'],
        is_error=False,
    ),
    # --- tools
    Broken(
        "a tool without a name",
        second(turns("user: a", "assistant: b", tools=[{"function": {}}])),
        [LINE + 'item 1 of "tools": not a function with a name'],
    ),
    Broken(
        "arguments that are no JSON",
        second(
            turns(
                "user: a",
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "look", "arguments": "{rain"}}],
                },
            )
        ),
        [LINE + 'item 2 of "messages": "arguments" of "look" in "tool_calls": not valid JSON'],
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_toys.save_model(tmp_path_factory.mktemp("models") / "llama")


def config_of(folder: Path, base: Path, broken: Broken) -> Path:
    """The files on the disk, and a config that names them."""
    data = folder / "data"
    for name, content in broken.files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content.encode() if isinstance(content, str) else content)
    keys = dict(broken.keys)
    if "datasets" in keys:
        train, held = (str(data / name) for name in keys["datasets"])
        keys["datasets"] = [{"path": train}, {"path": held, "role": "validation"}]
    values = runs.text_values(base, data, folder, **keys)
    values = {key: value for key, value in values.items() if value is not None}
    return toys.write_config(folder / "my.yaml", **values)


def said_of(folder: Path, base: Path, broken: Broken) -> tuple[int, str]:
    code, said = console.command("check", "--config", str(config_of(folder, base, broken)))
    return code, said.replace("\\\\", "/") if "\\\\" in said else said


@pytest.mark.parametrize("broken", SETS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_broken_set(broken: Broken, tmp_path: Path, base: Path) -> None:
    code, said = said_of(tmp_path, base, broken)
    assert code in ((1, 2) if broken.is_error else (0,)), said
    for part in broken.says:
        assert part in said, said
    assert ("is in order" in said) != broken.is_error


def test_each_fault_is_another_one() -> None:
    names, says = [each.name for each in SETS], [tuple(each.says) for each in SETS]
    assert len(SETS) >= 60 and len(set(names)) == len(SETS)
    assert len({each for each in says}) >= len(SETS) - 2  # of JSON some are told alike


def test_a_good_set_has_nothing_to_say(tmp_path: Path, base: Path) -> None:
    good = Broken("good", {"rows.jsonl": f"{GOOD}\n{OTHER}\n{HELD}\n"}, [], is_error=False)
    code, said = said_of(tmp_path, base, good)
    assert code == 0 and "is in order: 3 rows in 3 samples" in said
    warnings = [line for line in said.splitlines() if line.startswith("Warning")]
    assert all("The template puts a system message" in line for line in warnings), warnings


def test_all_faults_are_named_at_once(tmp_path: Path, base: Path) -> None:
    lines = [line for each in SETS if each.files.keys() == {"rows.jsonl"} and each.is_error
             and each.says[0].startswith(LINE) and not each.keys
             for line in str(each.files["rows.jsonl"]).splitlines()[1:2]]  # fmt: skip
    path = config_of(tmp_path, base, Broken("all", {"rows.jsonl": "\n".join(lines)}, []))
    code, said = console.command("check", "--config", str(path), "lora_rank=0")
    assert code in (1, 2) and len(lines) > 30
    for number in range(1, len(lines) + 1):
        assert f"rows.jsonl line {number}: " in said
    assert "lora_rank" in said
