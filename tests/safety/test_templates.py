"""Chat templates of strangers: no way out of the sandbox, an end, a bound on the memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lora_scripts.data import (
    template_child,
    template_process,
)

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
# Ways out of Jinja's sandbox that were published, and the usual first steps of others.
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('mkdir MARK').read() }}",
    "{{ lipsum.__globals__['os'].mkdir('MARK') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('MARK') }}",
    "{{ joiner.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ raise_exception.__globals__['json'].codecs.open('MARK', 'w') }}",
    "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__['re'] }}",
    "{{ namespace(__class__=1).__init__.__globals__['os'].mkdir('MARK') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ ''.format_map.__self__.__class__ }}",
    "{{ messages | map(attribute='__class__.__mro__') | list | first | last }}",
    "{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
    "{% include 'MARK' %}",
    "{% import 'os' as os %}{{ os.mkdir('MARK') }}",
    "{{ messages.append(1) }}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_does_not_reach_python(tmp_path: Path, text: str) -> None:
    """Refused, or nothing comes out: never the name of a class, a module or a function."""
    mark = tmp_path / "mark"
    try:
        found = template_process.write(text.replace("MARK", str(mark)), TALK, (), {}, prompt=False)
    except template_process.Refusal:
        found = ""
    assert not re.search(r"<(class|module|function|built-in)|subclass|__builtins__", found)
    assert not mark.exists()


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 7 ** (7 ** 9) }}",
)
BURSTING = (
    "{{ 'a' * 10 ** 11 }}",
    "{% set n = namespace(x='aa') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
)


@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(template_child, "SECONDS", 0.5)
    with pytest.raises(template_process.Refusal, match=r"does not end within|memory"):
        template_process.write(text, TALK, (), {}, prompt=False)
    monkeypatch.undo()
    said = template_process.write("{{ messages[1].content }}", TALK, (), {}, prompt=False)
    assert said == "yes"  # the next one works


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize("text", BURSTING)
def test_a_template_does_not_fill_the_memory(text: str) -> None:
    with pytest.raises(template_process.Refusal, match=r"memory|Range too big|recursion"):
        template_process.write(text, TALK, (), {}, prompt=False)
