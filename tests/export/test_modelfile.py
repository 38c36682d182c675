"""Modelfiles: Go templates that give the very text of the chat template, or an error."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_scripts.errors import UserError
from lora_scripts.export import modelfile as subject
from lora_scripts.export.modelfile import modelfile

# Chat templates of the families, in our own words.
CHATML = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
CHATML_DEFAULT = (
    """
{%- if messages[0].role != "system" -%}
<|im_start|>system
You are "Qwen" {{ "{{" }} helpful.<|im_end|>
{% endif -%}
"""
    + CHATML
)
LLAMA3 = """{{ bos_token }}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
GEMMA = """{{ bos_token }}
{%- set first = "" -%}
{%- if messages[0].role == "system" -%}
  {%- set first = messages[0].content ~ "\n\n" -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
<start_of_turn>{{ "model" if m.role == "assistant" else m.role }}
{{ first if loop.first else "" }}{{ m.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif -%}
"""
GEMMA2 = (
    '{% if messages[0].role == "system" %}{{ raise_exception("no system") }}{% endif %}' + GEMMA
)
MISTRAL = """{{ bos_token }}
{%- set extra = "" -%}
{%- if messages[0].role == "system" -%}
  {%- set extra = messages[0].content ~ "\n\n" -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == "user" -%}
    {{- "[INST] " ~ (extra if loop.last else "") ~ m.content ~ "[/INST]" -}}
  {%- else -%}
    {{- " " ~ m.content ~ "</s>" -}}
  {%- endif -%}
{%- endfor -%}
"""
LLAMA2 = """
{%- set extra = "" -%}
{%- if messages[0].role == "system" -%}
  {%- set extra = "<<SYS>>\n" ~ messages[0].content ~ "\n<</SYS>>\n\n" -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == "user" -%}
    {{- bos_token ~ "[INST] " ~ (extra if loop.first else "") ~ m.content ~ " [/INST]" -}}
  {%- else -%}
    {{- " " ~ m.content ~ " </s>" -}}
  {%- endif -%}
{%- endfor -%}
"""
GLM4 = """[gMASK]<sop>
{%- for m in messages -%}
<|{{ m.role }}|>
{{ m.content }}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% endif -%}
"""


def tokenizer(template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A toy tokenizer of the real class, which puts `<s>` in front if `bos`."""
    core = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", chat_template=template
    )


def make(template: str | None, *, bos: bool = False, system: str | None = None) -> str:
    return modelfile(
        tokenizer(template, bos=bos),
        base="toy.gguf",
        adapter="adapter.gguf",
        stops=["<|im_end|>"],
        system=system,
    )


def go_template(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)
    ]


def test_chatml_is_this_modelfile() -> None:
    """Pinned whole. Real Go and Ollama's own rules for a Modelfile read exactly this text."""
    assert make(CHATML, system='Say "yes".') == (
        "# TEMPLATE gives the text that the adapter was trained on.\n"
        "FROM toy.gguf\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n'
        "{{ .System }}<|im_end|>\n"
        "{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Say "yes"."""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(
    ("template", "bos", "takes_system"),
    [
        (CHATML, False, True),
        (CHATML_DEFAULT, False, True),
        (LLAMA3, True, True),
        (GEMMA, True, True),
        (GEMMA2, True, False),
        (MISTRAL, True, True),
        (LLAMA2, True, True),
        (GLM4, False, True),
    ],
    ids=["chatml", "chatml-default", "llama3", "gemma", "gemma2", "mistral", "llama2", "glm4"],
)
def test_the_go_template_writes_what_the_chat_template_writes(
    template: str, bos: bool, takes_system: bool
) -> None:
    """Other conversations than those the function proves itself with; BOS is Ollama's to add."""
    rendered = tokenizer(template, bos=bos)
    go = go_template(make(template, bos=bos))
    assert go.count("<s>") == (template == LLAMA2)  # which writes it between turns too
    for system in (None, "Terse, {please}.") if takes_system else (None,):
        for contents in (["a"], ["a", "b", "c {{ d }}"], ["1", "2", "3", "4", "5", "6", '"7"']):
            messages = chat(*contents, system=system)
            expected = rendered.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert subject._execute(go, messages) == expected.removeprefix("<s>")
            assert ("<s>" in expected) == bos


def test_a_default_system_message_is_kept_where_none_is_given() -> None:
    go = go_template(make(CHATML_DEFAULT))
    assert (
        '{{ else }}<|im_start|>system\nYou are "Qwen" {{ "{{" }} helpful.<|im_end|>\n{{ end }}'
        in go
    )
    assert "helpful" in subject._execute(go, chat("a"))
    assert "helpful" not in subject._execute(go, chat("a", system="Rude."))


def test_a_system_message_goes_where_the_chat_template_puts_it() -> None:
    first, last = go_template(make(GEMMA, bos=True)), go_template(make(MISTRAL, bos=True))
    messages = chat("a", "b", "c", system="S")
    assert "user\nS\n\na<end_of_turn>" in subject._execute(first, messages)
    assert subject._execute(last, messages) == "[INST] a[/INST] b</s>[INST] S\n\nc[/INST]"


def test_a_bos_that_the_tokenizer_does_not_add_stays_in_the_template() -> None:
    assert go_template(make(LLAMA3, bos=False)).startswith("{{ if .System }}<s><|start_header_id|>")


def test_what_the_user_should_know_stands_in_comments() -> None:
    assert "# The chat template has no system role" in make(GEMMA2, bos=True)
    assert "# Ollama puts a BOS token in front" in make(CHATML, bos=True)
    dated = make("Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML)
    assert "# The chat template writes today's date" in dated
    assert re.search(r"Today is \d\d \w{3} \d{4}\.", go_template(dated))


def test_braces_quotes_and_unprintable_characters_are_written_as_go_strings() -> None:
    odd = (
        '{% for m in messages %}{"{{ m.role }}": \u200b""" {{ "{{{" }} {é{{ m.content }}}}\n'
        "{% endfor %}{% if add_generation_prompt %}{{ '{' }}{% endif %}"
    )
    go = go_template(make(odd))
    turn = '": {{ "\\U0000200b" }}{{ "\\"\\"\\"" }} {{ "{{{" }} {é{{ .Content }}}}\n'
    assert f'{{"user{turn}' in go
    assert f'{{"assistant{turn}' in go
    assert go.endswith('{{ "{" }}')


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ('{% if messages | length > 1 %}{{ raise_exception("one turn only") }}{% endif %}'
         "{{ messages[0].content }}", r"refuses user, assistant.*one turn only"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
         "later turns differently"),
        ("{{ messages[-1].content }}", "writes a message 0 times"),
        ("{% for m in messages | reverse %}{{ m.role }}{{ m.content }}{% endfor %}",
         "changes the order"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}",
         "writes a message 0 times"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | replace('one', '1') }}{% endfor %}",
         r"cannot be expressed.*user, assistant, user it writes"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}"
         "{% if loop.index == 6 %}late{% endif %}{% endfor %}", "cannot be expressed"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_said(template: str | None, message: str) -> None:
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        make(template)


def test_a_system_message_without_a_place_is_refused() -> None:
    with pytest.raises(UserError, match="no place for the system message"):
        make(GEMMA2, bos=True, system="Be brief.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "a\nSYSTEM b"}, "without quotes"),
        ({"base": ""}, "without quotes"),
        ({"adapter": '"x".gguf'}, "without quotes"),
        ({"stops": ['"""']}, "cannot stand in a Modelfile"),
        ({"system": "zero\u200bwidth"}, "u200b"),
    ],
)
def test_values_that_a_modelfile_would_change_are_refused(
    changes: dict[str, object], message: str
) -> None:
    values: dict[str, object] = {"base": "toy", "adapter": "x.gguf", "stops": [], **changes}
    with pytest.raises(UserError, match=message):
        modelfile(tokenizer(CHATML), **values)  # type: ignore[arg-type]


def test_stops_with_quotes_or_lines_stand_in_three_quotes() -> None:
    text = modelfile(
        tokenizer(CHATML), base="toy:7b", adapter="x.gguf", stops=["</s>", 'a"b', "\nUser:"]
    )
    assert text.endswith(
        'PARAMETER stop "</s>"\nPARAMETER stop """a"b"""\nPARAMETER stop """\nUser:"""\n'
    )
