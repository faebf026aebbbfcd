"""Names of arguments that contain the marks of a tool-call format, such as `q"` between quotes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.grammars import accepts
from tests.support.tool_calls import parse
from tests.support.tool_writers import write
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, ToolSpec
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.gemma_format import GemmaFormat
from tgi_asgi.text.tools.odd_names import OddNames
from tgi_asgi.text.tools.pythonic_format import PythonicFormat
from tgi_asgi.text.tools.xml_format import XmlFormat

# Formats that write names as they are; in the others, arguments are JSON.
UNQUOTED = [
    name for name, form in FORMATS.items() if isinstance(form, XmlFormat | PythonicFormat | GemmaFormat)
]
names = pytest.mark.parametrize("name", [*UNQUOTED, "hermes"])
# The last three may be confused with the beginning of another argument or with the call's end.
ODD = ['q"', "it's", "xlink:href", "a<b", "f(x)", "[", "}", "a\nb", "", "n" * 1100, "first=1", "first>", ")"]
MARKS = st.text("ab=,:\"'<>[]{}()/\\ \n", max_size=8)


def tool(odd: str, value: dict[str, Any]) -> ToolSpec:
    listed = {"first": {"type": "integer"}, odd: value, "last": {"type": "string"}}
    schema = {"properties": listed, "required": list(listed), "additionalProperties": False}
    return ToolSpec("f", schema)


def read(name: str, spec: ToolSpec, text: str, size: int) -> Any:
    start, *arguments = parse(AnswerParser(None, FORMATS[name], [spec]), text, size)
    assert start == CallStart("f")
    return json.loads("".join(piece.text for piece in arguments if isinstance(piece, CallArguments)))


@names
@pytest.mark.parametrize("odd", ODD)
def test_what_the_grammar_allows_is_read(compiler: GrammarCompiler, name: str, odd: str) -> None:
    for value, kind in (("a text", "string"), (3, "integer")):
        spec = tool(odd, {"type": kind})
        arguments = {"first": 1, odd: value, "last": "x"}
        text = write(name, [("f", arguments)])
        grammar = answer_grammar(None, ToolUse(FORMATS[name], [spec], must_call=True))
        assert grammar is not None
        assert accepts(compiler, grammar, text)
        for size in (1, 5, 10_000):
            assert read(name, spec, text, size) == arguments


@names
@given(odd=MARKS, size=st.integers(1, 40))
def test_a_name_of_any_marks_is_read_as_it_is_written(name: str, odd: str, size: int) -> None:
    assume(odd == odd.strip(" \n").lstrip(",]"))  # models write these between arguments
    arguments = {"first": 1, odd: "a text", "last": "x"}
    assert read(name, tool(odd, {"type": "string"}), write(name, [("f", arguments)]), size) == arguments


@pytest.mark.parametrize("name", ["gemma4", "functiongemma"])
def test_names_within_values_are_read_where_values_are_not_json(name: str) -> None:
    inner = {"type": "object", "properties": {"xlink:href": {"type": "string"}, 'q"': {"type": "integer"}}}
    for schema in (inner, {"type": "array", "items": inner}, {"anyOf": [inner]}):
        value: Any = {"xlink:href": "a", 'q"': 1}
        value = [value, value] if schema is not inner and "items" in schema else value
        arguments = {"first": 1, "a:b": value, "last": "x"}
        assert read(name, tool("a:b", schema), write(name, [("f", arguments)]), 3) == arguments


@names
def test_other_arguments_are_read_beside_an_odd_name_that_does_not_come(name: str) -> None:
    for odd in ODD:
        spec = ToolSpec("f", {"properties": {"first": {"type": "integer"}, odd: {}, "last": {}}})
        for arguments in ({"first": 1, "last": "x"}, {"first": 12}, {}):
            assert read(name, spec, write(name, [("f", arguments)]), 1) == arguments


def test_the_longest_name_is_found_and_waited_for() -> None:
    odd = OddNames(["usual", "a=", "a=b", "a="], "[a-z]+", before="<", behind="=")
    assert odd.match("<a=b=1") == "a=b"
    assert odd.match("<a==1") == "a="
    assert odd.match("<usual=1") is odd.match("<a=b") is None
    assert [odd.may_begin(text) for text in ("", "<a=", "<a=b", "<a=b=", "<a=c", "<u")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
