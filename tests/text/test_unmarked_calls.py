"""Formats whose calls have no marker: only the name of a tool tells a call from text that begins like one."""

from __future__ import annotations

import json

import pytest

from tests.support.grammars import accepts
from tests.support.tool_calls import SPECS, parse, use
from tests.support.tool_writers import write
from tgi_asgi.text.constrain.answer_grammar import answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, Content
from tgi_asgi.text.tools.answer import AnswerParser

# Answers of formats without a marker that begin as a call may, but are none of a tool.
LIKE_CALLS = [
    '{"result": 5}',
    '{\n  "a": [1, 2],\n  "name": "f"\n}',
    '{"name": "Ada", "parameters": {"a": 1}}',
    '{ "name" : "fg", "age": 3}',
    '{"name": 5}',
    "{",
    "[1, 2, 3]",
    '[{"name": "Ada", "arguments": {}}, {"name": "f"}]',
    "[f](https://example.org)",
    "[fg(a=1)]",
    "[x] done",
    "f",
    "fg\n{}",
    "g is a tool",
    " \n {}",
]


@pytest.mark.parametrize("name", sorted(name for name, form in FORMATS.items() if not form.marker))
def test_an_automatic_answer_may_begin_as_a_call_does(compiler: GrammarCompiler, name: str) -> None:
    for is_parallel in (True, False):
        grammar = answer_grammar(None, use(name, is_parallel=is_parallel))
        assert grammar is not None
        for text in LIKE_CALLS:
            assert accepts(compiler, grammar, text), text
            assert parse(AnswerParser(None, FORMATS[name], SPECS), text, 1) == [Content(text)]
        for written in (write(name, [("f", {"a": "1"})]), write(name, [("f", {})])):
            assert not accepts(compiler, grammar, written), written


@pytest.mark.parametrize(("name", "start"), [("llama3_json", "{"), ("xlam", "[{")])
def test_an_object_with_another_name_is_shown_while_it_is_written(name: str, start: str) -> None:
    """A long text under `name` would otherwise be held back, and searched again after each token."""
    parser = AnswerParser(None, FORMATS[name], SPECS)
    assert parser.push(f'{start}"name": "') == []
    assert parser.push("Ada") == [Content(f'{start}"name": "Ada')]
    assert parser.push(" Lovelace") == [Content(" Lovelace")]


@pytest.mark.parametrize("name", ["llama3_json", "xlam"])
def test_the_blanks_of_a_call_s_beginning_may_be_others(compiler: GrammarCompiler, name: str) -> None:
    grammar = answer_grammar(None, use(name))
    assert grammar is not None
    call = write(name, [("f", {"a": 1})]).replace('{"name": "f"', ' {\n"name" :"f"', 1)
    assert accepts(compiler, grammar, call)
    arguments = json.dumps({"a": 1})
    assert parse(AnswerParser(None, FORMATS[name], SPECS), call, 1) == [
        CallStart("f"),
        CallArguments(arguments),
    ]
