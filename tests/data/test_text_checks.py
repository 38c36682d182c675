"""What is said of texts across their rows: copies, leaks into what is held out, one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_scripts.data import conversations
from lora_scripts.data.rows import Rows
from lora_scripts.data.text_checks import Texts, check
from lora_scripts.errors import Problem
from lora_scripts.schema import TextDataset

# Told apart by every word, so that none of them is like another.
QUESTIONS = [
    ("When does the shop open on Saturdays?", "At nine, and we close at one."),
    ("My lantern flickers. What now?", "Trim its wick to four millimetres."),
    ("Do you ship to Norway?", "Yes, parcels take about six days."),
    ("可以用支付宝付款吗？", "可以，微信支付和银行卡也都支持。"),
    ("Who painted the sign above your door?", "My grandmother did, in 1951."),
    ("Which oil burns without a smell?", "Take refined paraffin, the blue can."),
    ("Is there parking nearby?", "Behind the church, free for two hours."),
    ("玻璃罩碎了怎么办？", "请把型号发给我们，新的灯罩三天内寄出。"),
    ("Can I return a gift?", "Within thirty days, with or without its box."),
    ("How heavy is the big one?", "Eleven kilograms when it has been filled."),
    ("May my class visit you?", "Gladly, Tuesday mornings suit us best."),
    ("Why is brass turning green?", "Damp air does that; polish it with vinegar."),
]


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def rows_of(path: Path, rows: list[Any], **dataset: Any) -> Texts:
    """The rows written to a file, and read as they are read for a run."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in rows]
    path.write_text("".join(lines), encoding="utf-8")
    found = conversations.read_texts(path, None)
    assert found.problems == []
    entry = TextDataset(path=path, **dataset)
    return Rows([(found.records, entry)])


def good() -> list[Any]:
    return [row(*each) for each in QUESTIONS]


def said(problems: list[Problem]) -> list[tuple[str, str]]:
    assert all(problem.severity == "warning" for problem in problems)
    return [(problem.where, problem.what) for problem in problems]


def test_good_rows_and_the_demo_are_in_order(tmp_path: Path) -> None:
    assert check(rows_of(tmp_path / "a.jsonl", good())) == []
    assert check(Rows()) == []
    demo = Path(__file__).parents[2] / "assets" / "demo"
    learned = TextDataset(path=demo / "support_dialogues.jsonl")
    held = TextDataset(path=demo / "support_heldout.jsonl", role="validation")
    rows = Rows([(conversations.read_texts(d.path, None).records, d) for d in (learned, held)])
    assert len(rows) == 260 and check(rows) == []


def test_copies_are_one_problem_a_group(tmp_path: Path) -> None:
    rows = [*good(), good()[1], good()[1], good()[1], good()[1], good()[3]]
    first, second = said(check(rows_of(tmp_path / "a.jsonl", rows)))
    assert first == (
        "a.jsonl line 2",
        'the row "My lantern flickers. What now?\\nTrim its wick to four milli…" stands 4 times '
        "more, in a.jsonl line 13, a.jsonl line 14, a.jsonl line 15 and 1 more: each copy is "
        "learned again. Keep one (a dataset's weight shows rows more often)",
    )
    assert second[0] == "a.jsonl line 4" and "stands once more, in a.jsonl line 17" in second[1]


def test_near_copies(tmp_path: Path) -> None:
    like = row("My lantern flickers! What now?", "Trim its wick to four  millimetres.")
    close = row("My lantern flickers. What now?", "Trim its wicks to four millimetres.")
    ((where, what),) = said(check(rows_of(tmp_path / "a.jsonl", [*good(), like, close])))
    assert where == "a.jsonl line 2"
    assert what.startswith('2 rows are nearly the same as "My lantern flickers. What now?')
    assert "a.jsonl line 13, a.jsonl line 14. Keep them if" in what


def test_the_same_system_message_makes_no_rows_alike(tmp_path: Path) -> None:
    system = "You answer the letters to Tollenby Lanterns, a shop for lanterns and oil. " * 4
    assert (
        check(rows_of(tmp_path / "a.jsonl", [{**each, "system": system} for each in good()])) == []
    )


def test_held_out_rows_that_are_learned(tmp_path: Path) -> None:
    learned = rows_of(tmp_path / "a.jsonl", good())
    asked = [
        row("Do you sell candles?", "No, the chandler across the street does."),
        good()[4],
        row("Who painted the sign over your door?", "My grandmother did it, in 1951."),
    ]
    held = rows_of(tmp_path / "held.jsonl", asked, role="validation")
    exact, near = said(check(Rows([*learned.parts, *held.parts])))
    assert exact == (
        "held.jsonl line 2",
        "this row is held out, but it also stands among those that are learned, in a.jsonl line 5: "
        "the held-out loss looks better than it is. Remove one of them",
    )
    assert near[0] == "held.jsonl line 3"
    assert "nearly the same stands among those that are learned, in a.jsonl line 5" in near[1]
    lone = rows_of(tmp_path / "held.jsonl", asked[:1], role="validation")
    assert check(Rows([*learned.parts, *lone.parts])) == []
    # two datasets that are learned leak nothing
    both = Rows([*learned.parts, *rows_of(tmp_path / "more.jsonl", asked).parts])
    assert all("held out" not in what for _, what in said(check(both)))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    learned = rows_of(tmp_path / "one" / "rows.jsonl", good())
    held = rows_of(tmp_path / "two" / "rows.jsonl", good()[2:3], role="validation")
    ((where, what),) = said(check(Rows([*learned.parts, *held.parts])))
    assert where == f"{tmp_path / 'two' / 'rows.jsonl'} line 1"
    assert f"{tmp_path / 'one' / 'rows.jsonl'} line 3:" in what


def test_raw_texts(tmp_path: Path) -> None:
    long = "The lamplighter went from street to street. " * 600
    texts = [
        {"text": text} for text in ("A tale of a lamp.", long, "A tale of a lamp.", long + "!")
    ]
    ((where, what),) = said(check(rows_of(tmp_path / "a.jsonl", texts)))
    assert where == "a.jsonl line 1" and "in a.jsonl line 3" in what  # long ones only whole


def test_the_list_is_short(tmp_path: Path) -> None:
    words = ["amber", "brick", "cedar", "dune", "ember", "flint", "grove", "hazel"]
    words += ["inlet", "jade", "knoll", "larch", "moss", "nook", "oak"]
    rows = [row(f"{word} {word[::-1] * 3} {len(word)}", f"{word * 5}!") for word in words]
    found = said(check(rows_of(tmp_path / "a.jsonl", rows + rows)))
    assert len(found) == 11
    assert found[-1] == ("a.jsonl line 11", "from here on 5 more groups of copies")


def test_one_answer_to_everything(tmp_path: Path) -> None:
    rows = good()
    for each in rows[:6]:
        each["messages"][1]["content"] = "对不起，我不能回答。"
    ((where, what),) = said(check(rows_of(tmp_path / "a.jsonl", rows)))
    assert where == "a.jsonl line 1"
    assert what.startswith(
        '6 of 12 conversations end with the same answer, "对不起，我不能回答。" (also in '
        "a.jsonl line 2, a.jsonl line 3, a.jsonl line 4 and 2 more): the model"
    )
    rows[0]["messages"][1]["content"] = "That depends."
    assert check(rows_of(tmp_path / "a.jsonl", rows)) == []  # 5 of 12 are not everywhere


def test_answers_that_programs_write_for_an_empty_cell(tmp_path: Path) -> None:
    rows = good()
    for at, answer in ((2, "nan"), (5, "NaN"), (7, "nan"), (9, "N/A"), (10, "null and void")):
        rows[at]["messages"][1]["content"] = answer
    found = said(check(rows_of(tmp_path / "a.jsonl", rows)))
    assert [where for where, _ in found] == ["a.jsonl line 3", "a.jsonl line 6", "a.jsonl line 10"]
    assert found[0][1].startswith('the answer is only "nan" (and in a.jsonl line 8), as programs')


def test_a_tool_call_is_an_answer(tmp_path: Path) -> None:
    rows = []
    for question, answer in QUESTIONS:
        call = {"name": "look", "arguments": {"for": answer}}
        turns = [{"role": "user", "content": question},
                 {"role": "assistant", "content": "", "tool_calls": [call]}]  # fmt: skip
        rows.append({"messages": turns})
    assert check(rows_of(tmp_path / "a.jsonl", rows)) == []  # empty, but not the same
