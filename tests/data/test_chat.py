"""Golden tests of six chat formats: what is learned is written out, to the character."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_scripts.data.chat import ChatFormat, Encoded, Rendered
from lora_scripts.errors import UserError
from tests.data import chat_toys as toys

FORMATS: Mapping[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "chatml": (toys.chatml_tokenizer, toys.CHATML),
    "chatml, offsets without spaces": (
        functools.partial(toys.chatml_tokenizer, trim_offsets=True),
        toys.CHATML,
    ),
    "llama3": (toys.llama3_tokenizer, toys.LLAMA3),
    "qwen3": (toys.qwen3_tokenizer, toys.QWEN3),
    "gemma": (toys.gemma_tokenizer, toys.GEMMA),
    "gemma, no system": (toys.gemma_tokenizer, toys.GEMMA_REFUSES),
    "mistral": (toys.mistral_tokenizer, toys.MISTRAL),
    "mistral, ▁ after each token": (
        functools.partial(toys.mistral_tokenizer, prepend="always"),
        toys.MISTRAL,
    ),
    "glm": (toys.glm_tokenizer, toys.GLM),
    "plain, byte level": (toys.llama3_tokenizer, "plain"),
    "plain, ▁": (toys.gemma_tokenizer, "plain"),
    "plain, ▁ after each token": (
        functools.partial(toys.mistral_tokenizer, prepend="always"),
        "plain",
    ),
    "shipped chatml": (toys.chatml_tokenizer, "chatml"),
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@functools.cache
def chat(name: str) -> ChatFormat:
    tokenizer, template = FORMATS[name]
    return ChatFormat(tokenizer(), template)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def called(arguments: object = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments or {"city": "Paris"}}
    return said("", tool_calls=[{"id": "call00001", "type": "function", "function": function}])


def learned(rendered: list[Rendered]) -> list[list[str]]:
    return [[text.text[start:end] for start, end in text.spans] for text in rendered]


def words(form: ChatFormat, encoded: Encoded) -> list[str]:
    """The learned tokens, decoded one by one."""
    return [form._tokenizer.decode([i]) for i in encoded.ids[encoded.supervised]]


TWO_TURNS = [user("Hi"), said("Hello 世界"), user("And?"), said("No. ")]
TOOL_USE = [
    user("Weather?"),
    called(),
    {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "call00001"},
    said("It is sunny."),
    user("Thanks"),
    said("Yes"),
]

# --- the six formats, golden ----------------------------------------------------------------------


def test_chatml() -> None:
    form = chat("chatml")
    assert form.unseen_system == "You are a toy."
    [text] = form.render(TWO_TURNS)
    assert text.text == (
        "<|im_start|>system\nYou are a toy.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello 世界<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nNo. <|im_end|>\n"
    )
    assert learned([text]) == [["Hello 世界<|im_end|>", "No. <|im_end|>"]]
    assert "".join(words(form, form.encode(text))).startswith("Hello ")
    assert words(form, form.encode(text))[-5:] == ["N", "o", ".", " ", "<|im_end|>"]
    stated = form.render([system("Be brief."), *TWO_TURNS])
    assert "You are a toy." not in stated[0].text
    assert learned(stated) == learned([text])


def test_llama3() -> None:
    form = chat("llama3")
    assert form.unseen_system is None
    [text] = form.render([system("Be brief. "), *TWO_TURNS])
    assert text.text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello 世界<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>"
    )
    assert learned([text]) == [["Hello 世界<|eot_id|>", "No.<|eot_id|>"]]
    [text] = form.render(TOOL_USE, TOOLS)
    assert text.text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        'Functions: [{"type": "function", "function": {"name": "weather", '
    )
    assert learned([text]) == [
        [
            '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "It is sunny.<|eot_id|>",
            "Yes<|eot_id|>",
        ]
    ]


def test_qwen3() -> None:
    form = chat("qwen3")
    [text] = form.render(TWO_TURNS)
    assert text.text == (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello 世界<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nNo. <|im_end|>\n"
    )
    assert learned([text]) == [["Hello 世界<|im_end|>", "<think>\n\n</think>\n\nNo. <|im_end|>"]]
    assert learned(form.render(TOOL_USE, TOOLS)) == [
        [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
            "<|im_end|>",
            "It is sunny.<|im_end|>",
            "<think>\n\n</think>\n\nYes<|im_end|>",
        ]
    ]


@pytest.mark.parametrize(
    "first",
    [said("Hello", reasoning_content="a greeting"), said("<think>\na greeting\n</think>\n\nHello")],
)
def test_qwen3_learns_the_thoughts_that_it_drops_later(first: dict[str, Any]) -> None:
    messages = [user("Hi"), first, user("And?"), said("No", reasoning_content="a question")]
    own, whole = chat("qwen3").render(messages)
    assert own.text == (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\na greeting\n</think>\n\nHello<|im_end|>\n"
    )
    assert learned([own, whole]) == [
        ["<think>\na greeting\n</think>\n\nHello<|im_end|>"],
        ["<think>\na question\n</think>\n\nNo<|im_end|>"],
    ]
    assert "assistant\nHello<|im_end|>" in whole.text

    own_again, everything = chat("qwen3").render(messages, train_on="all")
    assert own_again == own
    assert "Hello" not in "".join(learned([everything])[0])
    assert "user\nHi" in learned([everything])[0][0]


def test_qwen3_keeps_the_thoughts_between_tool_calls_in_one_text() -> None:
    messages = [
        user("Weather?"),
        {**called(), "reasoning_content": "I have to look"},
        {"role": "tool", "content": "sunny"},
        said("It is sunny.", reasoning_content="now I know"),
    ]
    assert learned(chat("qwen3").render(messages, TOOLS)) == [
        [
            "<think>\nI have to look\n</think>\n\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "<think>\nnow I know\n</think>\n\nIt is sunny.<|im_end|>",
        ]
    ]


def test_gemma() -> None:
    form = chat("gemma")
    [text] = form.render([system("Be brief."), *TWO_TURNS])
    assert text.text == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello 世界<end_of_turn>\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n"
        "<start_of_turn>model\nNo.<end_of_turn>\n"
    )
    assert learned([text]) == [["Hello 世界<end_of_turn>", "No.<end_of_turn>"]]
    encoded = form.encode(text)
    assert list(encoded.ids).count(form._tokenizer.bos_token_id) == 1


def test_gemma_that_refuses_a_system_message() -> None:
    with pytest.raises(UserError, match=r"no system role here\. Without its system message it is"):
        chat("gemma, no system").render([system("Be brief."), *TWO_TURNS])
    with pytest.raises(UserError, match="no system role here"):
        ChatFormat(toys.gemma_tokenizer(), toys.GEMMA_REFUSES, system_prompt="Be brief.")


def test_mistral() -> None:
    form = chat("mistral")
    [text] = form.render(TWO_TURNS)
    assert text.text == "<s>[INST] Hi[/INST] Hello 世界</s>[INST] And?[/INST] No. </s>"
    assert learned([text]) == [[" Hello 世界</s>", " No. </s>"]]
    encoded = form.encode(text)
    first = form._tokenizer.convert_ids_to_tokens(encoded.ids[encoded.supervised])[0]
    assert first == "▁Hello"  # the token of the space and the word is learned


def test_mistral_whose_tools_move_with_the_last_question() -> None:
    rendered = chat("mistral").render(TOOL_USE, TOOLS)
    assert learned(rendered) == [
        ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'],
        [" It is sunny.</s>"],
        [" Yes</s>"],
    ]
    tools = json.dumps(TOOLS)
    assert rendered[0].text == (
        f"<s>[AVAILABLE_TOOLS] {tools}[/AVAILABLE_TOOLS][INST] Weather?[/INST]"
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'
    )
    assert rendered[2].text.endswith(
        '[TOOL_RESULTS] {"content": "sunny"}[/TOOL_RESULTS] It is sunny.</s>'
        f"[AVAILABLE_TOOLS] {tools}[/AVAILABLE_TOOLS][INST] Thanks[/INST] Yes</s>"
    )


def test_glm() -> None:
    form = chat("glm")
    [text] = form.render(TWO_TURNS)
    assert text.text == (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello 世界<|user|>\nAnd?<|assistant|>\nNo. <|user|>"
    )
    assert learned([text]) == [["\nHello 世界<|user|>", "\nNo. <|user|>"]]
    assert list(form.encode(text).ids[:3]) == form._tokenizer.convert_tokens_to_ids(
        ["[gMASK]", "<sop>", "<|user|>"]
    )
    assert learned(form.render(TOOL_USE, TOOLS)) == [
        [
            'weather\n{"city": "Paris"}<|observation|>',
            "\nIt is sunny.<|user|>",
            "\nYes<|user|>",
        ]
    ]
    [text] = form.render(TOOL_USE[:2], TOOLS)
    assert text.text.endswith('<|assistant|>weather\n{"city": "Paris"}<|observation|>')


def test_plain() -> None:
    form = ChatFormat(toys.gemma_tokenizer())
    assert form.name == "plain (the model has none)"
    [text] = form.render([system("Be brief."), *TWO_TURNS])
    assert text.text == (
        "<bos>Be brief.\n\nUser: Hi\nAssistant: Hello 世界<eos>\nUser: And?\nAssistant: No.<eos>\n"
    )
    assert learned([text]) == [[" Hello 世界<eos>", " No.<eos>"]]
    with pytest.raises(UserError, match="it has no place for tools"):
        form.render(TWO_TURNS, TOOLS)
    with pytest.raises(UserError, match="no place for tool calls or their results"):
        form.render(TOOL_USE)


def test_shipped_chatml() -> None:
    form = chat("shipped chatml")
    [text] = form.render(TWO_TURNS)
    assert text.text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello")
    assert learned([text]) == [["Hello 世界<|im_end|>", "No. <|im_end|>"]]
    with pytest.raises(UserError, match=r"needs <\|im_start\|> as one token"):
        ChatFormat(toys.gemma_tokenizer(), "chatml")


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama3", ["<|eot_id|>"]),
        ("qwen3", ["<|im_end|>"]),
        ("gemma", ["<end_of_turn>", "<eos>"]),
        ("mistral", ["</s>"]),
        ("glm", ["<|user|>", "<|observation|>", "<|endoftext|>"]),
        ("plain, ▁", ["<eos>"]),
    ],
)
def test_stops(name: str, stops: list[str]) -> None:
    form = chat(name)
    assert form._tokenizer.convert_ids_to_tokens(form.stop_ids) == stops


# --- other templates that are met -----------------------------------------------------------------

WITHOUT_END = """\
{%- for message in messages %}
{{- '### ' ~ message.role ~ ':\\n' ~ message.content ~ '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}
"""


def test_a_template_that_ends_no_turn_learns_end_of_text_after_every_answer() -> None:
    form = ChatFormat(toys.gemma_tokenizer(), WITHOUT_END)
    assert form.stop_ids == (form._tokenizer.eos_token_id,)
    rendered = form.render(TWO_TURNS)
    assert learned(rendered) == [["Hello 世界<eos>"], ["No.<eos>"]]
    assert rendered[1].text.startswith("### user:\nHi\n\n### assistant:\nHello 世界\n\n### user:")


OPENS_A_THOUGHT = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content.split('</think>')[-1] }}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""


def test_a_prompt_that_opens_a_thought() -> None:
    form = ChatFormat(toys.qwen3_tokenizer(), OPENS_A_THOUGHT)
    [note] = form.notes
    assert r"opens an answer with '<think>\n'" in note
    assert learned(form.render([user("Hi"), said("<Hello"), user("A"), said("B")])) == [
        ["<Hello<|im_end|>", "B<|im_end|>"]
    ]
    with pytest.raises(UserError, match="does not show the reasoning of an answer"):
        form.render([user("Hi"), said("<think>\nso\n</think>\n\nHello")])


ENDS_THE_LAST_OTHERWISE = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content }}
{{- '<|endoftext|>' if loop.last and message.role == 'assistant' else '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def test_a_turn_whose_end_changes_when_others_follow_has_a_text_of_its_own() -> None:
    form = ChatFormat(toys.chatml_tokenizer(), ENDS_THE_LAST_OTHERWISE)
    assert learned(form.render(TWO_TURNS)) == [
        ["Hello 世界<|endoftext|>"],
        ["No. <|endoftext|>"],
    ]
    assert form._tokenizer.convert_ids_to_tokens(form.stop_ids) == ["<|endoftext|>", "<|im_end|>"]


def test_what_ends_the_conversation_is_not_learned_as_the_end_of_an_answer() -> None:
    template = toys.CHATML.replace(
        "{{ '<|im_start|>assistant\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|endoftext|>' }}",
    )
    form = ChatFormat(toys.chatml_tokenizer(), template)
    [text] = form.render(TWO_TURNS)
    assert text.text.endswith("No. <|im_end|>\n<|endoftext|>")
    assert learned([text]) == [["Hello 世界<|im_end|>", "No. <|im_end|>"]]


def test_a_tool_call_that_ends_otherwise_than_an_answer() -> None:
    template = toys.QWEN3.replace(
        "{{- '<|im_end|>\\n' }}",
        "{{- '<|endoftext|>' if message.tool_calls else '<|im_end|>\\n' }}",
    )
    form = ChatFormat(toys.qwen3_tokenizer(), template)
    assert form._tokenizer.convert_ids_to_tokens(form.stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    [text] = form.render(TOOL_USE[:2], TOOLS)
    assert text.text[: text.spans[0][1]].endswith("</tool_call><|endoftext|>")


def test_a_prompt_that_ends_with_a_space_is_told() -> None:
    template = toys.CHATML.replace("assistant\\n", "assistant: ").replace(
        "turn.role ~ '\\n' ~", "turn.role ~ ': ' ~"
    )
    for trim_offsets in (False, True):
        form = ChatFormat(toys.chatml_tokenizer(trim_offsets=trim_offsets), template)
        assert "ends its prompt with ' '" in form.notes[0]
        encoded = form.encode(form.render([user("Hi"), said("fine, thank you")])[0])
        assert "".join(words(form, encoded)) == ", thank you<|im_end|>"


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_have_nothing_to_note(name: str) -> None:
    assert chat(name).notes == ()


# --- the choice of a template ---------------------------------------------------------------------


def test_the_tokenizers_own_template_a_file_and_a_text_are_the_same(tmp_path: Path) -> None:
    tokenizer = toys.chatml_tokenizer()
    tokenizer.chat_template = toys.CHATML
    own = ChatFormat(tokenizer)
    assert own.name == "the tokenizer's own"
    path = tmp_path / "模板.jinja"
    path.write_text(toys.CHATML, encoding="utf-8")
    file = ChatFormat(tokenizer, str(path))
    assert file.name == str(path)
    assert own.template == file.template == toys.CHATML
    assert own.render(TWO_TURNS) == file.render(TWO_TURNS)
    tokenizer.chat_template = {"default": toys.CHATML, "short": "{{ messages }}"}
    assert ChatFormat(tokenizer).template == toys.CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", 'no template "chatlm"; did you mean "chatml"'),
        ("vicuna", 'no template "vicuna"; expected one of "plain", "chatml"'),
        ("a/b.jinja", r"a/b\.jinja: the file cannot be read"),
        ("{{ messages[0].content }}\n{% for %}", "the text given, line 2: "),
        ("{% if messages %}no{% endif %}", "does not show a question and its answer"),
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
        ("{{ messages[0].text.strip() }}", "has no attribute 'text'"),
    ],
)
def test_a_template_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ChatFormat(toys.chatml_tokenizer(), template)
    assert [problem.where for problem in caught.value.problems] == ["chat_template"]


def test_the_saved_template_gives_every_user_the_same_ids() -> None:
    for name in FORMATS:
        form = chat(name)
        tokenizer = FORMATS[name][0]()
        tokenizer.chat_template = form.template
        ids = tokenizer.apply_chat_template(
            [user("Hi")], add_generation_prompt=True, return_dict=False
        )
        assert ids == form.prompt_ids([user("Hi")]), name


# --- what is learned of a conversation ------------------------------------------------------------


def test_last_and_all() -> None:
    form = chat("gemma")
    messages = [*TWO_TURNS, user("a rest")]
    [last] = form.render(messages, train_on="last")
    assert learned([last]) == [["No.<end_of_turn>"]]
    assert "a rest" not in last.text
    [everything] = form.render(messages, train_on="all")
    assert learned([everything]) == [[everything.text]]
    encoded = form.encode(everything)
    assert list(np.flatnonzero(~encoded.supervised)) == [0]
    assert encoded.ids[0] == form._tokenizer.bos_token_id


def test_the_system_prompt_stands_where_there_is_none() -> None:
    form = ChatFormat(toys.chatml_tokenizer(), toys.CHATML, system_prompt="Be brief.")
    assert form.unseen_system is None
    head = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert form.render(TWO_TURNS)[0].text.startswith(head)
    assert form._tokenizer.decode(form.prompt_ids([user("Hi")])).startswith(head)
    stated = form.render([system("Be long."), *TWO_TURNS])[0].text
    assert stated.startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user")


def test_a_conversation_that_begins_with_an_answer() -> None:
    [text] = chat("chatml").render([said("\nHello"), user("Hi"), said("No")])
    assert learned([text]) == [["\nHello<|im_end|>", "No<|im_end|>"]]


def test_tool_arguments_as_json_text_are_read() -> None:
    form = chat("llama3")
    asked = user("Weather?")
    as_text = form.render([asked, called('{"city": "Paris"}')], TOOLS)
    assert as_text == form.render([asked, called()], TOOLS)
    with pytest.raises(UserError, match="a call of weather are not valid JSON"):
        form.render([asked, called("{city}")], TOOLS)


@pytest.mark.parametrize(
    ("name", "messages", "tools", "message"),
    [
        ("chatml", [user("Hi")], (), "there is no assistant turn"),
        ("chatml", TWO_TURNS, TOOLS, "does not show the tools"),
        ("chatml", TOOL_USE, (), "turn 2: .* does not show tool calls"),
        (
            "llama3",
            [user("Hi"), said("Hello", reasoning_content="so")],
            (),
            "turn 2: .* does not show the reasoning of an answer",
        ),
        (
            "llama3",
            [user("Hi"), {**called(), "content": "I look."}],
            TOOLS,
            "turn 2: .* does not show the text of an answer",
        ),
    ],
)
def test_nothing_is_dropped_in_silence(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chat(name).render(messages, tools)


def test_a_turn_of_another_role_that_is_not_shown() -> None:
    template = toys.CHATML.replace("in messages %}", "in messages if turn.role != 'note' %}")
    form = ChatFormat(toys.chatml_tokenizer(), template)
    with pytest.raises(UserError, match=r"does not show turn 2 \(note\)"):
        form.render([user("Hi"), {"role": "note", "content": "x1"}, said("No")])


def test_an_answer_without_a_word_learns_to_stop() -> None:
    form = chat("chatml")
    encoded = form.encode(form.render([user("Hi"), said("")])[0])
    assert words(form, encoded) == ["<|im_end|>"]


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello 世界", "<bos>Hello 世界", "Hello 世界<eos>"])
def test_a_text_has_one_bos_and_one_end(text: str) -> None:
    form = chat("plain, ▁")
    tokenizer = form._tokenizer
    encoded = form.encode_text(text)
    assert list(encoded.ids) == [*tokenizer("Hello 世界")["input_ids"], tokenizer.eos_token_id]
    assert encoded.ids.dtype == np.int32
    assert list(np.flatnonzero(~encoded.supervised)) == [0]


def test_a_text_without_bos() -> None:
    form = chat("chatml")
    encoded = form.encode_text("Hello there")
    assert form._tokenizer.decode(encoded.ids) == "Hello there<|im_end|>"
    with pytest.raises(UserError, match="text: is empty"):
        form.encode_text("")


def test_bos_where_the_tokenizer_puts_it_and_the_template_does_not() -> None:
    tokenizer = toys.llama3_tokenizer()
    form = ChatFormat(tokenizer, toys.LLAMA3.replace("{{ bos_token }}", ""))
    [text] = form.render(TWO_TURNS)
    assert not text.text.startswith("<|begin")
    encoded = form.encode(text)
    assert list(encoded.ids) == list(chat("llama3").encode(chat("llama3").render(TWO_TURNS)[0]).ids)
    assert form.prompt_ids([user("Hi")])[0] == tokenizer.bos_token_id


# --- properties -----------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab cé世界🙂.\n", max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns that begin with a mark, Q0 A0 Q1 …, some of them after white space."""
    space = st.sampled_from(["", "", " ", "\n", "\n\n"])
    messages = []
    for k in range(draw(st.integers(1, 4))):
        messages += [
            user(f"{draw(space)}Q{k}{draw(TEXT)}"),
            said(f"{draw(space)}A{k}{draw(TEXT)}"),
        ]
    return messages


@pytest.mark.parametrize("name", FORMATS)
@given(conversations(), st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_each_answer_is_learned_once_and_no_question(
    name: str, messages: list[dict[str, Any]], thoughts: list[bool]
) -> None:
    form = chat(name)
    if name == "qwen3":
        for k, message in enumerate(messages[1::2]):
            if thoughts[k]:
                message["reasoning_content"] = f"T{k}"
    rendered = form.render(messages)
    tokens = "".join(
        form._tokenizer.decode(e.ids[e.supervised]) for e in map(form.encode, rendered)
    )
    assert "".join("".join(texts) for texts in learned(rendered)).count("A") == len(messages) // 2
    for k, message in enumerate(messages[1::2]):
        assert tokens.count(f"A{k}") == 1
        assert tokens.count(f"T{k}") == ("reasoning_content" in message)
    assert "Q" not in tokens


@pytest.mark.parametrize("name", FORMATS)
@given(conversations())
@settings(max_examples=40, deadline=None)
def test_the_learned_tokens_follow_the_prompt_that_is_used_later(
    name: str, messages: list[dict[str, Any]]
) -> None:
    """The prompt's ids, then learned ones, then at most white space that is not learned.

    Where the answer begins with a newline, a tokenizer may join it to the newline of the prompt:
    that one token is not learned, and no other may be missing.
    """
    form = chat(name)
    for k in range(1, len(messages), 2):
        [text] = form.render(messages[: k + 1], train_on="last")
        encoded = form.encode(text)
        prompt = form.prompt_ids(messages[:k])
        at = int(np.flatnonzero(encoded.supervised)[0])
        end = int(np.flatnonzero(encoded.supervised)[-1]) + 1
        assert encoded.supervised[at:end].all()
        assert form._tokenizer.decode(encoded.ids[end:]).strip() == ""
        assert encoded.ids[end - 1] in form.stop_ids
        if list(encoded.ids[:at]) != prompt:
            assert messages[k]["content"].startswith("\n")
            assert at == len(prompt)
            assert list(encoded.ids[: at - 1]) == prompt[:-1]
